"""Old names and MaxText's: whoever types one is told ours, and old runs are read under ours."""

import pytest
from config_helpers import BASE, error, init

from MaxDraft import config_renames, pyconfig
from MaxDraft.config_keys import KEYS
from MaxDraft.config_layers import defaults


def test_new_names_exist_and_old_ones_do_not():
    assert set(config_renames.RENAMED_KEYS.values()) <= set(KEYS)
    old = [*config_renames.RENAMED_KEYS, *config_renames.REMOVED_KEYS, *config_renames.MAXTEXT_KEYS]
    assert not set(old) & set(KEYS)
    for key, values in config_renames.RENAMED_VALUES.items():
        assert not set(values) & set(KEYS[key].choices)
        assert not KEYS[key].choices or set(values.values()) <= set(KEYS[key].choices)
    for key, values in config_renames.MAXTEXT_VALUES.items():
        assert not set(values) & set(KEYS[key].choices)


def test_models_that_maxtext_calls_otherwise_have_a_file_here():
    models = {path.stem for path in (BASE.parent / "models").glob("*.yml")}
    assert set(config_renames.MAXTEXT_MODELS.values()) <= models
    assert not set(config_renames.MAXTEXT_MODELS) & models


TOLD = {
    "learning_rate_schedule=wsd": "learning_rate_schedule is now lr_schedule_type",
    "optimizer=muon": "optimizer is now opt_type",
    "--optimizer=muon": "optimizer is now opt_type",
    "decay_steps_fraction=0.1": "decay_steps_fraction is now wsd_decay_steps_fraction",
    "attention_kernel=xla": "attention_kernel is now attention",
    "attention=xla": "attention=xla is now attention=blockwise",
    "attention=flash": "attention=pallas is the kernel for a TPU or GPU",
    "loss_denominator=counted": "loss_denominator=counted is now loss_denominator=supervised",
    "target_quantization=keep": "is now target_quantization=keep_quantized",
    "distributed_coordinator=auto": "is now distributed_coordinator=",
    "later_step_share=0.5": "later_step_share was removed",
    "remat_policy=full": "remat_policy was removed",
    "hf_train_files=a": "it is grain_train_files here",
    "tokenizer_type=huggingface": "the tokenizer is the one in tokenizer_path",
    "dataset_type=hf": "give the files of the data set as grain_train_files",
    "profiler=nsys": "run the command under nsys",
    "model_name=deepseek3-671b": "MaxText's deepseek3-671b is 'deepseek-v3' here",
}


@pytest.mark.parametrize("argument", TOLD)
def test_an_old_name_or_one_of_maxtext_is_explained(argument):
    assert TOLD[argument] in error(argument)


def test_other_weights_are_not_offered_for_a_model_without_file():
    message = error("model_name=llama3.1-70b")
    assert "there is no file for 'llama3.1-70b'" in message
    assert "model_name=default with target_path=FOLDER takes any size of a known" in message
    assert "did you mean" not in message
    assert "is 'llama" not in message


@pytest.mark.parametrize("key", ["kv_cache_dtype", "nope", "batch_size", "warmup"])
def test_a_key_that_is_not_near_is_not_offered(key):
    message = error(f"{key}=1")
    assert "did you mean" not in message
    assert message.endswith("; --help lists the keys, configs/base.yml too")


def test_an_old_name_in_the_environment_is_explained(monkeypatch):
    monkeypatch.setenv("M_OPTIMIZER", "muon")
    assert "environment M_OPTIMIZER: unknown key 'optimizer'; optimizer is now opt_type" in error()


OLD_RUN = """
optimizer: muon
learning_rate_schedule: wsd
decay_steps_fraction: 0.3
attention_kernel: xla
loss_denominator: counted
target_quantization: keep
distributed_coordinator: auto
remat_policy: full
later_step_share: 1.0
max_target_length: 64
"""
NOW = {
    "opt_type": "muon",
    "lr_schedule_type": "wsd",
    "wsd_decay_steps_fraction": 0.3,
    "attention": "blockwise",
    "loss_denominator": "supervised",
    "target_quantization": "keep_quantized",
    "distributed_coordinator": "",
    "max_target_length": 64,
}


def write_run(folder, text):
    (folder / "old").mkdir()
    (folder / "old" / "config.yml").write_text(text)
    return folder / "old"


def test_an_old_run_is_read_under_the_new_names(tmp_path):
    saved = pyconfig.read_saved(write_run(tmp_path, OLD_RUN))
    assert saved == defaults() | NOW


def test_an_old_run_can_be_evaluated(tmp_path):
    write_run(tmp_path, OLD_RUN.replace("later_step_share: 1.0", "later_step_share: 0.5"))
    config = init(f"base_output_directory={tmp_path}", "run_name=old", from_run=True)
    assert {key: getattr(config, key) for key in NOW} == NOW
    assert set(config.as_dict()) == set(KEYS)


def test_an_old_run_can_be_resumed_under_the_new_names():
    now = init("opt_type=muon", "max_target_length=64").as_dict()
    old = {key: now[key] for key in ("max_target_length", "ttt_length", "steps", "learning_rate")}
    tiny = {key: value for key, value in now.items() if value != defaults()[key]}
    old = tiny | old | {"optimizer": "muon", "remat_policy": "dots", "loss_denominator": "counted"}
    del old["opt_type"]
    assert pyconfig.resume_differences(old, now) == []
    assert pyconfig.resume_differences(old | {"optimizer": "adamw"}, now) == [
        "opt_type: run has 'adamw', now 'muon'"
    ]


def test_a_run_under_a_removed_key_cannot_be_resumed():
    now = init().as_dict()
    assert pyconfig.resume_differences(now | {"later_step_share": 1.0}, now) == []
    assert pyconfig.resume_differences(now | {"later_step_share": 0.5}, now) == [
        "later_step_share: run has 0.5, now no such key"
    ]


def test_keys_that_may_change_do_not_keep_a_run_from_resuming():
    now = init().as_dict()
    assert pyconfig.resume_differences(now | {"log_period": 3, "profiler": "xplane"}, now) == []


def test_the_documentation_lists_what_maxtext_names_otherwise():
    page = (BASE.parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for key, answer in config_renames.MAXTEXT_KEYS.items():
        assert f"| `{key}` | {answer} |" in page
    for key, values in config_renames.MAXTEXT_VALUES.items():
        for value, answer in values.items():
            assert f"| `{key}={value}` | {answer} |" in page
    for name, ours in config_renames.MAXTEXT_MODELS.items():
        assert f"| `model_name={name}` | it is {ours} here |" in page
