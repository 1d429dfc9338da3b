"""What the configuration promises: one schema, typed text, clear precedence, errors for people."""

import re
import subprocess
import sys

import pytest
import yaml
from config_helpers import BASE, ROOT, error, init

from MaxDraft import pyconfig

MODELS = sorted(path.stem for path in (BASE.parent / "models").glob("*.yml"))


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def copy(tmp_path):
    """configs/ copied, to be edited by a test; returns (base.yml, models folder)."""
    models = tmp_path / "configs" / "models"
    models.mkdir(parents=True)
    base = models.parent / "base.yml"
    base.write_text(BASE.read_text())
    (models / "tiny.yml").write_text("draft_vocab_size: 64\n")
    (models / "other.yml").write_text("learning_rate: 2e-4\nttt_length: 5\n")
    return base, models


def line_of(path, text):
    return path.read_text().splitlines().index(text) + 1


# ---------------------------------------------------------------------------------- types of text
@pytest.mark.parametrize(
    "text", ["on", "1:30", "007", "null", "~", "true", "3e-4", "a: b", " x ", '"q"', "0o17", "a#b"]
)
def test_text_stays_what_was_typed(text, monkeypatch):
    assert init(f"run_name={text}").run_name == text
    monkeypatch.setenv("M_RUN_NAME", text)
    assert init().run_name == text


@pytest.mark.parametrize("text", ["on", "1:30", "007", "null", "1_000", "3e-4"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_text_in_a_file_stays_what_was_typed_quoted_or_not(copy, text, quote):
    base, models = copy
    (models / "tiny.yml").write_text(f"chat_template: {quote}{text}{quote}\n")
    assert f"there is no file '{text}'" in error(base=base)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1", 1.0), (".5", 0.5), ("1E-2", 0.01), ("+2.", 2.0)]
)
def test_a_float_key_takes_every_spelling_of_a_number(text, value):
    learning_rate = init(f"learning_rate={text}").learning_rate
    assert learning_rate == value
    assert type(learning_rate) is float


def test_a_float_in_a_model_file_may_be_written_3e_4(copy):
    base, _ = copy
    text = "model_name=other target_path= grain_train_files=x"
    message = error(*text.split(), base=base)
    assert "learning_rate" not in message


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1_0", "0x1", "fast", "", "1:30"])
def test_a_float_key_refuses_what_is_no_finite_number(text):
    message = error(f"learning_rate={text}")
    assert "command line" in message
    assert "learning_rate" in message
    assert "3e-4" in message
    assert repr(text) in message


@pytest.mark.parametrize("text", ["1.5", "1_000", "0o17", "017", "1e3", "true", "", " 7", "١"])
def test_an_int_key_takes_plain_decimals_only(text):
    assert "ttt_length must be an integer" in error(f"ttt_length={text}")


def test_an_int_key_takes_signs():
    assert init("steps=+12").steps == 12
    assert init("steps=-1").steps == -1


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("TRUE", True), ("False", False), ("false", False)]
)
def test_a_bool_key_takes_true_and_false_in_any_case(text, value):
    assert init(f"enable_tensorboard={text}").enable_tensorboard is value


@pytest.mark.parametrize(
    ("text", "write"), [("yes", "true"), ("on", "true"), ("1", "true"), ("No", "false")]
)
def test_a_bool_key_refuses_other_words_and_says_what_to_write(text, write):
    message = error(f"abort_on_nan_loss={text}")
    assert "abort_on_nan_loss must be true or false" in message
    assert f"write {write}" in message


def test_lists_and_dicts_are_given_as_flow_text():
    config = init("target_layer_ids=[1, 13, 24]", "target_config={model_type: llama, eps: 1e-5}")
    assert config.target_layer_ids == (1, 13, 24)
    assert config.target_config == {"model_type": "llama", "eps": 1e-5}


@pytest.mark.parametrize(
    "argument",
    [
        "target_layer_ids=[1, two, 3]",
        "target_layer_ids=[1, 2.5, 3]",
        "target_layer_ids=[true, 2, 3]",
        "target_layer_ids=5",
        "target_layer_ids=",
        "mesh_axes=[data, 1]",
        "mesh_axes={data: 1}",
        "logical_axis_rules=[[draft_batch, data]]",
        "logical_axis_rules=[draft_batch]",
        "target_config=[1]",
        "target_config=llama",
    ],
)
def test_a_list_or_dict_of_the_wrong_shape_is_refused(argument):
    key = argument.split("=")[0]
    assert f"command line: {key} must be a" in error(argument)


def test_broken_flow_text_is_refused():
    assert "command line: target_layer_ids:1: not YAML" in error("target_layer_ids=[1, 2")


def test_a_wrong_type_in_a_file_names_file_and_line(copy):
    base, models = copy
    (models / "tiny.yml").write_text("# a comment\n\nttt_length: seven\nrun_checkpoint: [a]\n")
    message = error(base=base)
    assert (
        f"{models / 'tiny.yml'}:3: ttt_length must be an integer such as 8, not 'seven'" in message
    )
    assert f"{models / 'tiny.yml'}:4: run_checkpoint must be text" in message


def test_a_wrong_type_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("M_STEPS", "many")
    assert "environment M_STEPS: steps must be an integer" in error()


# ------------------------------------------------------------------------------------- precedence
def test_each_layer_overrides_the_one_before(copy, target, monkeypatch):
    base, _ = copy
    common = ["model_name=other", f"target_path={target}", "grain_train_files=x"]
    assert init(base=base).learning_rate == 1e-4
    assert init(*common, base=base).learning_rate == 2e-4
    monkeypatch.setenv("M_LEARNING_RATE", "3e-4")
    assert init(*common, base=base).learning_rate == 3e-4
    monkeypatch.delenv("M_LEARNING_RATE")
    assert init(*common, "learning_rate=4e-4", base=base).learning_rate == 4e-4


def test_the_environment_chooses_the_model(copy, target, monkeypatch):
    base, _ = copy
    for key, value in {"MODEL_NAME": "other", "TARGET_PATH": str(target)}.items():
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


# ------------------------------------------------------------------------ unknown keys and files
def test_an_unknown_key_on_the_command_line_offers_the_nearest():
    message = error("learnin_rate=1")
    assert message == "command line: unknown key 'learnin_rate'; did you mean 'learning_rate'?"
    assert "did you mean 'learning_rate'" in error("--learning_rate=1")


def test_an_unknown_key_in_a_file_names_file_and_line(copy):
    base, _ = copy
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


def test_a_base_file_that_lacks_keys_is_refused(copy):
    base, _ = copy
    base.write_text("steps: 3\n")
    assert "lacks model_name, run_name" in error(base=base)


def test_a_copy_of_base_yml_keeps_the_types_of_the_schema(copy):
    base, _ = copy
    base.write_text(base.read_text().replace("learning_rate: 1.0e-4", "learning_rate: 1"))
    assert type(init(base=base).learning_rate) is float


def test_an_unknown_model_lists_the_known_ones():
    message = error("model_name=llama3.1-8")
    assert "did you mean 'llama3.1-8b'?" in message
    assert all(name in message for name in MODELS)
    assert "there are: " in error("model_name=../base")


def test_a_target_without_a_model_file_has_the_defaults(target):
    assert "model_name=default its dimensions come from target_path" in error("model_name=qwen3-4b")
    config = init("model_name=default", f"target_path={target}", "grain_train_files=x")
    base = yaml.safe_load(BASE.read_text())
    changed = {key for key, value in config.as_dict().items() if value != base[key]}
    assert changed == {"model_name", "run_name", "target_path", "grain_train_files"}


def test_a_key_twice_in_a_file_is_an_error(copy):
    base, models = copy
    (models / "tiny.yml").write_text("steps: 1\n\nsteps: 1\n")
    assert f"{models / 'tiny.yml'}:3: steps is given twice" in error(base=base)
    assert "b is given twice" in error("target_config={b: 1, b: 2}")


@pytest.mark.parametrize(
    ("text", "line"), [("steps: 1\nadam_b1: [0.9\nttt_length: 3\n", 3), ("steps: 1\n\ta: 2\n", 2)]
)
def test_broken_yaml_names_file_and_line(copy, text, line):
    base, models = copy
    (models / "tiny.yml").write_text(text)
    assert f"{models / 'tiny.yml'}:{line}: not YAML" in error(base=base)


def test_a_file_that_is_no_mapping_is_refused(copy):
    base, models = copy
    (models / "tiny.yml").write_text("- steps\n")
    assert "expected lines of `key: value`" in error(base=base)
    (models / "tiny.yml").write_text("# nothing\n")
    assert init(base=base).ttt_length == 7


@pytest.mark.parametrize("key", ["model_name", "run_name", "target_path", "grain_train_files"])
def test_a_model_file_may_not_decide_for_a_run(copy, key):
    base, models = copy
    (models / "tiny.yml").write_text(f"{key}: x\n")
    assert f"{key} belongs to one run" in error(base=base)


# ----------------------------------------------------------------------- impossible combinations
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
    "target_layer_ids=[1,2]": "three different layers",
    "target_layer_ids=[1,1,2]": "three different layers",
    "target_layer_ids=[3,2,1]": "three different layers",
    "target_layer_ids=[-1,2,3]": "three different layers",
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
    "run_name=a\\b": "run_name must be the name of one folder",
    "base_output_directory=": "base_output_directory is empty",
    "base_output_directory=gs://bucket/runs": "mount a bucket with gcsfuse",
}


@pytest.mark.parametrize("arguments", IMPOSSIBLE)
def test_an_impossible_combination_stops_the_run(arguments):
    assert IMPOSSIBLE[arguments] in error(*arguments.split(" "))


def test_an_impossible_combination_says_where_its_keys_were_given(monkeypatch):
    monkeypatch.setenv("M_TTT_LENGTH", "300")
    message = error("max_target_length=256")
    assert "(max_target_length: command line; ttt_length: environment)" in message


def test_all_impossible_combinations_are_listed_at_once():
    message = error("dtype=half", "steps=0", "eval_fraction=0")
    assert all(
        part in message for part in ("dtype must be", "steps must be", "nothing is held out")
    )


def test_a_real_model_needs_a_target_and_data(target):
    message = error("model_name=qwen3-8b")
    assert "target_path is empty" in message
    assert "grain_train_files is empty" in message
    init("model_name=qwen3-8b", f"target_path={target}", "grain_train_files=x")


@pytest.mark.parametrize(
    "arguments",
    [
        "skip_jax_distributed_system=True",
        "distributed_coordinator=node0:8476 distributed_num_processes=2 distributed_process_id=1",
        "grain_eval_files=x eval_fraction=0",
        "target_layer_ids=[0,1,2]",
        "logical_axis_rules=[[draft_batch,[data,fsdp,expert,tensor]]]",
        "decode_temperature=0",
        "gradient_clipping_threshold=0",
        "mesh_axes=[tensor,data,fsdp,expert]",
    ],
)
def test_what_can_run_is_accepted(arguments):
    init(*arguments.split())


# ------------------------------------------------------------------------------------- the object
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


def test_folders_are_absolute_and_empty_ones_have_their_defaults(tmp_path, target, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = init("base_output_directory=~/out", "target_path=target")
    assert config.run_name == "tiny"
    assert config.run_directory == tmp_path / "out" / "tiny"
    assert config.target_directory == config.tokenizer_directory == target
    assert config.export_directory == config.run_directory / "export"
    assert config.tokenizer_path == ""
    assert init().target_directory is None
    assert init().tokenizer_directory is None
    assert init(f"tokenizer_path={target}").tokenizer_directory == target
    assert init("export_path=head").export_directory == tmp_path / "head"


# ---------------------------------------------------------------------------------- written, read
AWKWARD = (
    "{a: '3e-4', b: 3e-4, c: [on, '1:30', '007', null, 'null', true, 'true'], d: {e: 'é #: x'}}"
)


@pytest.mark.parametrize("run_name", ["on", "1:30", "007", "null", "é: #x", " a ", "two\nlines"])
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
def run(tmp_path, target):
    config = init(
        "model_name=qwen3-8b",
        "run_name=first",
        f"base_output_directory={tmp_path / 'runs'}",
        f"target_path={target}",
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


# --------------------------------------------------------------------------------- the files here
@pytest.mark.parametrize("name", MODELS)
def test_every_model_file_resolves(name, target):
    config = init(f"model_name={name}", f"target_path={target}", "grain_train_files=x")
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


# ------------------------------------------------------------------------------ logical axis rules
def test_a_logical_axis_rule_replaces_the_rule_of_its_name_only():
    before = dict(init().logical_axis_rules)
    after = dict(init("logical_axis_rules=[[target_mlp,[fsdp,tensor]]]").logical_axis_rules)
    assert after == before | {"target_mlp": ("fsdp", "tensor")}


def test_rules_of_a_model_file_and_the_command_line_are_merged(copy):
    base, models = copy
    (models / "tiny.yml").write_text(
        "logical_axis_rules: [[target_mlp, []], [target_vocab, [fsdp]]]\n"
    )
    rules = dict(init("logical_axis_rules=[[target_mlp,[tensor]]]", base=base).logical_axis_rules)
    expected = {"target_mlp": ("tensor",), "target_vocab": ("fsdp",)}
    assert rules == dict(init().logical_axis_rules) | expected
