"""A head is plain grouped-query attention and an MLP, whatever its target is made of."""

import dataclasses

import pytest
from goldens import recipe

from MaxDraft.layers.expert_products import Experts
from MaxDraft.layers.rope import Rope
from MaxDraft.layers.router import Router
from MaxDraft.targets.dims import (
    MLA,
    Attention,
    DecoderDims,
    DeltaNet,
    Layer,
    Mlp,
    TargetError,
)
from MaxDraft.targets.draft_shape import draft_shape
from MaxDraft.targets.registry import dims_from_config

ROPE = Rope(theta=10000.0, rotary_dim=128)
YARN = Rope(
    5e5, 128, "yarn", factor=8.0, original_max_position_embeddings=4096, attention_scaling=1.2
)
GQA = Attention(32, 8, 128, ROPE)


def target(*layers, hidden_size=4096):
    return DecoderDims(1000, hidden_size, 1e-6, 4096, layers)


def test_a_dense_target_gives_its_heads_width_and_rope():
    shape = draft_shape(target(Layer(dataclasses.replace(GQA, rope=YARN), Mlp(14336))))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (32, 8, 128)
    assert shape.intermediate_size == 14336
    assert shape.rope == YARN


def test_mla_becomes_heads_of_128_that_fill_the_hidden_size():
    latent = MLA(128, 1536, 512, 128, 64, 128, ROPE, 1.0)
    shape = draft_shape(target(Layer(latent, Mlp(18432)), hidden_size=7168))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (56, 8, 128)
    shape = draft_shape(target(Layer(latent, Mlp(18432)), hidden_size=128 * 20))
    assert (shape.num_heads, shape.num_kv_heads) == (20, 5)


def test_experts_give_the_width_a_token_passes_through():
    moe = Experts(128, 768, Router(8))
    assert draft_shape(target(Layer(GQA, moe))).intermediate_size == 8 * 768
    shared = dataclasses.replace(moe, shared_intermediate_size=1000)
    assert draft_shape(target(Layer(GQA, shared))).intermediate_size == 8 * 768 + 1000
    wide = Experts(64, 14336, Router(4))
    assert draft_shape(target(Layer(GQA, wide))).intermediate_size == 6 * 4096
    # A dense layer says what width the model's makers think right.
    mixed = target(Layer(GQA, moe), Layer(GQA, Mlp(6144)))
    assert draft_shape(mixed).intermediate_size == 6144


def test_no_head_has_a_single_key_head():
    one = dataclasses.replace(GQA, num_kv_heads=1)
    assert draft_shape(target(Layer(one, Mlp(64)))).num_kv_heads == 2


def test_the_rope_is_one_that_engines_read_in_a_llama():
    def rope_for(*ropes, windows=None):
        windows = windows or [0] * len(ropes)
        layers = [
            Layer(dataclasses.replace(GQA, rope=rope, window=window), Mlp(64))
            for rope, window in zip(ropes, windows, strict=True)
        ]
        return draft_shape(target(*layers)).rope

    partial = dataclasses.replace(ROPE, rotary_dim=64, interleaved=True)
    assert rope_for(partial) == ROPE  # all of a head, in the rotate-half layout
    mscale = dataclasses.replace(
        YARN, attention_scaling=1.0
    )  # DeepSeek: the scores are scaled instead
    assert rope_for(mscale) == Rope(5e5, 128)
    between = dataclasses.replace(YARN, truncate=False)  # gpt-oss
    assert rope_for(between) == Rope(5e5, 128)
    longrope = Rope(1e4, 128, "longrope", short_factor=(1.0,) * 64, attention_scaling=1.2)
    assert rope_for(longrope) == ROPE
    # The layers that see everything decide; layers without positions cannot.
    wide = dataclasses.replace(ROPE, theta=1e6)
    assert rope_for(ROPE, wide, windows=[512, 0]) == wide
    assert rope_for(None, ROPE) == ROPE


def test_a_target_without_heads_or_rope_is_an_error():
    nope = Layer(dataclasses.replace(GQA, rope=None), Mlp(64))
    with pytest.raises(TargetError, match="rotary embedding"):
        draft_shape(target(nope))
    delta = Layer(DeltaNet(2, 4, 8, 8, 4, True), Mlp(64))
    with pytest.raises(TargetError, match="attention"):
        draft_shape(target(delta))


def test_every_golden_family_has_a_head():
    for config in recipe.CONFIGS.values():
        shape = draft_shape(dims_from_config(config))
        assert shape.num_heads % shape.num_kv_heads == 0
        assert shape.num_kv_heads >= 2
        assert shape.rope.rotary_dim == shape.head_dim


def test_heads_that_cannot_be_rotated_are_an_error():
    latent = MLA(4, 0, 8, 8, 4, 8, ROPE, 1.0)
    for hidden_size in (1, 3, 7):
        with pytest.raises(TargetError, match=f"hidden_size {hidden_size} is too small"):
            draft_shape(target(Layer(latent, Mlp(64)), hidden_size=hidden_size))
    odd = dataclasses.replace(GQA, head_dim=15, rope=dataclasses.replace(ROPE, rotary_dim=6))
    with pytest.raises(TargetError, match="15 dimensions cannot be rotated"):
        draft_shape(target(Layer(odd, Mlp(64))))
