"""What cannot be run stops at once, and says which key was set where."""

import pytest
from config_helpers import error, init

IMPOSSIBLE = {
    "dtype=bf16": "did you mean 'bfloat16'",
    "weight_dtype=int8": "weight_dtype must be bfloat16 or float32",
    "matmul_precision=hihgest": "did you mean 'highest'",
    "loss_alignment=spec": "loss_alignment must be serving or specforge",
    "loss_denominator=all": "loss_denominator must be supervised or specforge",
    "loss_turns=first": "loss_turns must be all or last",
    "truncation_policy=cut": "truncation_policy must be truncate or drop",
    "run_checkpoint=last": "did you mean 'latest'",
    "steps=0": "steps must be at least 1 and at most 1000000000, or -1, not 0",
    "eval_steps=-2": "eval_steps must be at least 1 and",
    "num_epoch=0 steps=-1": "num_epoch must be at least 1",
    "ttt_length=0": "ttt_length must be at least 1",
    "ttt_loss_decay=1.5": "ttt_loss_decay must be above 0 and at most 1",
    "max_target_length=8 ttt_length=7": "max_target_length=8 leaves no position",
    "warmup_steps_fraction=1": "warmup_steps_fraction must be at least 0 and below 1",
    "adam_b1=1": "adam_b1 must be",
    "adam_b2=-0.1": "adam_b2 must be",
    "learning_rate=0": "learning_rate must be above 0",
    "decode_draft_steps=0": "decode_draft_steps must be at least 1",
    "decode_temperature=-1": "decode_temperature must be at least 0",
    "max_skipped_fraction=2": "max_skipped_fraction must be at least 0 and at most 1",
    "ici_data_parallelism=-1": "ici_data_parallelism and ici_fsdp_parallelism are both -1",
    "ici_tensor_parallelism=0": "ici_tensor_parallelism must be at least 1 and",
    "dcn_fsdp_parallelism=-1": "are both -1; only one can take the slices",
    "mesh_axes=[data,fsdp]": "mesh_axes must name each of data, fsdp, expert, tensor once",
    "mesh_axes=[data,fsdp,expert,tensor,tensor]": "mesh_axes must name each of",
    "logical_axis_rules=[[draft_mlp,[tensr]]]": "no mesh axis; did you mean 'tensor'",
    "logical_axis_rules=[[draft_mlp,[tensor,tensor]]]": "names mesh axis 'tensor' twice",
    "logical_axis_rules=[[draft_mlp,[]],[draft_mlp,[data]]]": "draft_mlp has two rules",
    "target_layer_ids=[1,1,2]": "different layers in ascending order",
    "target_layer_ids=[3,2,1]": "different layers in ascending order",
    "target_layer_ids=[-1,2,3]": "different layers in ascending order",
    "attention=pallas attention_block_size=8": "an attention_block_size of 128, 256, 512; not 8",
    "attention=pallas attention_block_size=192": "an attention_block_size of 128, 256, 512",
    "attention=pallas attention_block_size=1024": "an attention_block_size of 128, 256, 512",
    "draft_num_attention_heads=6 draft_num_key_value_heads=4": "is no multiple of",
    "distributed_num_processes=2": "need distributed_coordinator=host:port",
    "distributed_coordinator=node distributed_num_processes=2": "must be host:port or empty",
    "distributed_coordinator=auto": "distributed_coordinator=auto is now distributed_coordinator=",
    "distributed_coordinator=node:99": "is for several processes",
    "distributed_coordinator=n:9 distributed_num_processes=2 distributed_process_id=2": "below",
    "eval_fraction=0": "nothing is held out",
    "metrics_file=a/b": "metrics_file must be the name of a file inside the run's folder",
    "target_path=/nowhere": "there is no config.json in '/nowhere'",
    "tokenizer_path=/nowhere": "tokenizer_path: there is no folder '/nowhere'",
    "chat_template=/nowhere": "chat_template: there is no file",
    "run_name=a/b": "run_name must be the name of one folder",
    "run_name=..": "run_name must be the name of one folder",
    "run_name=a\nb": "run_name must have no line break",
    "run_name=a\x1b[31m": "run_name must have no line break",
    "run_name=a\x85b": "run_name must have no line break",
    "run_name=tiny-target": "is the folder of the target that model_name=tiny makes",
    "run_name=a\\b": "run_name must be the name of one folder",
    "base_output_directory=": "base_output_directory is empty",
    "base_output_directory=gs://bucket/runs": "mount a bucket with gcsfuse",
}


@pytest.mark.parametrize("arguments", IMPOSSIBLE)
def test_an_impossible_combination_stops_the_run(arguments):
    assert IMPOSSIBLE[arguments] in error(*arguments.split(" "))


def test_an_impossible_combination_says_who_set_its_keys(monkeypatch):
    monkeypatch.setenv("M_TTT_LENGTH", "300")
    message = error("max_target_length=256")
    assert "(max_target_length: command line; ttt_length: environment)" in message


def test_all_impossible_combinations_are_listed_at_once():
    message = error("dtype=half", "steps=0", "eval_fraction=0")
    assert all(
        part in message for part in ("dtype must be", "steps must be", "nothing is held out")
    )


def test_a_real_model_needs_a_target_and_data(empty_target):
    message = error("model_name=qwen3-8b")
    assert "target_path is empty" in message
    assert "grain_train_files is empty" in message
    init("model_name=qwen3-8b", f"target_path={empty_target}", "grain_train_files=x")


@pytest.mark.parametrize(
    "arguments",
    [
        "skip_jax_distributed_system=True",
        "distributed_coordinator=node0:8476 distributed_num_processes=2 distributed_process_id=1",
        "grain_eval_files=x eval_fraction=0",
        "target_layer_ids=[0,1,2]",
        "target_layer_ids=[4]",
        "attention=pallas attention_block_size=512",
        "logical_axis_rules=[[draft_batch,[data,fsdp,expert,tensor]]]",
        "decode_temperature=0",
        "gradient_clipping_threshold=0",
        "mesh_axes=[tensor,data,fsdp,expert]",
    ],
)
def test_what_can_run_is_accepted(arguments):
    init(*arguments.split())
