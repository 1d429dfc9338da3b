"""Random targets, on which end_to_end/test_families.sh runs, are files as people have them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from MaxDraft.convert.target.checkpoint import (
    load_target,
    open_weights,
    read_config,
    unused_tensors,
)
from MaxDraft.convert.target.quantized_params import keep_quantized
from MaxDraft.drafts.eagle3.dims import default_captured_layers
from MaxDraft.layers.params import Quantized
from MaxDraft.random_target.configs import CONFIGS
from MaxDraft.random_target.files import write, write_weights
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.table import decoder_params

ROOT = Path(__file__).resolve().parent.parent
QUANTIZED = {"deepseek_v3", "gpt_oss"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write(CONFIGS[family], tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def table_of(folder):
    dims = dims_from_config(read_config(folder))
    return decoder_params(dims, default_captured_layers(dims.num_layers), jnp.float32)


def unquantized(family, folder):
    config = CONFIGS[family]
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    write_weights(plain, folder)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_of_the_files_is_read_and_finite(folder, family):
    table = table_of(folder(family))
    loaded = load_target(folder(family), table)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(loaded))
    left = unused_tensors(folder(family), table)
    assert [line for line in left if "only the language model" not in line] == []


@pytest.mark.parametrize("family", sorted(QUANTIZED))
def test_quantized_files_can_be_kept_as_they_are(folder, family):
    kept = keep_quantized(table_of(folder(family)), open_weights(folder(family)))
    nodes = jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, Quantized))
    assert any(isinstance(node, Quantized) for node in nodes)


@pytest.mark.parametrize("family", sorted(QUANTIZED))
def test_quantized_files_name_the_matrices_of_unquantized_ones(folder, family, tmp_path):
    with safe_open(unquantized(family, tmp_path) / "model.safetensors", "numpy") as file:
        expected = set(file.keys())
    with safe_open(folder(family) / "model.safetensors", "numpy") as file:
        names = set(file.keys())
    assert names != expected
    assert {re.sub("(_scale_inv|_blocks|_scales)$", "", name) for name in names} == expected


# Quantized numbers are compared in test_quantization.py; here the names are.
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_finds_every_tensor_it_wants_and_no_other(folder, family, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = unquantized(family, tmp_path) if family in QUANTIZED else folder(family)
    model, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert {key: list(value) for key, value in found.items() if value} == {}
    assert AutoTokenizer.from_pretrained(folder(family)).chat_template
    with torch.no_grad():
        logits = model(torch.arange(40)[None]).logits
    assert np.isfinite(logits.numpy()).all()


def test_the_script_takes_a_family_or_the_config_of_another(tmp_path):
    config = {**CONFIGS["qwen3_moe"], "vocab_size": 7, "num_hidden_layers": 7, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = [sys.executable, str(ROOT / "end_to_end" / "make_target.py")]
    subprocess.run([*script, str(tmp_path / "config.json"), str(tmp_path)], check=True)
    written = read_config(tmp_path / "target")
    assert written == {**config, "vocab_size": CONFIGS["qwen3_moe"]["vocab_size"]}
    embed = load_target(tmp_path / "target", table_of(tmp_path / "target"))["embed"]
    assert embed.shape == (written["vocab_size"], written["hidden_size"])
    assert (tmp_path / "conversations.jsonl").read_text().startswith('{"messages": ')
    for arguments in ([], ["mamba", str(tmp_path)]):
        result = subprocess.run([*script, *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        assert "usage: make_target.py FAMILY FOLDER" in result.stdout
