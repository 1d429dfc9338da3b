"""setup.sh: what it says where it cannot go on, and which device it sets up for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def setup(folder, **environment):
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", str(folder / "setup.sh")], env=kept | environment, capture_output=True, text=True
    )


def test_a_missing_interpreter_is_named_on_a_fresh_machine(tmp_path):
    ran = setup(tmp_path, PYTHON="no-such-python")
    assert ran.returncode == 2
    assert "there is no 'no-such-python'" in ran.stderr


def test_an_unknown_device_is_named(tmp_path):
    ran = setup(tmp_path, DEVICE="abacus")
    assert ran.returncode == 2
    assert "DEVICE=abacus is not known; use cpu, tpu or cuda" in ran.stderr


@pytest.mark.parametrize(("given", "device"), [({}, "tpu"), ({"DEVICE": "cpu"}, "cpu")])
def test_the_device_of_the_setup_before_stays(tmp_path, given, device):
    # An interpreter that is new enough and makes no environment: setup.sh stops there.
    fake = tmp_path / "python"
    fake.write_text(
        '#!/usr/bin/env bash\n[ "$1" = -c ] && exit 0\n[ "$1" = -V ] && exit 0\nexit 1\n'
    )
    fake.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "maxdraft-setup").write_text("tpu Python 3.11.7 ...\n")
    ran = setup(tmp_path, PYTHON=str(fake), **given)
    assert ran.returncode == 2
    assert f"installing into .venv for DEVICE={device}" in ran.stdout
