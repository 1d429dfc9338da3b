"""The frozen target: one pre-norm decoder whose switches (dims.py) make it every family.

    h = embed(x)
    for every layer:  h += mixer(norm(h));  h += feed_forward(norm(h))
    logits = head(norm(h))

Equal layers are stacked and scanned, as plan.py cuts them: after every captured layer, so that the
captured features are simply what comes out of the cuts. The weights are stored cut the same way: no
copy of a weight is made on the way in.

B batch, T sequence, H hidden size, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.layers.experts import mixture
from MaxDraft.layers.loops import counted_loop
from MaxDraft.layers.mlp import gated_mlp
from MaxDraft.layers.norms import rms_norm, soft_cap
from MaxDraft.layers.params import Tree
from MaxDraft.layers.rope import cos_sin
from MaxDraft.sharding import constrain, ways
from MaxDraft.targets.dims import MLA, Attention, DecoderDims, DeltaNet, Layer
from MaxDraft.targets.mixers import (
    Context,
    PackedContext,
    Rotary,
    attention,
    delta_net,
    mla,
)
from MaxDraft.targets.plan import runs


def decoder_layer(
    x: jax.Array,  # [B, T, H]
    w: Tree,
    layer: Layer,
    dims: DecoderDims,
    rotary: Rotary,
    context: Context,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """One layer -> [B, T, H], new cache."""

    def norm(y: jax.Array, name: str) -> jax.Array:
        return rms_norm(y, w[name], dims.norm_eps, dims.norm_offset)

    h = norm(x, "attention_norm")
    match layer.mixer:
        case Attention() as a:
            y, cache = attention(h, w, a, dims.norm_eps, dims.norm_offset, rotary, context, cache)
        case MLA() as a:
            y, cache = mla(h, w, a, rotary, context, cache)
        case DeltaNet() as a:
            y, cache = delta_net(h, w, a, dims.norm_eps, context, cache)
    x = x + (norm(y, "attention_post_norm") if layer.post_norms else y)

    h = norm(x, "mlp_norm")
    if "experts" in w:
        y = mixture(h, w["experts"], layer.feed_forward)
    else:
        y = gated_mlp(h, w["mlp"], layer.feed_forward.activation)
    x = x + (norm(y, "mlp_post_norm") if layer.post_norms else y)
    return constrain(x, "target_batch", None, None), cache


def embed(params: Tree, tokens: jax.Array, dtype: Any) -> jax.Array:
    """tokens int [B, T] -> [B, T, H], as the draft head reads them too: without `embed_scale`."""
    return params["embed"][tokens].astype(dtype)


def run_layers(
    params: Tree,
    embeddings: jax.Array,  # [B, T, H]
    dims: DecoderDims,
    capture: Sequence[int],
    context: Context,
    caches: Any = None,  # per run and place of its unit, stacked over the repeats
) -> tuple[jax.Array, jax.Array, Any]:
    """-> captured features [B, T, 3H], final normed state [B, T, H], new caches."""
    ropes = dict.fromkeys(getattr(layer.mixer, "rope", None) for layer in dims.layers)
    rotary = {
        rope: tuple(
            constrain(table, "target_batch", None, None)
            for table in cos_sin(rope, context.positions)
        )
        for rope in ropes
        if rope
    }
    plan = runs(dims.layers, tuple(capture))
    caches = caches if caches is not None else tuple((None,) * len(run.unit) for run in plan)

    x = embeddings * jnp.asarray(dims.embed_scale, embeddings.dtype)
    x = constrain(x, "target_batch", None, None)
    captured, new_caches = [], []
    for run, weights, cache in zip(plan, params["layers"], caches, strict=True):

        def unit(x, stacked, layers=run.unit):
            new = []
            for layer, w, layer_cache in zip(layers, *stacked, strict=True):
                x, layer_cache = decoder_layer(x, w, layer, dims, rotary, context, layer_cache)
                new.append(layer_cache)
            return x, tuple(new)

        x, cache = jax.lax.scan(unit, x, (weights, cache), length=run.repeats)
        new_caches.append(cache)
        if run.end - 1 in capture:
            captured.append(x)
    features = jnp.concatenate(captured, axis=-1)
    last = rms_norm(x, params["norm"], dims.norm_eps, dims.norm_offset)
    return features, last, tuple(new_caches)


def features(
    params: Tree,
    tokens: jax.Array,  # int [B, T]
    positions: jax.Array,  # int [B, T]
    segment_ids: jax.Array,  # int [B, T]
    dims: DecoderDims,
    capture: Sequence[int],
    dtype: Any,
    block: int,  # queries and keys attended at a time
    kernel: str = "xla",  # one of attention.IMPLEMENTATIONS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Packed documents -> embeddings [B, T, H], features [B, T, 3H], final state [B, T, H]."""
    embeddings = embed(params, tokens, dtype)
    context = PackedContext(positions, segment_ids, block, kernel)
    aux, last, _ = run_layers(params, embeddings, dims, capture, context)
    return embeddings, aux, last


def logits(params: Tree, dims: DecoderDims, last: jax.Array) -> jax.Array:
    """Final state [..., H] -> float32 logits [..., V]."""
    if "head" in params:
        equation, weight = "...h,hv->...v", params["head"]
    else:  # tied; the table is not turned around in memory
        equation, weight = "...h,vh->...v", params["embed"]
    weight = weight.astype(last.dtype)
    scores = jnp.einsum(equation, last, weight, preferred_element_type=jnp.float32)
    return soft_cap(scores, dims.logit_softcap)


def draft_head_weight(params: Tree, draft_to_target: jax.Array) -> jax.Array:
    """The LM head's columns of the draft vocabulary's tokens: [H, D]."""
    if "head" in params:
        return params["head"][:, draft_to_target]
    return params["embed"][draft_to_target].T


def full_vocabulary(
    params: Tree,
    dims: DecoderDims,
    last: jax.Array,  # [B, T, H] final states
    wanted: jax.Array,  # bool [B, T]
    block: int,
) -> tuple[jax.Array, jax.Array]:  # int32 [B, T], float32 [B, T]
    """The target's argmax over all V tokens, and log sum exp of its logits, where they are wanted.

    Zeros elsewhere. Wanted positions are put first; a device has the logits of about `block`
    positions at a time, shared out among its rows.
    """
    length = last.shape[1]
    block = min(max(block * ways("target_batch") // len(last), 1), length)
    order = jnp.argsort(~wanted, axis=1, stable=True)
    places = jnp.pad(order, ((0, 0), (0, -length % block)))
    blocks = places.shape[1] // block

    def of_block(i, found):
        here = jax.lax.dynamic_slice_in_dim(places, i * block, block, axis=1)
        states = jnp.take_along_axis(last, here[..., None], axis=1)
        scores = constrain(logits(params, dims, states), "target_batch", None, "target_vocab")
        most = scores.max(-1, keepdims=True)
        ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        new = (
            jnp.where(scores < most, ids[-1], ids).min(-1),  # the first of the greatest, or of NaN
            most[..., 0] + jnp.log(jnp.exp(scores - most).sum(-1)),
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, i * block, axis=1)
            for x, y in zip(found, new, strict=True)
        )

    nothing = jnp.zeros(places.shape, jnp.int32), jnp.zeros(places.shape, jnp.float32)
    used = -(-wanted.sum(1).max() // block)
    found = counted_loop("vocabulary_blocks", 0, used, of_block, nothing, expected_trips=blocks)
    back = jnp.argsort(order, axis=1)
    best, log_norm = (jnp.take_along_axis(x[:, :length], back, axis=1) for x in found)
    return jnp.where(wanted, best, 0), jnp.where(wanted, log_norm, 0.0)
