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

import jax
import jax.numpy as jnp

from MaxDraft.layers.blocks import merge_length, split_length

MASKED = -1e30  # finite, so that a row without any key stays free of NaN


def packed_attention(
    q: jax.Array,  # [B, T, N, d]
    k: jax.Array,  # [B, T, M, d]
    v: jax.Array,  # [B, T, M, d]
    segment_ids: jax.Array,  # [B, T] documents packed into the row
    block: int,
    own_k: jax.Array | None = None,  # [B, T, J, M, d]
    own_v: jax.Array | None = None,
) -> jax.Array:  # [B, T, N, d]
    """Causal attention inside each document, plus every row's own keys, under one softmax.

    Softmax in float32. Memory grows with block * T, for any T and block.
    """
    length, num_heads, head_dim = q.shape[1:]
    grouped = q.reshape(*q.shape[:2], k.shape[2], num_heads // k.shape[2], head_dim)
    rows = jnp.broadcast_to(jnp.arange(length), segment_ids.shape)
    queries = [grouped, segment_ids, rows]
    if own_k is not None:
        queries += [own_k, own_v]

    @jax.checkpoint
    def attend(args):
        q_blk, q_segments, q_rows, *own = args
        scores = _scores("bqmgd,bkmd->bmgqk", q_blk, k)
        visible = (q_segments[:, :, None] == segment_ids[:, None, :]) & (
            q_rows[:, :, None] >= rows[:, None, :]
        )
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        if own:
            scores = jnp.concatenate([scores, _scores("bqmgd,bqjmd->bmgqj", q_blk, own[0])], -1)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bmgqk,bkmd->bqmgd", weights[..., :length], v)
        if own:
            out += jnp.einsum("bmgqj,bqjmd->bqmgd", weights[..., length:], own[1])
        return out

    out = jax.lax.map(attend, tuple(split_length(x, block) for x in queries))
    return merge_length(out, length).reshape(q.shape)


def cached_attention(
    q: jax.Array,  # [B, S, N, d]
    k_cache: jax.Array,  # [B, C, M, d]
    v_cache: jax.Array,  # [B, C, M, d]
    slots: jax.Array,  # [B, S] the cache slot of each query; it sees all slots up to its own
) -> jax.Array:  # [B, S, N, d]
    """Attention over a KV cache whose slot s holds the token at position s."""
    grouped = q.reshape(*q.shape[:2], k_cache.shape[2], -1, q.shape[-1])
    scores = _scores("bqmgd,bkmd->bmgqk", grouped, k_cache)
    visible = slots[:, :, None] >= jnp.arange(k_cache.shape[1])
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_cache.dtype)
    return jnp.einsum("bmgqk,bkmd->bqmgd", weights, v_cache).reshape(q.shape)


def _scores(equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """q k / sqrt(d) in float32."""
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    return scores * (q.shape[-1] ** -0.5)
