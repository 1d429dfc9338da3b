"""Loading a target holds one layer's part twice at most, and every process reads its own part."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "end_to_end" / "loading_memory.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script changes it
    spec = importlib.util.spec_from_file_location("loading_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_processes_read_their_part_in_pieces_below_a_layer(script, tmp_path):
    config = script.CONFIG | {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
    }
    script.write_checkpoint(tmp_path, config)
    whole, layer = script.sizes(config)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > whole
    (one,) = script.run(tmp_path, 1)
    assert one["bytes_read"] == one["parameters"] == whole
    # The embedding is 34 MB, a layer's experts 19 MB a matrix.
    assert one["largest_piece"] <= 16 << 20 < layer
    for axis in ("fsdp", "expert", "tensor"):
        for found in script.run(tmp_path, 2, axis):
            assert whole / 2 <= found["bytes_read"] < whole / 2 * 1.01  # norms, routers are whole
            assert found["bytes_read"] == found["parameters"]
            assert found["from_disk"] < whole / 2 * 1.05
            assert found["largest_piece"] <= layer
