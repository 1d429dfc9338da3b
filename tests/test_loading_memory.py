"""Loading a target reads every process' own part only, in pieces far below a layer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "end_to_end" / "loading_memory.py"


@pytest.mark.slow
def test_processes_read_their_part_in_pieces_below_a_layer(tmp_path):
    file = tmp_path / "numbers.json"
    command = [sys.executable, str(SCRIPT), "--gigabytes=0", "--hidden-size=512", f"--json={file}"]
    # The exit status is of bounds on memory, which hold where a layer is larger than the noise.
    result = subprocess.run(command, capture_output=True, text=True)
    assert file.exists(), result.stderr
    numbers = json.loads(file.read_text())
    whole, layer = numbers["checkpoint"], numbers["largest_layer"]
    one, *shared = numbers["results"]
    assert one["bytes_read"] == one["parameters"] == whole
    # The embedding is 34 MB, a layer's experts 19 MB a matrix.
    assert one["largest_piece"] <= 16 << 20 < layer
    assert [report["axis"] for report in shared] == [
        *["fsdp"] * 2,
        *["expert"] * 2,
        *["tensor"] * 2,
    ]
    for report in shared:
        assert whole / 2 <= report["bytes_read"] < whole / 2 * 1.01  # norms, routers are whole
        assert report["bytes_read"] == report["parameters"]
        assert report["from_disk"] < whole / 2 * 1.05
        assert report["largest_piece"] <= layer
