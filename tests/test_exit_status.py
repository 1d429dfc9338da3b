"""How entry scripts end: one line for what a user can mend, and an exit status that says what."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path
    for path in (ROOT / "MaxDraft").glob("*.py")
    if "run_main(main)" in path.read_text(encoding="utf-8")
)


def run_main(body, **options):
    """A process whose main() does `body`."""
    code = f"from MaxDraft.errors import *\nimport os, errno\ndef main(argv):\n    {body}\n"
    return subprocess.run(
        [sys.executable, "-c", code + "run_main(main)"],
        cwd=ROOT,
        text=True,
        timeout=60,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("return 0", 0, ""),
        ("return 42", 42, ""),
        ("raise UserError('give another name')", 2, "error: give another name"),
        ("open('/nowhere/x')", 2, "error: [Errno 2] No such file or directory: '/nowhere/x'"),
        ("raise OSError(errno.ENOSPC, 'No space', 'a')", 2, "error: [Errno 28] No space: 'a'"),
        ("raise KeyboardInterrupt", 130, "stopped by Ctrl-C"),
        ("raise KeyError('x')", 1, "Traceback"),
    ],
)
def test_the_exit_status_says_how_a_script_ended(body, status, line):
    ended = run_main(body)
    assert ended.returncode == status
    assert ended.stderr.strip().startswith(line)
    assert ("Traceback" in ended.stderr) == (status == 1)


def test_a_full_disk_is_told_with_what_to_do():
    assert "make room" in run_main("raise OSError(errno.ENOSPC, 'No space', 'a')").stderr


def test_a_reader_of_the_output_that_ends_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    ended = run_main("[print(i) for i in range(9999)]", stdout=write)
    os.close(write)
    assert ended.returncode == 141
    assert ended.stderr.strip().startswith("error: whatever read the output has ended")
    assert "Traceback" not in ended.stderr and "ignored" not in ended.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_importing_an_entry_script_changes_nothing(script):
    code = (
        "import signal, sys\n"
        "before = [*sys.path], signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
        f"import MaxDraft.{script.stem}\n"
        "after = [*sys.path], signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
        "assert before == after, (before, after)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGTERM, 42, "stopped by SIGTERM; the same command goes on"),
        (signal.SIGINT, 130, "stopped by Ctrl-C; the same command goes on"),
    ],
)
def test_a_signal_during_the_imports_ends_with_a_line(script, number, status, line):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", script, "configs/base.yml"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for text in process.stderr:
        if "jax" in text:  # the first of its many modules
            process.send_signal(number)
            break
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == status, printed
    assert line in printed.splitlines()
    assert "Traceback" not in printed
