"""Exported heads for tests, and ways in which a folder can be damaged."""

import dataclasses
import json

import jax
import models
import numpy as np
from safetensors.numpy import load_file, save_file

from MaxDraft.convert.heads.export import export_head
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.rope import Rope

V, D = 50, 20
IDS = np.sort(np.random.default_rng(5).choice(V, D, replace=False)).astype(np.int32)
CAPTURED_LAYERS = (1, 7, 12)  # the default layers of a target with 16
ROPES = {
    "default": Rope(theta=500000.0, rotary_dim=8),
    "linear": Rope(theta=10000.0, rotary_dim=8, rope_type="linear", factor=4.0),
    "llama3": Rope(
        theta=500000.0,
        rotary_dim=8,
        rope_type="llama3",
        factor=32.0,
        original_max_position_embeddings=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "yarn": Rope(
        theta=1e6,
        rotary_dim=8,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        attention_scaling=0.1 * float(np.log(4.0)) + 1.0,
    ),
    "yarn, every field": Rope(
        theta=1e6,
        rotary_dim=8,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        attention_scaling=1.25,
    ),
}
TARGET_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "vocab_size": V,
    "num_hidden_layers": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": False,
}


def head_dims(rope=ROPES["llama3"], **changes):
    dims = models.tiny_head_dims(models.tiny_dims(V), D)
    return dataclasses.replace(dims, rope=rope, **changes)


def vocabulary():
    return DraftVocabulary(IDS, V)


def exported(folder, rope=ROPES["llama3"], seed=1, *, flags=(), **options):
    """-> (folder, params, drafter) of an export of a random head; flags: those of EAGLE-3.1."""
    drafter = Eagle3(head_dims(rope, **dict.fromkeys(flags, True)))
    params = jax.tree.map(np.asarray, models.random_head(drafter.dims, seed))
    # Norm weights away from 1, so that a wrong norm shows.
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda w: w if w.ndim > 1 else rng.uniform(0.5, 1.5, w.shape).astype(np.float32), params
    )
    captured_layers = options.pop("captured_layers", CAPTURED_LAYERS)
    config = options.pop("config", TARGET_CONFIG)
    path = export_head(
        folder, params, drafter, vocabulary(), config, captured_layers, "tiny", **options
    )
    return path, params, drafter


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE)


def transpose(tensors, name="midlayer.self_attn.o_proj.weight"):
    tensors[name] = tensors[name].T  # square: it still loads


def swap_halves(tensors):
    for part in "qkv":
        name = f"midlayer.self_attn.{part}_proj.weight"
        tensors[name] = np.concatenate([tensors[name][:, 32:], tensors[name][:, :32]], 1)


def swap_norms(tensors):
    a, b = "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def reverse_features(tensors):
    fc = tensors["fc.weight"]
    tensors["fc.weight"] = np.concatenate([fc[:, 64:], fc[:, 32:64], fc[:, :32]], 1)


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def absolute_ids(tensors):
    tensors["d2t"] = tensors["d2t"] + np.arange(D)


def shift_t2d(tensors):
    tensors["t2d"] = np.roll(tensors["t2d"], 1)
