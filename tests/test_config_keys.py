"""The table of keys: it covers base.yml, and bounds what a key may hold."""

import time

import pytest
import yaml
from config_helpers import BASE, error, init

from MaxDraft import pyconfig
from MaxDraft.config_keys import KEYS, Range, may_change_on_resume

DEFAULTS = yaml.safe_load(BASE.read_text())


def test_base_yml_and_the_table_name_the_same_keys_in_order():
    assert list(DEFAULTS) == list(KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_a_default_has_the_type_of_its_row(name):
    assert type(DEFAULTS[name]) is KEYS[name].type


def test_every_number_has_a_range():
    assert [name for name, row in KEYS.items() if row.type in (int, float) and not row.range] == []


def test_rows_need_keys_of_the_table_and_values_of_their_type():
    for row in KEYS.values():
        if row.needs:
            other, values = row.needs
            assert all(type(value) is KEYS[other].type for value in values)
            assert not KEYS[other].choices or set(values) < set(KEYS[other].choices)


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "text"),
    [
        (Range(1, 9), [1, 9], [0, 10, -1], "at least 1 and at most 9"),
        (Range(1, 9, also=-1), [-1, 1], [0, -2], "at least 1 and at most 9, or -1"),
        (Range(0, 1, low_is_open=True), [0.1, 1.0], [0.0, 1.1], "above 0 and at most 1"),
        (Range(0, 1, high_is_open=True), [0.0, 0.9], [-0.1, 1.0], "at least 0 and below 1"),
    ],
)
def test_a_range_holds_its_closed_ends_only(interval, inside, outside, text):
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)
    assert str(interval) == text


@pytest.mark.parametrize("name", [name for name, row in KEYS.items() if row.range])
def test_an_absurd_number_names_the_range_at_once(name):
    huge = "1" + "0" * 17 + (".0" if KEYS[name].type is float else "")
    begun = time.monotonic()
    message = error(f"{name}={huge}", "steps=-1") if name != "steps" else error(f"{name}={huge}")
    assert f"{name} must be {KEYS[name].range}, not {KEYS[name].type(huge)}" in message
    assert time.monotonic() - begun < 2  # seconds; a loop over the value would take years


def test_what_decides_a_run_may_not_change_on_resume():
    for name in ("learning_rate", "ttt_length", "steps", "dtype", "max_target_length", "no_key"):
        assert not may_change_on_resume(name)
    for name in ("log_period", "target_path", "ici_fsdp_parallelism", "decode_temperature"):
        assert may_change_on_resume(name)


@pytest.mark.parametrize("name", [name for name, row in KEYS.items() if row.path])
def test_a_path_under_an_unknown_home_folder_is_an_error(name):
    message = error(f"{name}=~nosuchuser/x")
    assert f"{name}: ~nosuchuser names no home folder here" in message


@pytest.mark.parametrize("name", [name for name, row in KEYS.items() if row.path])
def test_an_address_is_no_local_path(name):
    message = error(f"{name}=gs://bucket/folder")
    assert f"{name} must be a local or mounted path, not 'gs://bucket/folder'" in message


def test_data_files_under_an_unknown_home_folder_are_an_error():
    message = error("grain_train_files=a.jsonl;~nosuchuser/*.jsonl,2")
    assert "grain_train_files: ~nosuchuser names no home folder here" in message


def test_a_run_under_an_unknown_home_folder_is_an_error():
    message = error("base_output_directory=~nosuchuser/runs", from_run=True)
    assert "base_output_directory: ~nosuchuser names no home folder here" in message


@pytest.mark.parametrize("name", ["target_path", "tokenizer_path", "chat_template"])
def test_a_name_too_long_for_a_file_is_an_error(name):
    assert f"{name}: there is no" in error(f"{name}={'a' * 5000}")


@pytest.mark.parametrize(
    "name",
    [
        "config.yml",
        ".lock",
        "data.json",
        "checkpoints",
        "tensorboard",
        "report.txt",
        "evaluation.json",
        ".jsonl",
        "",
        ".",
        "..",
        "a/b.jsonl",
        "/a.jsonl",
        "a\\.jsonl",
        "..jsonl",
    ],
)
def test_the_metrics_file_takes_no_name_of_the_run_folder(name):
    assert "ends in .jsonl" in error(f"metrics_file={name}")


def test_the_metrics_file_may_have_another_name():
    assert init("metrics_file=train.metrics-2.jsonl").metrics_file == "train.metrics-2.jsonl"


WITHOUT_EFFECT = {
    "muon_beta=0.9": "muon_beta=0.9 has no effect with opt_type=adamw; leave it out, or give "
    "opt_type=muon",
    "wsd_decay_steps_fraction=0.3": "give lr_schedule_type=wsd",
    "num_epoch=2 steps=9": "num_epoch=2 has no effect with steps=9; leave it out, or give steps=-1",
    "eval_fraction=0.1 grain_eval_files=x": "eval_fraction=0.1 has no effect beside",
    "profiler_steps=3": "give profiler=xplane",
    "skip_jax_distributed_system=True distributed_coordinator=a:1": "has no effect with dist",
    "checkpoint_period=7 enable_checkpointing=False": "checkpoint_period=7 has no effect",
    "decode_recurrent_position_offset=1 decode_draft_steps=1": "has no effect with decode_draft",
}


@pytest.mark.parametrize("arguments", WITHOUT_EFFECT)
def test_a_typed_option_without_effect_is_an_error(arguments):
    assert WITHOUT_EFFECT[arguments] in error(*arguments.split())


def test_an_option_of_the_environment_without_effect_is_an_error(monkeypatch):
    monkeypatch.setenv("M_MUON_BETA", "0.9")
    assert "(muon_beta: environment; opt_type: " in error()


@pytest.mark.parametrize(
    "arguments", ["muon_beta=0.95", "muon_beta=0.9 opt_type=muon", "num_epoch=2 steps=-1"]
)
def test_an_option_with_effect_or_at_its_default_is_taken(arguments):
    init(*arguments.split())


def test_an_option_without_effect_may_stand_in_a_model_file():
    # tiny.yml gives the steps; a model file might give a beta for whoever chooses muon.
    assert init("steps=-1").num_epoch == pyconfig.initialize(["", str(BASE)]).num_epoch
