"""The configuration object, and what is written of it and read again."""

import re
import subprocess
import sys

import pytest
import yaml
from config_helpers import BASE, ROOT, error, init

from MaxDraft import pyconfig

MODELS = sorted(path.stem for path in (BASE.parent / "models").glob("*.yml"))


# --------------------------------------------------------------------------------------- the object
def test_every_key_is_an_attribute_of_the_type_of_its_default():
    config = init()
    for key, default in yaml.safe_load(BASE.read_text()).items():
        value = getattr(config, key)
        if isinstance(default, list):
            assert isinstance(value, tuple)
        elif isinstance(default, dict):
            assert dict(value) == default
        else:
            assert type(value) is type(default), key


def test_the_configuration_is_frozen_at_any_depth():
    config = init("target_config={a: {b: [1]}}")
    with pytest.raises(AttributeError, match="frozen"):
        config.steps = 3
    with pytest.raises(AttributeError, match="frozen"):
        del config.steps
    with pytest.raises(TypeError):
        config.target_config["a"]["b"] = 1
    assert config.logical_axis_rules[0] == ("target_batch", ("data", "fsdp", "expert"))
    config.as_dict()["target_config"]["a"]["b"].append(2)
    assert config.target_config["a"]["b"] == (1,)


def test_a_missing_attribute_offers_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'learning_rate'"):
        _ = init().learning_rat


def test_the_repr_shows_every_value():
    assert "  learning_rate=0.0001,\n" in repr(init("learning_rate=1e-4"))


def test_folders_are_absolute_and_have_defaults(tmp_path, empty_target, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = init("base_output_directory=~/out", "target_path=target")
    assert config.run_name == "tiny"
    assert config.run_directory == tmp_path / "out" / "tiny"
    assert config.target_directory == config.tokenizer_directory == empty_target
    assert config.export_directory == config.run_directory / "export"
    assert config.tokenizer_path == ""
    assert init().target_directory is None
    assert init().tokenizer_directory is None
    assert init(f"tokenizer_path={empty_target}").tokenizer_directory == empty_target
    assert init("export_path=head").export_directory == tmp_path / "head"


# ------------------------------------------------------------------------------------ written, read
AWKWARD = (
    "{a: '3e-4', b: 3e-4, c: [on, '1:30', '007', null, 'null', true, 'true'], d: {e: 'é #: x'}}"
)


@pytest.mark.parametrize("run_name", ["on", "1:30", "007", "null", "é: #x", " a "])
def test_a_written_configuration_reads_back_exactly(tmp_path, run_name):
    config = init(
        f"run_name={run_name}", f"base_output_directory={tmp_path}", f"target_config={AWKWARD}"
    )
    config.write(config.run_directory / "config.yml")
    assert pyconfig.read_saved(config.run_directory) == config.as_dict()
    again = init(f"run_name={run_name}", f"base_output_directory={tmp_path}", from_run=True)
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert [path.name for path in config.run_directory.iterdir()] == ["config.yml"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yml"
    init("steps=3").write(path)
    monkeypatch.setattr(pyconfig.Config, "to_yaml", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        init("steps=4").write(path)
    assert "steps: 3" in path.read_text()


@pytest.fixture
def run(tmp_path, empty_target):
    config = init(
        "model_name=qwen3-8b",
        "run_name=first",
        f"base_output_directory={tmp_path / 'runs'}",
        f"target_path={empty_target}",
        "grain_train_files=x",
        "ttt_length=4",
    )
    config.write(config.run_directory / "config.yml")
    return config


def where(run):
    return [f"base_output_directory={run.run_directory.parent}", "run_name=first"]


def test_from_run_needs_only_the_run(run):
    assert init(*where(run), from_run=True) == run


def test_from_run_stands_between_model_file_and_environment(run, monkeypatch):
    monkeypatch.setenv("M_TTT_LENGTH", "5")
    assert init(*where(run), from_run=True).ttt_length == 5
    monkeypatch.delenv("M_TTT_LENGTH")
    assert init(*where(run), "ttt_length=6", from_run=True).ttt_length == 6


def test_without_from_run_a_saved_configuration_is_not_read(run):
    assert init(*where(run)).model_name == "tiny" != run.model_name


def test_a_moved_run_is_found_where_it_is(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run.run_directory.rename(tmp_path / "elsewhere" / "second")
    moved = init(
        f"base_output_directory={tmp_path / 'elsewhere'}", "run_name=second", from_run=True
    )
    assert moved.run_directory == tmp_path / "elsewhere" / "second"
    assert moved.model_name == "qwen3-8b"


def test_from_run_without_a_run_says_what_to_type(run):
    message = error(where(run)[0], "run_name=frist", from_run=True)
    assert "Type run_name=NAME and base_output_directory=FOLDER" in message
    assert message.endswith(": first")


def test_from_run_refuses_another_model(run):
    assert "was made with model_name=qwen3-8b, not tiny" in error(
        *where(run), "model_name=tiny", from_run=True
    )


def test_differences_name_key_and_both_values():
    old = init("learning_rate=1e-4", "ttt_length=3", "steps=-1").as_dict()
    new = init("learning_rate=3e-4", "ttt_length=4", "steps=9").as_dict()
    lines = pyconfig.differences(old, new, ignore={"ttt_length"})
    assert sorted(lines) == [
        "learning_rate: run has 0.0001, now 0.0003",
        "steps: run has -1, now 9",
    ]
    assert pyconfig.differences({"a": (1,)}, {"a": [1]}, set()) == []
    assert pyconfig.differences({}, {"a": 1}, set()) == ["a: run has no such key, now 1"]


# ----------------------------------------------------------------------------------- the files here
@pytest.mark.parametrize("name", MODELS)
def test_every_model_file_resolves(name, empty_target):
    config = init(f"model_name={name}", f"target_path={empty_target}", "grain_train_files=x")
    assert config.model_name == config.run_name == name


def test_every_key_of_base_yml_is_explained():
    """A comment beside a key, a comment line above it, or a titled section around it."""
    section = None
    for line in BASE.read_text().splitlines():
        section = line if line.startswith("# ---") else section
        if re.match(r"\w+:", line):
            assert "#" in line or re.search(r"[a-z]", section or ""), line


def test_pyconfig_imports_no_jax():
    code = "import sys; from MaxDraft import pyconfig; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
