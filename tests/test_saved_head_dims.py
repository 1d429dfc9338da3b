"""A checkpoint's identity gives back the head's dimensions, also one of former field names."""

import dataclasses
import json

from models import tiny_dims, tiny_head_dims

from MaxDraft.layers.rope import Rope
from MaxDraft.run.target import saved_head_dims

HEAD = tiny_head_dims(tiny_dims(), 8)


def test_saved_dims_become_the_same_dims():
    rope = Rope(1e4, 8, "longrope", 4.0, 64, attention_scaling=1.2, short_factor=(1.0, 1.5) * 2)
    dims = dataclasses.replace(HEAD, rope=rope)
    assert saved_head_dims(json.loads(json.dumps(dataclasses.asdict(dims)))) == dims


def test_a_rope_saved_under_former_names_is_read():
    former = {
        "theta": 5e5,
        "head_dim": 8,
        "kind": "yarn",
        "factor": 8.0,
        "original_length": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "cos_scale": 1.2,
        "factors": [],
        "interleaved": False,
    }
    saved = json.loads(json.dumps(dataclasses.asdict(HEAD))) | {"rope": former}
    assert saved_head_dims(saved).rope == Rope(
        5e5,
        8,
        "yarn",
        factor=8.0,
        original_max_position_embeddings=64,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        attention_scaling=1.2,
    )
    saved["rope"] = {"theta": 1e4, "head_dim": 8}  # before there were scalings
    assert saved_head_dims(saved).rope == Rope(1e4, 8)
