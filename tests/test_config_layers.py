"""Files, environment and command line: clear precedence, and every mistake says where it is."""

import pytest
import yaml
from config_helpers import BASE, error, init

from MaxDraft import pyconfig

MODELS = sorted(path.stem for path in (BASE.parent / "models").glob("*.yml"))


def line_of(path, text):
    return path.read_text().splitlines().index(text) + 1


# --------------------------------------------------------------------------------------- precedence
def test_each_layer_overrides_the_one_before(config_copy, empty_target, monkeypatch):
    base, _ = config_copy
    common = ["model_name=other", f"target_path={empty_target}", "grain_train_files=x"]
    assert init(base=base).learning_rate == 1e-4
    assert init(*common, base=base).learning_rate == 2e-4
    monkeypatch.setenv("M_LEARNING_RATE", "3e-4")
    assert init(*common, base=base).learning_rate == 3e-4
    monkeypatch.delenv("M_LEARNING_RATE")
    assert init(*common, "learning_rate=4e-4", base=base).learning_rate == 4e-4


def test_the_environment_chooses_the_model(config_copy, empty_target, monkeypatch):
    base, _ = config_copy
    for key, value in {"MODEL_NAME": "other", "TARGET_PATH": str(empty_target)}.items():
        monkeypatch.setenv(f"M_{key}", value)
    assert init("grain_train_files=x", base=base).ttt_length == 5


def test_environment_and_command_line_may_agree_but_not_disagree(monkeypatch):
    monkeypatch.setenv("M_LEARNING_RATE", "0.0003")
    assert init("learning_rate=3e-4").learning_rate == 3e-4
    message = error("learning_rate=1e-4")
    assert "M_LEARNING_RATE says 0.0003" in message
    assert "command line 0.0001" in message


def test_a_key_twice_on_the_command_line_is_an_error():
    assert "ttt_length is given twice" in error("ttt_length=3", "ttt_length=3")


def test_the_environment_of_other_programs_is_ignored(monkeypatch):
    monkeypatch.setenv("M_MMAP_THRESHOLD", "1")
    monkeypatch.setenv("M_", "1")
    init()


@pytest.mark.parametrize("name", ["M_LEARNING_RAT", "M_learning_rate", "M_LEARNINGRATE"])
def test_a_misspelt_variable_is_an_error(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert f"{name}: did you mean M_LEARNING_RATE?" in error()


# --------------------------------------------------------------------------- unknown keys and files
def test_an_unknown_key_on_the_command_line_offers_the_nearest():
    message = error("learnin_rate=1")
    assert message == "command line: unknown key 'learnin_rate'; did you mean 'learning_rate'?"
    assert "did you mean 'learning_rate'" in error("--learning_rate=1")


def test_an_unknown_key_in_a_file_names_file_and_line(config_copy):
    base, _ = config_copy
    base.write_text(base.read_text() + "\nstepz: 3\n")
    assert f"{base}:{line_of(base, 'stepz: 3')}: unknown key 'stepz'; did you mean 'steps'?" in (
        error(base=base)
    )


def test_all_mistakes_of_the_command_line_are_listed_at_once():
    message = error("learnin_rate=1", "steps=x", "word")
    assert all(part in message for part in ("learnin_rate", "steps must be", "'word' is not key="))


def test_a_missing_base_file_or_argument_says_what_to_type():
    assert "there is no configuration file nowhere.yml" in error(base="nowhere.yml")
    for argv in ([], ["train.py"], ["train.py", "steps=3"]):
        with pytest.raises(pyconfig.ConfigError, match=r"configs/base\.yml key=value"):
            pyconfig.initialize(argv)


def test_a_base_file_that_lacks_keys_is_refused(config_copy):
    base, _ = config_copy
    base.write_text("steps: 3\n")
    assert "lacks model_name, run_name" in error(base=base)


def test_a_copy_of_base_yml_keeps_the_types_of_the_schema(config_copy):
    base, _ = config_copy
    base.write_text(base.read_text().replace("learning_rate: 1.0e-4", "learning_rate: 1"))
    assert type(init(base=base).learning_rate) is float


def test_an_unknown_model_lists_the_known_ones():
    message = error("model_name=llama3.1-8")
    assert "did you mean 'llama3.1-8b'?" in message
    assert all(name in message for name in MODELS)
    assert "There are files for " in error("model_name=../base")


def test_a_target_without_a_model_file_has_the_defaults(empty_target):
    assert "model_name=default with target_path=FOLDER takes any" in error("model_name=qwen3-4b")
    config = init("model_name=default", f"target_path={empty_target}", "grain_train_files=x")
    base = yaml.safe_load(BASE.read_text())
    changed = {key for key, value in config.as_dict().items() if value != base[key]}
    assert changed == {"model_name", "run_name", "target_path", "grain_train_files"}


def test_a_key_twice_in_a_file_is_an_error(config_copy):
    base, models = config_copy
    (models / "tiny.yml").write_text("steps: 1\n\nsteps: 1\n")
    assert f"{models / 'tiny.yml'}:3: steps is given twice" in error(base=base)
    assert "b is given twice" in error("target_config={b: 1, b: 2}")


@pytest.mark.parametrize(
    ("text", "line"), [("steps: 1\nadam_b1: [0.9\nttt_length: 3\n", 3), ("steps: 1\n\ta: 2\n", 2)]
)
def test_broken_yaml_names_file_and_line(config_copy, text, line):
    base, models = config_copy
    (models / "tiny.yml").write_text(text)
    assert f"{models / 'tiny.yml'}:{line}: not YAML" in error(base=base)


def test_a_file_that_is_no_mapping_is_refused(config_copy):
    base, models = config_copy
    (models / "tiny.yml").write_text("- steps\n")
    assert "expected lines of `key: value`" in error(base=base)
    (models / "tiny.yml").write_text("# nothing\n")
    assert init(base=base).ttt_length == 7


@pytest.mark.parametrize("key", ["model_name", "run_name", "target_path", "grain_train_files"])
def test_a_model_file_may_not_decide_for_a_run(config_copy, key):
    base, models = config_copy
    (models / "tiny.yml").write_text(f"{key}: x\n")
    assert f"{key} belongs to one run" in error(base=base)


# ------------------------------------------------------------------------------- logical axis rules
def test_a_logical_axis_rule_replaces_the_rule_of_its_name_only():
    before = dict(init().logical_axis_rules)
    after = dict(init("logical_axis_rules=[[target_mlp,[fsdp,tensor]]]").logical_axis_rules)
    assert after == before | {"target_mlp": ("fsdp", "tensor")}


def test_rules_of_a_model_file_and_the_command_line_are_merged(config_copy):
    base, models = config_copy
    (models / "tiny.yml").write_text(
        "logical_axis_rules: [[target_mlp, []], [target_vocab, [fsdp]]]\n"
    )
    rules = dict(init("logical_axis_rules=[[target_mlp,[tensor]]]", base=base).logical_axis_rules)
    expected = {"target_mlp": ("tensor",), "target_vocab": ("fsdp",)}
    assert rules == dict(init().logical_axis_rules) | expected
