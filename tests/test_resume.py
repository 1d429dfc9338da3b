"""Interrupted runs, in processes of their own: nothing is lost, and not one bit is different.

An interrupted run that is given the same command again ends with the same bits as one that was left
alone; what it cannot go on from ends with exit status 2 and a sentence that says why.
"""

import json
import re
import resource
import signal

import numpy as np
import pytest
from run_helpers import Job, assert_same_bits, write_target

pytestmark = pytest.mark.slow


def test_the_command_of_a_finished_run_trains_nothing(whole):
    job, _ = whole
    before = job.saved(24)
    printed = job.run()
    assert "resuming after step 24 of 24" in printed
    assert "step 24/24" not in printed
    assert_same_bits(job.saved(24), before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_with_the_same_bits(whole, job, number):
    status, printed = job.signal_after("step 7/24", number)
    assert status == 42, printed
    assert "the same command goes on" in printed
    stopped_at = job.checkpoints()[-1]
    assert 7 <= stopped_at < 24
    printed = job.run()
    assert f"resuming after step {stopped_at} of 24" in printed
    assert_same_bits(job.saved(24), whole[0].saved(24))
    steps = [
        json.loads(line)["step"]
        for line in (job.run_folder / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert steps == list(range(1, 25))


def test_a_killed_run_goes_on_with_the_same_bits(whole, job):
    # While encoding, before the first checkpoint, while one may be under way, late.
    for line in ("data: encoding", "step 2/24", "step 5/24", "step 6/24", "step 21/24"):
        status, printed = job.signal_after(line, signal.SIGKILL)
        assert status == -signal.SIGKILL, printed
    printed = job.run()
    # The checkpoint of step 20 is written while the steps go on and may not be whole yet; that of
    # step 15 is, since a save waits for the one before it.
    resumed = re.search(r"resuming after step (\d+) of 24", printed)
    assert resumed and int(resumed[1]) in (15, 20), printed
    assert_same_bits(job.saved(24), whole[0].saved(24))


def test_a_run_goes_on_on_another_mesh(whole, job):
    assert job.signal_after("step 7/24", signal.SIGTERM)[0] == 42
    elsewhere = Job(job.folder, devices=4)
    elsewhere.run(ici_fsdp_parallelism=2, ici_tensor_parallelism=2)
    for name, value in whole[0].saved(24).items():
        if np.issubdtype(value.dtype, np.floating):
            # Another order of summation, then Adam: equal up to rounding, step after step.
            difference = np.abs(elsewhere.saved(24)[name] - value).max()
            assert difference <= 1e-3 * max(np.abs(value).max(), 1e-3), name
        else:
            np.testing.assert_array_equal(elsewhere.saved(24)[name], value)


def test_one_flipped_bit_takes_the_checkpoint_before(whole, job):
    assert job.signal_after("step 12/24", signal.SIGTERM)[0] == 42
    latest, before = job.checkpoints()[-1], job.checkpoints()[-2]
    files = (job.run_folder / "checkpoints" / str(latest) / "params").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1  # the only trace of it is its checksum
    largest.write_bytes(bytes(content))
    printed = job.run()
    assert f"checkpoint {latest} is damaged" in printed
    assert f"resuming after step {before} of 24" in printed
    assert (job.run_folder / f"damaged-checkpoint-{latest}").is_dir()
    assert_same_bits(job.saved(24), whole[0].saved(24))


def test_metrics_cut_short_do_not_stop_the_run(whole, job):
    assert job.signal_after("step 12/24", signal.SIGTERM)[0] == 42
    metrics = job.run_folder / "checkpoints" / "10" / "metrics" / "metrics"
    metrics.write_bytes(metrics.read_bytes()[:20])
    printed = job.run()
    assert "checkpoint 10 is damaged" in printed
    assert (job.run_folder / "damaged-checkpoint-10").is_dir()
    assert_same_bits(job.saved(24), whole[0].saved(24))


def test_another_configuration_is_an_error_that_names_it(job):
    assert job.signal_after("step 6/24", signal.SIGTERM)[0] == 42
    saved = job.checkpoints()
    printed = job.run(status=2, learning_rate=0.1, ttt_length=2)
    assert "learning_rate: run has 0.003, now 0.1" in printed
    assert "ttt_length: run has 3, now 2" in printed
    assert "another run_name" in printed
    assert job.checkpoints() == saved
    assert job.config()["learning_rate"] == 0.003


def test_another_target_is_an_error(job):
    assert job.signal_after("step 6/24", signal.SIGTERM)[0] == 42
    write_target(job.target, seed=1)
    printed = job.run(status=2)
    assert "was begun with another target" in printed
    job.run_with(
        "evaluate.py", [f"base_output_directory={job.folder / 'runs'}", "run_name=r"], status=2
    )


def test_a_full_disk_is_an_error_and_the_run_goes_on_later(whole, job):
    process = job.start()
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 6/24"):
            # From here on no file may grow beyond 30 KiB, and a checkpoint's do.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30 << 10, 30 << 10))
            break
    printed = "".join(printed) + process.communicate()[0]
    assert process.returncode == 2, printed
    assert "could not be written" in printed
    assert "Traceback" not in printed
    printed = job.run()
    assert "resuming after step 5 of 24" in printed
    assert_same_bits(job.saved(24), whole[0].saved(24))
