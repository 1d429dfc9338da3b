"""end_to_end/gpu_check.sh measures what is here, and a part that fails costs only itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"device", "equality", "step-64-blockwise", "step-128-blockwise", "largest_batch"}


@pytest.mark.slow
def test_a_cpu_runs_all_parts_with_small_dimensions(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHON": sys.executable,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = ["bash", str(ROOT / "end_to_end" / "gpu_check.sh"), str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failed"] == {}
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(result["parts"]) == PARTS

    comparisons = result["parts"]["equality"]["comparisons"]
    assert {one["implementation"] for one in comparisons} == {"xla", "tpu", "gpu"}
    assert all(one["equal"] for one in comparisons)
    for name in ("step-64-blockwise", "step-128-blockwise"):
        [step] = result["parts"][name]["settings"]
        assert step["tokens"] == 128
        assert step["matmul_peak"] > 0
        assert set(step["breakdown"]) == {"target", "rollout", "loss", "optimizer"}
    batch = result["parts"]["largest_batch"]
    assert 0 < batch["rows_run"] <= batch["rows_predicted"]
    printed = (tmp_path / "table.txt").read_text()
    assert printed in ran.stdout
    for words in ("largest batch", "NOT EQUAL", "FAILED"):
        assert (words in printed) == (words == "largest batch")


def test_a_failed_part_is_named_beside_the_others(tmp_path):
    (tmp_path / "device.json").write_text('{"platform": "cpu"}')
    (tmp_path / "device.exit").write_text("0\n")
    (tmp_path / "equality.exit").write_text("124\n")
    script = ROOT / "end_to_end" / "gpu_check.py"
    command = [sys.executable, str(script), "report", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 1
    assert "FAILED           equality: time limit; see " in ran.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["parts"]) == ["device"]
    assert list(result["failed"]) == ["equality"]
