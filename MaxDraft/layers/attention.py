"""Attention: blockwise over queries for training, over a cache for decoding.

B batch, T sequence, N query heads, M key/value heads, G = N / M, d head size, J own keys.

Training needs one shape only (the rollout of drafts/rollout.py, and with J = 0 the target):
row i attends under ONE softmax to
    the shared keys j <= i of its own document, and
    its own J keys (one for each earlier step of the rollout).
Scores exist for one block of queries at a time, [B, N, block, T], and the backward pass makes them
again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.layers.blocks import merge_length, split_length
from MaxDraft.layers.norms import soft_cap

MASKED = -1e30  # finite, so that a row without any key stays free of NaN


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How queries score keys, where it is not q k / sqrt(d) over everything before them."""

    scale: float | None = None  # None: d ** -0.5
    softcap: float = 0.0  # 0: none
    window: int = 0  # a query sees itself and window - 1 keys before it; 0: all
    chunk: int = 0  # a query sees its own chunk of this many positions; 0: all


PLAIN = Scoring()


def packed_attention(
    q: jax.Array,  # [B, T, N, d]
    k: jax.Array,  # [B, T, M, d]
    v: jax.Array,  # [B, T, M, d]
    segment_ids: jax.Array,  # [B, T] documents packed into the row
    block: int,
    own_k: jax.Array | None = None,  # [B, T, J, M, d]
    own_v: jax.Array | None = None,
    *,
    scoring: Scoring = PLAIN,
    positions: jax.Array | None = None,  # int [B, T] inside each document; needed for chunks
    sinks: jax.Array | None = None,  # [N] scores that take a share of the softmax and give nothing
) -> jax.Array:  # [B, T, N, d of v]
    """Causal attention inside each document, plus every row's own keys, under one softmax.

    Softmax in float32. Memory grows with block * T, for any T and block.
    """
    if scoring.chunk:  # a chunk of a document is to attention a document of its own
        segment_ids = segment_ids * q.shape[1] + positions // scoring.chunk
    length, num_heads, head_dim = q.shape[1:]
    grouped = q.reshape(*q.shape[:2], k.shape[2], num_heads // k.shape[2], head_dim)
    rows = jnp.broadcast_to(jnp.arange(length), segment_ids.shape)
    queries = [grouped, segment_ids, rows]
    if own_k is not None:
        queries += [own_k, own_v]

    @jax.checkpoint
    def attend(args):
        q_blk, q_segments, q_rows, *own = args
        scores = _scores("bqmgd,bkmd->bmgqk", q_blk, k, scoring)
        behind = q_rows[:, :, None] - rows[:, None, :]
        visible = (q_segments[:, :, None] == segment_ids[:, None, :]) & (behind >= 0)
        if scoring.window:
            visible &= behind < scoring.window
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        if own:
            own_scores = _scores("bqmgd,bqjmd->bmgqj", q_blk, own[0], scoring)
            scores = jnp.concatenate([scores, own_scores], -1)
        weights = _softmax(scores, sinks).astype(v.dtype)
        out = jnp.einsum("bmgqk,bkmd->bqmgd", weights[..., :length], v)
        if own:
            out += jnp.einsum("bmgqj,bqjmd->bqmgd", weights[..., length:], own[1])
        return out

    out = jax.lax.map(attend, tuple(split_length(x, block) for x in queries))
    return merge_length(out, length).reshape(*q.shape[:-1], v.shape[-1])


def cached_attention(
    q: jax.Array,  # [B, S, N, d]
    k_cache: jax.Array,  # [B, C, M, d]
    v_cache: jax.Array,  # [B, C, M, d]
    slots: jax.Array,  # [B, S] the cache slot of each query; it sees all slots up to its own
    *,
    scoring: Scoring = PLAIN,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:  # [B, S, N, d of v]
    """Attention over a KV cache whose slot s holds the token at position s."""
    grouped = q.reshape(*q.shape[:2], k_cache.shape[2], -1, q.shape[-1])
    scores = _scores("bqmgd,bkmd->bmgqk", grouped, k_cache, scoring)
    keys = jnp.arange(k_cache.shape[1])
    behind = slots[:, :, None] - keys
    visible = behind >= 0
    if scoring.window:
        visible &= behind < scoring.window
    if scoring.chunk:
        visible &= slots[:, :, None] // scoring.chunk == keys // scoring.chunk
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = _softmax(scores, sinks).astype(v_cache.dtype)
    out = jnp.einsum("bmgqk,bkmd->bqmgd", weights, v_cache)
    return out.reshape(*q.shape[:-1], v_cache.shape[-1])


def _scores(equation: str, q: jax.Array, k: jax.Array, scoring: Scoring) -> jax.Array:
    """q k * scale in float32, capped."""
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    return soft_cap(scores * scale, scoring.softcap)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Softmax of float32 [B, M, G, Q, K] over the last axis, to which sinks [N] add their share."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
    column = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1]
