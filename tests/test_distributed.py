"""Processes of one run on this machine: one that is missing or ends is told at once by the others.

The processes of these tests do nothing but wait for each other in collectives.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, time
from MaxDraft import distributed, errors

def main(argv):
    process, number, port, timeout, end = (int(text) for text in argv[1:])
    distributed.TIMEOUT = timeout
    distributed.start(f"127.0.0.1:{port}", number, process, automatic=True)
    print("joined", flush=True)
    for step in range(300):
        distributed.any_process(False)
        time.sleep(0.1)
        if step == end:
            return 0
        if step == -end:
            raise errors.UserError("the data is missing") if process else KeyError("defect")
    return 0

errors.run_main(main)
"""


def start(process, port, number=2, timeout=60, end=300):
    arguments = [str(value) for value in (process, number, port, timeout, end)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def read_until(process, line):
    for text in process.stdout:
        if text.startswith(line):
            return
    raise AssertionError(f"{line!r} was never printed")


def finish(process):
    """-> exit status, output, seconds until it ended."""
    began = time.monotonic()
    printed = process.communicate(timeout=120)[0]
    return process.returncode, printed, time.monotonic() - began


def errors_in(printed):
    return re.findall(r"^error: (.*)$", printed, re.MULTILINE)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_jax_distributed_is_touched_by_one_module_only():
    for path in sorted((ROOT / "MaxDraft").rglob("*.py")):
        if path.name != "distributed.py":
            text = path.read_text(encoding="utf-8")
            assert "multihost_utils" not in text and "jax.distributed" not in text, path


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line(port, killed):
    processes = [start(0, port), start(1, port)]
    for process in processes:
        read_until(process, "joined")
    os.kill(processes[killed].pid, signal.SIGKILL)
    status, printed, seconds = finish(processes[1 - killed])
    finish(processes[killed])
    assert status == 42, printed  # the launcher starts all of them again
    assert seconds < 30
    (error,) = errors_in(printed)
    assert error.startswith(f"process {killed} of this run has ended: it was killed")
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_tells_the_others_why(port, failing):
    ends = [300, 300]
    ends[failing] = -10
    processes = [start(i, port, end=ends[i]) for i in range(2)]
    outcomes = [finish(process) for process in processes]
    status = 2 if failing else 1
    reason = "the data is missing" if failing else "KeyError: 'defect'"
    assert [outcome[0] for outcome in outcomes] == [status, status], outcomes
    (error,) = errors_in(outcomes[1 - failing][1])
    assert error.startswith(f"process {failing} of this run has ended: {reason}")
    assert outcomes[1 - failing][2] < 30
    assert "Traceback" not in outcomes[1 - failing][1]


@pytest.mark.slow
def test_processes_that_are_done_end_quietly(port):
    outcomes = [finish(process) for process in [start(i, port, end=5) for i in range(2)]]
    assert [outcome[0] for outcome in outcomes] == [0, 0], outcomes
    assert not [errors_in(outcome[1]) for outcome in outcomes if errors_in(outcome[1])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "number", "told"),
    [
        (0, 2, "process 1 has not come"),
        (0, 4, "one of processes 1 to 3 has not come"),
        (1, 2, "process 0 does not answer"),
    ],
)
def test_a_missing_process_is_told_in_time(port, process, number, told):
    status, printed, seconds = finish(start(process, port, number, timeout=5))
    assert status == 42, printed
    assert f"process {process} of {number}: waiting for the others at 127.0.0.1:{port}" in printed
    (error,) = errors_in(printed)
    assert error.startswith(told)
    assert f"127.0.0.1:{port}" in error
    assert seconds < 30
    assert "Check failure" not in printed


@pytest.mark.slow
def test_a_process_number_outside_the_run_is_an_error(port):
    status, printed, _ = finish(start(2, port, 2))
    assert status == 2
    assert errors_in(printed)[0].startswith("distributed_process_id=2 is not among")
