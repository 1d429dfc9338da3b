"""Whole runs in processes of their own: what is written, and how mistakes are told."""

import json
import signal
import socket

import numpy as np
import pytest
from run_helpers import assert_same_bits
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow


def test_a_runs_folder_says_what_was_trained_and_how_well(whole):
    job, printed = whole
    assert job.config()["learning_rate"] == 0.003
    assert job.config()["target_path"] == str(job.target)
    summary = json.loads((job.run_folder / "data.json").read_text())
    assert summary["records_read"] == 60
    evaluation = json.loads((job.run_folder / "evaluation.json").read_text())
    assert evaluation["lossless"] is True
    assert evaluation["prompts"] == 3 == evaluation["settings"]["draft_steps"]
    assert len(evaluation["acc"]) == len(evaluation["cond_acc"]) == len(evaluation["alpha"]) == 3
    assert 1.0 <= evaluation["accept_length"] <= evaluation["accept_length_engine"]
    plain, drafted = (evaluation["tokens_per_second"][k] for k in ("plain", "speculative"))
    assert evaluation["speedup"] == pytest.approx(drafted / plain)
    assert (job.run_folder / "report.txt").read_text().strip() in printed
    assert set(load_file(job.run_folder / "export" / "model.safetensors")) >= {"fc.weight", "d2t"}
    assert "exported head checked" in printed


def test_every_step_is_logged_once(whole):
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


def test_a_loss_that_is_not_finite_stops_the_run(job):
    assert job.signal_after("step 6/24", signal.SIGTERM)[0] == 42
    last = job.checkpoints()[-1]
    # A target whose weights are finite, and whose logits overflow.
    tensors = load_file(job.target / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, job.target / "model.safetensors")
    printed = job.run(status=2, run_name="nan")
    assert "step 1: loss nan" in printed
    assert "learning_rate" in printed
    assert not (job.folder / "runs" / "nan" / "checkpoints" / "5").exists()
    assert job.checkpoints()[-1] == last


def test_a_stop_without_checkpoints_exits_with_130(job):
    status, printed = job.signal_after(
        "step 6/24", signal.SIGTERM, enable_checkpointing=False, checkpoint_period=500
    )
    assert status == 130, printed
    assert "enable_checkpointing=False: all lost" in printed


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


def test_an_eagle_3_1_head_is_trained_exported_and_read_again(job):
    flags = {"draft_fc_norm": True, "draft_norm_output": True}
    job.run(run_name="both", steps=2, **flags)
    exported = job.folder / "runs" / "both" / "export"
    config = json.loads((exported / "config.json").read_text())
    assert config["fc_norm"] is True and config["norm_output"] is True
    printed = job.run(run_name="again", steps=2, load_parameters_path=exported, **flags)
    assert f"warm start from {exported}" in printed
    printed = job.run(status=2, run_name="plain", steps=2, load_parameters_path=exported)
    assert "set draft_fc_norm=True" in printed and "set draft_norm_output=True" in printed


def test_an_output_folder_that_cannot_be_written_is_an_error(job):
    (job.folder / "file").write_text("")
    printed = job.run(status=2, base_output_directory=job.folder / "file")
    assert "cannot be written" in printed
    assert "Traceback" not in printed


def test_what_is_wrong_with_export_path_is_told_at_once(job):
    (job.folder / "file").write_text("")
    for path, told in ((job.target, "which no export wrote"), (job.folder / "file" / "x", "file")):
        printed = job.run(status=2, export_path=path)
        assert told in printed
        assert "another export_path" in printed
        assert "encoding" not in printed  # not even the data were read


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
