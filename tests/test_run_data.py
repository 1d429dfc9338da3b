"""The data side of a run: Config and a few numbers of the target -> batches, prompts."""

import json

import numpy as np
import pytest
from config_helpers import init
from data_helpers import CHATML, SPECIAL, make_tokenizer, many_records, write_lines

from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.run.data import open_data
from MaxDraft.run.target import Target, stop_token_ids
from MaxDraft.targets.dims import TargetError

EOS, IM_END, EOT = (SPECIAL.index(token) for token in ("<eos>", "<|im_end|>", "<|eot|>"))


def open_run_data(folder, stops=(), vocab_size=500, **changes):
    make_tokenizer(CHATML).save_pretrained(folder / "target")
    (folder / "target" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_lines(folder / "data.jsonl", many_records(40))
    keys = {
        "target_path": folder / "target",
        "grain_train_files": folder / "data.jsonl",
        "base_output_directory": folder / "runs",
        "max_target_length": 64,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "eval_fraction": 0.2,
        "decode_max_new_tokens": 8,
    } | changes
    return open_data(
        init(*[f"{key}={value}" for key, value in keys.items()]),
        vocab_size=vocab_size,
        stop_token_ids=stops,
        device_count=2,
        process_index=0,
        process_count=1,
        log=lambda line: None,
    )


def test_batches_and_prompts_come_from_their_sides(tmp_path):
    data = open_run_data(tmp_path)
    assert data.rows_per_step == 4
    assert next(data.train_batches(0))["tokens"].shape == (4, 64)
    rows = sum(int(batch["segment_ids"].any(1).sum()) for batch in data.held_out_batches(limit=-1))
    assert rows == len(data.held_out_rows)
    assert sum(1 for _ in data.held_out_batches(limit=1)) == 1
    prompts = data.prompts(target_length=64)
    assert 0 < len(prompts) <= data.config.decode_num_prompts
    assert all(prompt[0] == SPECIAL.index("<|im_start|>") for prompt in prompts)
    with pytest.raises(DataError, match="no held-out prompt leaves room"):
        data.prompts(target_length=8)


def test_the_draft_vocabulary_holds_every_stop_token(tmp_path):
    for stops in ((), (EOT,)):
        data = open_run_data(tmp_path, stops)
        ids = data.select_vocabulary(20).draft_to_target
        assert {EOS, IM_END, *stops} <= set(ids.tolist())
        assert (EOT in ids) == bool(stops)


def test_a_target_that_lacks_the_templates_tokens_is_an_error(tmp_path):
    with pytest.raises(DataError, match="check tokenizer_path and target_path"):
        open_run_data(tmp_path, vocab_size=IM_END)


def test_counts_are_of_the_training_conversations(tmp_path):
    data = open_run_data(tmp_path)
    train = data.dataset.train
    assert data.counts.sum() == train.assistant_lengths.sum()
    assert data.supervised_share == train.assistant_lengths.sum() / train.lengths.sum()
    assert data.counts.dtype == np.int64 and data.counts.shape == (500,)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 3}, None, (3,)),
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 5}, (3, 5, 7)),
        ({}, {"eos_token_id": [1, 2]}, (1, 2)),
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_stop_tokens_are_those_of_both_configs(tmp_path, config, generation, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_token_ids(Target(tmp_path, config, None, (), "")) == expected


@pytest.mark.parametrize("value", ["x", [[1]], 1.5, True, {}, ["1"]])
def test_stop_tokens_that_are_no_ids_are_an_error(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        TargetError, match=r"generation_config\.json: eos_token_id must be a token id"
    ):
        stop_token_ids(Target(tmp_path, {}, None, (), ""))
