"""Whole runs in processes of their own: what is written, and that nothing is lost.

An interrupted run that is given the same command again ends with the same bits as one that was left
alone; whatever goes wrong ends with exit status 2 and a sentence, and the last checkpoint is whole.
"""

import json
import resource
import shutil
import signal
import socket

import numpy as np
import pytest
from run_helpers import Job, assert_same_bits, write_target
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps that nothing disturbed, and what it printed."""
    job = Job(tmp_path_factory.mktemp("whole"))
    return job, job.run()


@pytest.fixture
def job(whole, tmp_path):
    """A fresh job on the same target and data, with the programs compiled before."""
    for name in ("target", "data.jsonl", "jax-cache"):
        source = whole[0].folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    return Job(tmp_path)


def test_a_runs_folder_says_what_was_trained_on_what_with_which_result(whole):
    job, printed = whole
    assert job.config()["learning_rate"] == 0.003
    assert job.config()["target_path"] == str(job.target)
    summary = json.loads((job.run_folder / "data.json").read_text())
    assert summary["records_read"] == 60
    evaluation = json.loads((job.run_folder / "evaluation.json").read_text())
    assert evaluation["lossless"] is True
    assert evaluation["prompts"] == 3 == evaluation["settings"]["draft_steps"]
    assert len(evaluation["acc"]) == len(evaluation["cond_acc"]) == len(evaluation["alpha"]) == 3
    assert evaluation["accept_length"] >= 1.0
    plain, drafted = (evaluation["tokens_per_second"][k] for k in ("plain", "speculative"))
    assert evaluation["speedup"] == pytest.approx(drafted / plain)
    assert (job.run_folder / "report.txt").read_text().strip() in printed
    assert set(load_file(job.run_folder / "export" / "model.safetensors")) >= {"fc.weight", "d2t"}
    assert "exported head checked" in printed


def test_every_step_is_logged_once_and_evaluations_at_their_interval(whole):
    records = [
        json.loads(line)
        for line in (whole[0].run_folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records if r["split"] == "train"] == list(range(1, 25))
    assert [r["step"] for r in records if r["split"] == "eval"] == [10, 20, 24]
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_the_latest_two_and_the_best_checkpoint_are_kept(whole):
    job, _ = whole
    records = [
        json.loads(line) for line in (job.run_folder / "metrics.jsonl").read_text().splitlines()
    ]
    evaluated = {r["step"]: r["loss"] for r in records if r["split"] == "eval"}
    best = min(evaluated, key=evaluated.get)
    assert job.checkpoints() == sorted({20, 24, best})


def test_giving_the_command_of_a_finished_run_again_trains_nothing(whole):
    job, _ = whole
    before = job.saved(24)
    printed = job.run()
    assert "resuming after step 24 of 24" in printed
    assert "step 24/24" not in printed
    assert_same_bits(job.saved(24), before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_saves_exits_42_and_ends_with_the_same_bits(whole, job, number):
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


def test_a_run_killed_at_any_moment_starts_again_and_ends_with_the_same_bits(whole, job):
    # While encoding, before the first checkpoint, while one may be under way, late.
    for line in ("data: encoding", "step 2/24", "step 5/24", "step 6/24", "step 17/24"):
        status, printed = job.signal_after(line, signal.SIGKILL)
        assert status == -signal.SIGKILL, printed
    printed = job.run()
    assert "resuming after step 15 of 24" in printed  # at most a checkpoint period is lost
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


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_taken(whole, job):
    assert job.signal_after("step 12/24", signal.SIGTERM)[0] == 42
    latest, before = job.checkpoints()[-1], job.checkpoints()[-2]
    damaged = job.run_folder / "checkpoints" / str(latest) / "params"
    for file in damaged.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    printed = job.run()
    assert f"checkpoint {latest} is damaged" in printed
    assert f"resuming after step {before} of 24" in printed
    assert (job.run_folder / f"damaged-checkpoint-{latest}").is_dir()
    assert_same_bits(job.saved(24), whole[0].saved(24))


def test_another_configuration_in_the_runs_folder_is_an_error_that_says_what_differs(job):
    assert job.signal_after("step 6/24", signal.SIGTERM)[0] == 42
    saved = job.checkpoints()
    printed = job.run(status=2, learning_rate=0.1, ttt_length=2)
    assert "learning_rate: run has 0.003, now 0.1" in printed
    assert "ttt_length: run has 3, now 2" in printed
    assert "another run_name" in printed
    assert job.checkpoints() == saved
    assert job.config()["learning_rate"] == 0.003


def test_another_target_in_the_runs_folder_is_an_error(job):
    assert job.signal_after("step 6/24", signal.SIGTERM)[0] == 42
    write_target(job.target, seed=1)
    printed = job.run(status=2)
    assert "target: run has" in printed
    job.run_with(
        "evaluate.py", [f"base_output_directory={job.folder / 'runs'}", "run_name=r"], status=2
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(job):
    assert job.signal_after("step 6/24", signal.SIGTERM)[0] == 42
    last = job.checkpoints()[-1]
    # A target with a weight that is not a number.
    tensors = load_file(job.target / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = np.nan
    save_file(tensors, job.target / "model.safetensors")
    printed = job.run(status=2, run_name="nan")
    assert "step 1: loss nan" in printed
    assert "learning_rate" in printed
    assert not (job.folder / "runs" / "nan" / "checkpoints" / "5").exists()
    assert job.checkpoints()[-1] == last


def test_a_checkpoint_that_does_not_fit_the_disk_is_an_error_and_the_run_goes_on_later(whole, job):
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
    printed = job.run()
    assert "resuming after step 5 of 24" in printed
    assert_same_bits(job.saved(24), whole[0].saved(24))


def test_evaluate_and_export_need_only_the_runs_folder(whole):
    job, _ = whole
    place = [f"base_output_directory={job.folder / 'runs'}", "run_name=r"]
    printed = job.run_with("evaluate.py", [*place, "decode_draft_steps=2"])
    assert "lossless           true" in printed
    evaluation = json.loads((job.run_folder / "evaluation.json").read_text())
    assert evaluation["settings"]["draft_steps"] == 2
    printed = job.run_with("export.py", [*place, f"export_path={job.folder / 'elsewhere'}"])
    assert "exported head checked" in printed
    tensors = load_file(job.folder / "elsewhere" / "model.safetensors")
    assert_same_bits(tensors, load_file(job.run_folder / "export" / "model.safetensors"))


def test_an_exported_head_is_a_warm_start(whole, job):
    exported = whole[0].run_folder / "export"
    printed = job.run(load_parameters_path=exported, run_name="warm", steps=2)
    assert f"warm start from {exported}" in printed
    cold = json.loads((whole[0].run_folder / "metrics.jsonl").read_text().splitlines()[0])
    warm = json.loads((job.folder / "runs" / "warm" / "metrics.jsonl").read_text().splitlines()[0])
    assert warm["loss"] < cold["loss"]


def test_an_output_folder_that_cannot_be_written_is_an_error(job):
    (job.folder / "file").write_text("")
    printed = job.run(status=2, base_output_directory=job.folder / "file")
    assert "cannot be written" in printed
    assert "Traceback" not in printed


def test_two_processes_take_the_same_steps_as_one(whole, job):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    half = {
        "per_device_batch_size": 4,
        "distributed_coordinator": f"127.0.0.1:{port}",
        "distributed_num_processes": 2,
        "decode_num_prompts": 1,  # every token is many small exchanges between the two
        "decode_max_new_tokens": 2,
    }
    processes = [job.start(distributed_process_id=i, **half) for i in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    found = job.saved(24)
    for name, value in whole[0].saved(24).items():
        difference = np.abs(found[name].astype(np.float64) - value).max()
        assert difference <= 1e-3 * max(np.abs(value).max(), 1e-3), name
