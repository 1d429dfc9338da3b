"""--help says how a script is called, and what each key means; the exit status is 0."""

import subprocess
import sys

import pytest
import yaml
from config_helpers import BASE, ROOT

from MaxDraft import config_help, pyconfig
from MaxDraft.config_keys import KEYS

SCRIPTS = ["train.py", "evaluate.py", "export.py"]


def printed(capsys, *arguments):
    """What initialize prints for these arguments before it ends with status 0."""
    with pytest.raises(SystemExit) as end:
        pyconfig.initialize(["MaxDraft/train.py", *arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", ["--help", "-h", "help", f"{BASE} --help", f"{BASE} steps=1 -h"]
)
def test_help_says_how_to_call_the_script_and_names_every_key(arguments, capsys):
    text = printed(capsys, *arguments.split())
    assert text.startswith("usage: python3 MaxDraft/train.py configs/base.yml key=value ...")
    assert set(KEYS) <= set(text.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_an_entry_script_says_what_it_is_for(script):
    path = ROOT / "MaxDraft" / script
    purpose = path.read_text().split('"""')[1].splitlines()[0]
    assert f"\n\n{purpose}\n" in config_help.usage(str(path))


@pytest.mark.parametrize("key", KEYS)
def test_help_of_a_key_gives_its_default_and_comment(key):
    comment, section, default = config_help.documentation()[key]
    assert len(comment.split()) >= 2
    assert section
    assert yaml.safe_load(default) == yaml.safe_load(BASE.read_text())[key]
    text = config_help.describe(key)
    assert text.startswith(f"{key}: {default}\n")
    assert " ".join(comment.split()) in " ".join(text.split())


def test_help_of_a_key_says_what_it_may_hold(capsys):
    text = printed(capsys, "--help", "learning_rate")
    assert "number, above 0 and at most 100" in text
    assert "may change when a run is resumed    no" in text
    assert "M_LEARNING_RATE=VALUE" in text
    assert "one of adamw, muon" in printed(capsys, "--help=opt_type")
    assert "with lr_schedule_type=wsd only" in printed(capsys, "-h", "wsd_decay_steps_fraction")
    assert "may stand in a model file           no" in printed(capsys, "help", "--target_path")
    assert '["draft_vocab", ["tensor"]]' in printed(capsys, str(BASE), "-h", "logical_axis_rules")


@pytest.mark.parametrize(
    ("key", "hint"),
    [("learnin_rate", "did you mean 'learning_rate'"), ("optimizer", "is now opt_")],
)
def test_help_of_an_unknown_key_names_the_right_one(key, hint):
    with pytest.raises(pyconfig.ConfigError, match=hint):
        pyconfig.initialize(["train.py", "--help", key])


ALL_SCRIPTS = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help", "steps"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""


def test_help_may_be_cut_off_by_its_reader():
    code = "from MaxDraft import pyconfig; pyconfig.initialize(['train.py', '--help'])"
    script = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_of_an_entry_script_ends_with_status_0():
    scripts = [str(ROOT / "MaxDraft" / script) for script in SCRIPTS]
    command = [sys.executable, "-c", ALL_SCRIPTS, *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"{config_help.describe('steps')}\nstatus 0\n" * len(SCRIPTS)
