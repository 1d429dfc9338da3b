"""The frozen target: one pre-norm decoder whose switches (dims.py) make it every family.

    h = embed(x)
    for every layer:  h += mixer(norm(h));  h += feed_forward(norm(h))
    logits = head(norm(h))

Equal layers are stacked and scanned in the groups of plan.py, which end after every captured layer:
the hidden states that the draft head reads are what comes out of these scans. The weights are
stored in the same groups, so that no copy of a weight is made on the way in.

B batch, T sequence, H hidden size, C captured layers, V vocabulary, D draft vocabulary.
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
from MaxDraft.sharding import constrain, num_shards
from MaxDraft.targets.dims import MLA, Attention, DecoderDims, DeltaNet, Layer
from MaxDraft.targets.mixers import (
    Context,
    PackedContext,
    Rotary,
    attention,
    delta_net,
    mla,
)
from MaxDraft.targets.plan import layer_groups


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
    """tokens int [B, T] -> [B, T, H] without `embed_scale`: so the draft head reads them."""
    return params["embed"][tokens].astype(dtype)


def run_layers(
    params: Tree,
    embeddings: jax.Array,  # [B, T, H]
    dims: DecoderDims,
    captured_layers: Sequence[int],
    context: Context,
    caches: Any = None,  # per layer group and place of its unit, stacked over the repeats
) -> tuple[jax.Array, jax.Array, Any]:
    """-> aux_hidden_states [B, T, C * H], last_hidden_state (normalized) [B, T, H], new caches."""
    ropes = dict.fromkeys(getattr(layer.mixer, "rope", None) for layer in dims.layers)
    rotary = {
        rope: tuple(
            constrain(table, "target_batch", None, None)
            for table in cos_sin(rope, context.positions)
        )
        for rope in ropes
        if rope
    }
    groups = layer_groups(dims.layers, tuple(captured_layers))
    caches = caches if caches is not None else tuple((None,) * len(group.unit) for group in groups)

    x = embeddings * jnp.asarray(dims.embed_scale, embeddings.dtype)
    x = constrain(x, "target_batch", None, None)
    captured, new_caches = [], []
    for group, weights, cache in zip(groups, params["layers"], caches, strict=True):

        def unit(x, stacked, layers=group.unit):
            new = []
            for layer, w, layer_cache in zip(layers, *stacked, strict=True):
                x, layer_cache = decoder_layer(x, w, layer, dims, rotary, context, layer_cache)
                new.append(layer_cache)
            return x, tuple(new)

        x, cache = jax.lax.scan(unit, x, (weights, cache), length=group.repeats)
        new_caches.append(cache)
        if group.end - 1 in captured_layers:
            captured.append(x)
    aux_hidden_states = jnp.concatenate(captured, axis=-1)
    last_hidden_state = rms_norm(x, params["norm"], dims.norm_eps, dims.norm_offset)
    return aux_hidden_states, last_hidden_state, tuple(new_caches)


def forward(
    params: Tree,
    tokens: jax.Array,  # int [B, T]
    positions: jax.Array,  # int [B, T]
    segment_ids: jax.Array,  # int [B, T]
    dims: DecoderDims,
    captured_layers: Sequence[int],
    dtype: Any,
    block: int,  # queries and keys attended at a time
    kernel: str = "xla",  # a key of attention.IMPLEMENTATIONS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Packed documents -> embeddings [B, T, H], aux_hidden_states [B, T, C * H],
    last_hidden_state [B, T, H].
    """
    embeddings = embed(params, tokens, dtype)
    context = PackedContext(positions, segment_ids, block, kernel)
    aux_hidden_states, last_hidden_state, _ = run_layers(
        params, embeddings, dims, captured_layers, context
    )
    return embeddings, aux_hidden_states, last_hidden_state


def logits(params: Tree, dims: DecoderDims, last_hidden_state: jax.Array) -> jax.Array:
    """last_hidden_state [..., H] -> float32 logits [..., V]."""
    if "head" in params:
        equation, weight = "...h,hv->...v", params["head"]
    else:  # tied: the embedding is not transposed in memory
        equation, weight = "...h,vh->...v", params["embed"]
    weight = weight.astype(last_hidden_state.dtype)
    scores = jnp.einsum(equation, last_hidden_state, weight, preferred_element_type=jnp.float32)
    return soft_cap(scores, dims.logit_softcap)


def teacher_lm_head(params: Tree, draft_to_target: jax.Array) -> jax.Array:
    """The columns of the target's LM head for the draft vocabulary's tokens int [D]: [H, D]."""
    if "head" in params:
        return params["head"][:, draft_to_target]
    return params["embed"][draft_to_target].T


def teacher_argmax_and_logsumexp(
    params: Tree,
    dims: DecoderDims,
    last_hidden_state: jax.Array,  # [B, T, H]
    mask: jax.Array,  # bool [B, T]
    block: int,
) -> tuple[jax.Array, jax.Array]:  # int32 [B, T], float32 [B, T]
    """The target's argmax over all V tokens and log sum exp of its logits, zero outside the mask.

    The masked positions of a row are put first. A device has the logits of about `block` positions
    at a time, shared out among its rows, and stops where no row has masked positions left.
    """
    length = last_hidden_state.shape[1]
    block = min(max(block * num_shards("target_batch") // len(last_hidden_state), 1), length)
    order = jnp.argsort(~mask, axis=1, stable=True)
    places = jnp.pad(order, ((0, 0), (0, -length % block)))
    blocks = places.shape[1] // block

    def one_block(i, results):
        block_places = jax.lax.dynamic_slice_in_dim(places, i * block, block, axis=1)
        states = jnp.take_along_axis(last_hidden_state, block_places[..., None], axis=1)
        scores = constrain(logits(params, dims, states), "target_batch", None, "target_vocab")
        maximum = scores.max(-1, keepdims=True)
        ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        block_results = (
            # The first of the greatest, and a token of the vocabulary also where all are NaN.
            jnp.where(scores < maximum, ids[-1], ids).min(-1),
            maximum[..., 0] + jnp.log(jnp.exp(scores - maximum).sum(-1)),
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, i * block, axis=1)
            for x, y in zip(results, block_results, strict=True)
        )

    zeros = jnp.zeros(places.shape, jnp.int32), jnp.zeros(places.shape, jnp.float32)
    used = -(-mask.sum(1).max() // block)
    results = counted_loop("vocabulary_blocks", 0, used, one_block, zeros, expected_trips=blocks)
    inverse = jnp.argsort(order, axis=1)
    best, logsumexp = (jnp.take_along_axis(x[:, :length], inverse, axis=1) for x in results)
    return jnp.where(mask, best, 0), jnp.where(mask, logsumexp, 0.0)
