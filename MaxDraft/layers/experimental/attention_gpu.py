"""Blockwise attention with an online softmax as Pallas kernels for GPU, by Triton.

    forward     for every block of queries and head, over the blocks of keys that it sees
    backward    the same for the gradient to q; then for every block of keys, over the blocks of
                queries that see some of it, the gradients to k and v, added to what is there

attention_xla.py has the equations and computes the same. Scores exist in registers alone. The
algorithm is FlashAttention's (Dao et al. 2022, and 2023 for the order of the loops).

cuDNN's kernels are not used: their masks are those of whole packed rows, and their backward pass
writes a gradient of all keys at every call. Here any set of queries attends, each to an interval of
keys, and their gradients are added in place.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from MaxDraft.layers.attention_keys import (
    INITIAL_MAXIMUM,
    KeyValueBlocks,
    Scoring,
    pad_to_multiple,
    softcap_slope,
)
from MaxDraft.layers.experimental.attention_gpu_blocks import QueryBlocks, product
from MaxDraft.layers.loops import counted_loop


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
    b, wide, wide_v = blocks.size, blocks.k.shape[-1], blocks.v.shape[-1]

    def kernel(q, k, v, first, last, out, logsumexp):
        q, first, last = q[...], first[...], last[...]

        def add_keys(j, carry):
            maximum, total, sums = carry
            block = pl.ds(j * blocks.key_block, blocks.key_block)
            scores = blocks.scores(q, k[block, :], j, first, last)
            new_maximum = jnp.maximum(maximum, scores.max(1))
            weights = jnp.exp(scores - new_maximum[:, None])
            rescale = jnp.exp(maximum - new_maximum)
            added = product(weights.astype(v.dtype), v[block, :])
            total = total * rescale + weights.sum(1)
            return new_maximum, total, sums * rescale[:, None] + added

        maximum, total, sums = blocks.loop_over_keys(
            first,
            last,
            add_keys,
            (
                jnp.full((b,), INITIAL_MAXIMUM, jnp.float32),
                jnp.zeros((b,), jnp.float32),
                jnp.zeros((b, wide_v), jnp.float32),
            ),
        )
        # A query that sees no key gets out 0 and a logsumexp far below any score.
        total = jnp.maximum(total, 1e-37)
        out[...] = (sums / total[:, None]).astype(out.dtype)
        logsumexp[...] = maximum + jnp.log(total)

    out, logsumexp = blocks.call_over_queries(
        kernel,
        inputs=[
            (blocks.split(q, wide), blocks.query_spec(wide)),
            (blocks.k, blocks.all_keys_spec(wide)),
            (blocks.v, blocks.all_keys_spec(wide_v)),
            *blocks.bounds,
        ],
        outputs=[
            (blocks.query_shape(wide_v, dtype=keys.v.dtype), blocks.query_spec(wide_v)),
            (blocks.query_shape(dtype=jnp.float32), blocks.query_spec()),
        ],
    )
    logsumexp = blocks.merge(logsumexp[..., None], 1)[..., 0]
    return blocks.merge(out, keys.v.shape[-1]), logsumexp


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
        blocks.split(q, blocks.k.shape[-1]),
        blocks.split(d_out, blocks.v.shape[-1]),
        blocks.split(logsumexp[..., None], 1)[..., 0],
        blocks.split(delta[..., None], 1)[..., 0],
    )
    d_q = blocks.merge(_query_gradient(blocks, saved), q.shape[-1])
    return d_q, _key_gradients(blocks, saved, d_keys)


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward kernels read of every query."""

    q: jax.Array  # [B, N, R', d']
    d_out: jax.Array  # [B, N, R', dv']
    logsumexp: jax.Array  # float32 [B, N, R']
    delta: jax.Array  # float32 [B, N, R']


def _query_gradient(blocks: QueryBlocks, saved: _Saved) -> jax.Array:
    """-> [B, N, R', d']"""
    b, c = blocks.size, blocks.key_block
    wide, wide_v = blocks.k.shape[-1], blocks.v.shape[-1]

    def kernel(q, d_out, k, v, first, last, logsumexp, delta, d_q):
        q, d_out, first, last = q[...], d_out[...], first[...], last[...]
        logsumexp, delta = logsumexp[...], delta[...]

        def add_keys(j, sums):
            block = pl.ds(j * c, c)
            scores = blocks.scores(q, k[block, :], j, first, last)
            _, d_scores = _weights(blocks, scores, d_out, v[block, :], logsumexp, delta)
            return sums + product(d_scores.astype(q.dtype), k[block, :])

        sums = blocks.loop_over_keys(first, last, add_keys, jnp.zeros((b, wide), jnp.float32))
        d_q[...] = sums.astype(d_q.dtype)

    [d_q] = blocks.call_over_queries(
        kernel,
        inputs=[
            (saved.q, blocks.query_spec(wide)),
            (saved.d_out, blocks.query_spec(wide_v)),
            (blocks.k, blocks.all_keys_spec(wide)),
            (blocks.v, blocks.all_keys_spec(wide_v)),
            *blocks.bounds,
            *((x, blocks.query_spec()) for x in (saved.logsumexp, saved.delta)),
        ],
        outputs=[(blocks.query_shape(wide, dtype=saved.q.dtype), blocks.query_spec(wide))],
    )
    return d_q


def _key_gradients(blocks: QueryBlocks, saved: _Saved, d_keys: KeyValueBlocks) -> KeyValueBlocks:
    """-> d_keys with the gradients of these queries added, for every block of keys they see."""
    b, group = blocks.size, blocks.group
    wide, wide_v = blocks.k.shape[-1], blocks.v.shape[-1]

    def kernel(
        low, high, q, d_out, k, v, first, last, logsumexp, delta, k_before, v_before, d_k, d_v
    ):
        j, start, stop = pl.program_id(0), low[...], high[...]

        def add_queries(k, v, t, carry):  # t numbers blocks of queries and, inside them, heads
            k_sum, v_sum = carry
            g, block = jax.lax.rem(t, group), pl.ds(jax.lax.div(t, group) * b, b)
            scores = blocks.scores(q[g, block, :], k, j, first[block], last[block])
            numbers = logsumexp[g, block], delta[g, block]
            weights, d_scores = _weights(blocks, scores, d_out[g, block, :], v, *numbers)
            d_scores = d_scores.astype(q.dtype)
            return (
                k_sum + product(d_scores, q[g, block, :], contracted=(0, 0)),
                v_sum + product(weights, d_out[g, block, :], contracted=(0, 0)),
            )

        @pl.when(start < stop)  # the gradients of keys that no query sees stay as they are
        def add():
            body = functools.partial(add_queries, k[...], v[...])
            bounds, expected = (start * group, stop * group), blocks.expected_query_blocks
            sums = (k_before[...], v_before[...])
            sums = counted_loop("attention_query_blocks", *bounds, body, sums, expected)
            d_k[...], d_v[...] = sums

    low, high = blocks.queries_of_keys()
    before = [pad_to_multiple(x, 3, w) for x, w in ((d_keys.k, wide), (d_keys.v, wide_v))]
    key_specs = [blocks.key_spec(wide), blocks.key_spec(wide_v)]
    d_k, d_v = blocks.call_over_keys(
        kernel,
        inputs=[
            *blocks.key_bounds(low, high),
            (saved.q, blocks.group_spec(wide)),
            (saved.d_out, blocks.group_spec(wide_v)),
            *zip((blocks.k, blocks.v), key_specs, strict=True),
            *blocks.all_bounds,
            *((x, blocks.group_spec()) for x in (saved.logsumexp, saved.delta)),
            *zip(before, key_specs, strict=True),
        ],
        outputs=list(zip(before, key_specs, strict=True)),
        aliases={10: 0, 11: 1},  # d_keys, written in place
    )
    d_k, d_v = d_k[..., : d_keys.k.shape[-1]], d_v[..., : d_keys.v.shape[-1]]
    return dataclasses.replace(d_keys, k=d_k, v=d_v)


def _weights(blocks: QueryBlocks, scores, d_out, v, logsumexp, delta):
    """-> the softmax's weights in d_out's dtype, and the gradient to q k^T in float32."""
    weights = jnp.exp(scores - logsumexp[:, None])
    d_weights = product(d_out, v, contracted=(1, 1))
    d_scores = weights * (d_weights - delta[:, None]) * blocks.scale
    if blocks.scoring.softcap:
        d_scores = d_scores * softcap_slope(scores, blocks.scoring.softcap)
    return weights.astype(d_out.dtype), d_scores
