"""Blockwise attention with an online softmax as Pallas kernels for TPU.

    forward     for every block of queries, over the blocks of keys that it sees
    backward    the same for the gradient to q; then for every block of keys, over the blocks of
                queries, the gradients to k and v, added in place to what is there already

attention_xla.py has the equations and computes the same. Scores exist in VMEM alone. Which blocks
of keys a block of queries sees is read from scalar memory (attention_tpu_blocks.py): other blocks
are neither fetched nor computed, and the grid ends with the longest interval.

The algorithm is FlashAttention's (Dao et al. 2022), with one backward kernel for queries and one
for keys as in jax's splash attention. Splash attention fixes its mask when a kernel is built; here
the mask is two numbers a query that are known only when the batch is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from MaxDraft.layers.attention_keys import INITIAL_MAXIMUM, KeyValueBlocks, Scoring, softcap_slope
from MaxDraft.layers.experimental.attention_tpu_blocks import (
    LANES,
    SUBLANES,
    QueryBlocks,
    product,
    product_transposed,
)


def forward(
    q: jax.Array,  # [B, R, N, d]
    keys: KeyValueBlocks,
    first: jax.Array,  # int [B, R]
    last: jax.Array,  # int [B, R]
    scoring: Scoring,
    *,
    interpret: bool = False,  # the kernel runs as jax operations on any device, for tests
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, R, N, dv], logsumexp float32 [B, R, N]; see attention.interval_attention."""
    blocks = QueryBlocks.from_arrays(q, keys, first, last, scoring, interpret)
    d, dv = q.shape[-1], keys.v.shape[-1]

    def kernel(start, stop, q, k, v, first, last, out, logsumexp, maximum, total, sums):
        b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def begin():
            maximum[...] = jnp.full_like(maximum, INITIAL_MAXIMUM)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        @pl.when(start[b, i] + j < stop[b, i])
        def add_keys():
            scores = blocks.scores(q, k, start[b, i] + j, first[:, :1], last[:, :1], 1)
            new_maximum = jnp.maximum(maximum[:, :1], scores.max(1, keepdims=True))
            weights = jnp.exp(scores - new_maximum)
            rescale = jnp.exp(maximum[:, :1] - new_maximum)
            total[...] = total[...] * rescale + weights.sum(1, keepdims=True)
            sums[...] = sums[...] * rescale + product(weights.astype(v.dtype), v[...])
            maximum[...] = jnp.broadcast_to(new_maximum, maximum.shape)

        @pl.when(j == pl.num_programs(3) - 1)
        def end():  # a query that sees no key gets out 0 and a logsumexp far below any score
            nonzero = jnp.maximum(total[...], 1e-37)
            out[...] = (sums[...] / nonzero[:, :1]).astype(out.dtype)
            logsumexp[...] = maximum[...] + jnp.log(nonzero)

    out, logsumexp = blocks.call_over_keys(
        kernel,
        inputs=[
            (blocks.split(q), blocks.query_spec(d)),
            (keys.k, blocks.key_spec(d)),
            (keys.v, blocks.key_spec(dv)),
            *blocks.bounds,
        ],
        outputs=[
            (blocks.query_shape(dv, keys.v.dtype), blocks.query_spec(dv)),
            (blocks.query_shape(LANES, jnp.float32), blocks.query_spec(LANES)),
        ],
        scratch=[(blocks.length, LANES), (blocks.length, LANES), (blocks.length, dv)],
    )
    return blocks.merge(out), blocks.merge(logsumexp[..., :1])[..., 0]


def backward(
    q,
    keys: KeyValueBlocks,
    first,
    last,
    out,
    logsumexp,
    d_out,
    d_logsumexp,
    d_keys: KeyValueBlocks,
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KeyValueBlocks]:
    """-> gradient to q; d_keys, to which the gradients to keys and values are added."""
    blocks = QueryBlocks.from_arrays(q, keys, first, last, scoring, interpret)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_logsumexp
    saved = _Saved(
        blocks.split(q),
        blocks.split(d_out),
        blocks.split(logsumexp[..., None])[..., 0],
        blocks.split(delta[..., None])[..., 0],
    )
    d_q = _query_gradient(blocks, saved)
    return blocks.merge(d_q), _key_gradients(blocks, saved, d_keys)


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward kernels read of every query."""

    q: jax.Array  # [B, M, I, r, d]
    d_out: jax.Array  # [B, M, I, r, dv]
    logsumexp: jax.Array  # float32 [B, M, I, r]
    delta: jax.Array  # float32 [B, M, I, r]


def _query_gradient(blocks: QueryBlocks, saved: _Saved) -> jax.Array:
    """-> [B, M, I, r, d]"""
    keys, d, dv = blocks.keys, saved.q.shape[-1], saved.d_out.shape[-1]

    def kernel(start, stop, q, d_out, k, v, first, last, logsumexp, delta, d_q, sums):
        b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def begin():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(start[b, i] + j < stop[b, i])
        def add_keys():
            scores = blocks.scores(q, k, start[b, i] + j, first[:, :1], last[:, :1], 1)
            d_weights = product_transposed(d_out[...], v[...])
            weights = jnp.exp(scores - logsumexp[:, :1])
            d_scores = _d_scores(blocks, scores, weights, d_weights, delta[:, :1])
            sums[...] += product(d_scores.astype(q.dtype), k[...])

        @pl.when(j == pl.num_programs(3) - 1)
        def end():
            d_q[...] = sums[...].astype(d_q.dtype)

    numbers = (saved.logsumexp, saved.delta)
    [d_q] = blocks.call_over_keys(
        kernel,
        inputs=[
            (saved.q, blocks.query_spec(d)),
            (saved.d_out, blocks.query_spec(dv)),
            (keys.k, blocks.key_spec(d)),
            (keys.v, blocks.key_spec(dv)),
            *blocks.bounds,
            *((blocks.columns(x), blocks.query_spec(LANES)) for x in numbers),
        ],
        outputs=[(blocks.query_shape(d, saved.q.dtype), blocks.query_spec(d))],
        scratch=[(blocks.length, d)],
    )
    return d_q


def _key_gradients(blocks: QueryBlocks, saved: _Saved, d_keys: KeyValueBlocks) -> KeyValueBlocks:
    """-> d_keys with the gradients of these queries added, for every block of keys they see."""
    keys, d, dv = blocks.keys, saved.q.shape[-1], saved.d_out.shape[-1]

    def kernel(
        start, stop, low, high,
        q, d_out, k, v, first, last, logsumexp, delta, k_before, v_before, d_k, d_v, k_sum, v_sum,
    ):  # fmt: skip
        b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        block = low[b] + j

        @pl.when(i == 0)
        def begin():
            k_sum[...], v_sum[...] = k_before[...], v_before[...]

        @pl.when((block < high[b]) & (start[b, i] <= block) & (block < stop[b, i]))
        def add_queries():
            scores = blocks.scores(k, q, block, first[:1], last[:1], 0)
            d_weights = product_transposed(v[...], d_out[...])
            weights = jnp.exp(scores - logsumexp[:1])
            d_scores = _d_scores(blocks, scores, weights, d_weights, delta[:1])
            v_sum[...] += product(weights.astype(d_out.dtype), d_out[...])
            k_sum[...] += product(d_scores.astype(q.dtype), q[...])

        # After the last block the index map stays at that block, whose sum is written already.
        @pl.when((i == pl.num_programs(3) - 1) & ((block < high[b]) | (j == 0)))
        def end():
            d_k[...], d_v[...] = k_sum[...], v_sum[...]

    line = (SUBLANES, blocks.length)
    numbers = (saved.logsumexp, saved.delta)
    d_k, d_v = blocks.call_over_queries(
        kernel,
        inputs=[
            (saved.q, _queries_inner(blocks.length, d)),
            (saved.d_out, _queries_inner(blocks.length, dv)),
            (keys.k, blocks.outer_key_spec(d)),
            (keys.v, blocks.outer_key_spec(dv)),
            (blocks.lines(blocks.first), _bounds_inner(*line)),
            (blocks.lines(blocks.last), _bounds_inner(*line)),
            *((blocks.lines(x), _queries_inner(*line)) for x in numbers),
            (d_keys.k, blocks.outer_key_spec(d)),
            (d_keys.v, blocks.outer_key_spec(dv)),
        ],
        outputs=[(d_keys.k, blocks.outer_key_spec(d)), (d_keys.v, blocks.outer_key_spec(dv))],
        scratch=[(keys.block, d), (keys.block, dv)],
        aliases={12: 0, 13: 1},  # behind four arrays of scalars: d_keys, written in place
    )
    return dataclasses.replace(d_keys, k=d_k, v=d_v)


def _d_scores(blocks: QueryBlocks, scores, weights, d_weights, delta) -> jax.Array:
    """The gradient to q k^T, float32."""
    d_scores = weights * (d_weights - delta) * blocks.scale
    if blocks.scoring.softcap:
        d_scores = d_scores * softcap_slope(scores, blocks.scoring.softcap)
    return d_scores


def _queries_inner(*block: int) -> pl.BlockSpec:
    """Blocks of queries as the innermost dimension of the grid."""
    return pl.BlockSpec((None, None, None, *block), lambda b, m, j, i, *_: (b, m, i, 0, 0))


def _bounds_inner(*block: int) -> pl.BlockSpec:
    """The same for the intervals, which all heads share."""
    return pl.BlockSpec((None, None, *block), lambda b, m, j, i, *_: (b, i, 0, 0))
