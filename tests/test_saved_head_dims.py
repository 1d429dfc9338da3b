"""A checkpoint's identity gives back the head's dimensions, also one of former field names."""

import dataclasses
import json

from models import tiny_dims, tiny_head_dims

from MaxDraft.drafts import registry
from MaxDraft.drafts.eagle3.dims import dims_from_json
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.layers.rope import Rope

HEAD = tiny_head_dims(tiny_dims(), 8)


def test_saved_dims_become_the_same_dims():
    rope = Rope(1e4, 8, "longrope", 4.0, 64, attention_scaling=1.2, short_factor=(1.0, 1.5) * 2)
    dims = dataclasses.replace(HEAD, rope=rope)
    assert dims_from_json(json.loads(json.dumps(dataclasses.asdict(dims)))) == dims


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
    assert dims_from_json(saved).rope == Rope(
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
    assert dims_from_json(saved).rope == Rope(1e4, 8)


def test_a_run_from_before_drafters_had_kinds_is_eagle3():
    now = registry.identity(Eagle3(HEAD))
    before = {"target": "t", "head": {k: v for k, v in now["head"].items() if "norm_" not in k}}
    before["head"] |= {"norm_eps": HEAD.norm_eps}
    del before["head"]["fc_norm"]
    assert registry.from_identity(before) == Eagle3(HEAD)
    assert registry.upgraded(before) == {"target": "t", **now}
