"""Blockwise attention with an online softmax in XLA's own operations: on every platform.

FlashAttention's algorithm (Dao et al. 2022) with the online softmax of Milakov & Gimelshein (2018):
a loop over blocks of queries, and in it one over the blocks of keys that some query of the block
sees. For scores s_j of block j, with the running maximum m, sum l and output o of the blocks before

    m' = max(m, max s_j)
    l' = l exp(m - m') + sum exp(s_j - m')
    o' = o exp(m - m') + exp(s_j - m') v_j

and in the end out = o / l and logsumexp = m + log l. The backward pass makes the weights again,

    p_j  = exp(s_j - logsumexp)
    dv_j = p_j^T d_out
    ds_j = p_j (d_out v_j^T - delta)        delta = sum(d_out out) - d_logsumexp
    dq   = sum over j of ds_j k_j           dk_j = ds_j^T q

so that scores of one block of queries and one of keys exist at a time, never [T, T].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.layers.attention_keys import (
    INITIAL_MAXIMUM,
    MASKED,
    KeyValueBlocks,
    Scoring,
    expected_key_blocks,
    pad_to_multiple,
    softcap_slope,
)
from MaxDraft.layers.loops import counted_loop
from MaxDraft.layers.norms import soft_cap


def forward(
    q: jax.Array,  # [B, R, N, d]
    keys: KeyValueBlocks,
    first: jax.Array,  # int [B, R]
    last: jax.Array,  # int [B, R]
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, R, N, dv], logsumexp float32 [B, R, N]; see attention.interval_attention."""
    layout = _QueryBlocks.from_shapes(q, keys)

    def query_block(_, block):
        q, first, last = block
        visible = _VisibleKeys(keys, first, last, layout.size, scoring)

        def add_keys(j, carry):
            maximum, total, out = carry
            scores = visible.scores(q, j)
            new_maximum = jnp.maximum(maximum, scores.max(2, keepdims=True))
            weights = jnp.exp(scores - new_maximum)
            rescale = jnp.exp(maximum - new_maximum)
            values = visible.block(keys.v, j)
            added = _product("bmkd,bmkr->bmdr", values, weights.astype(values.dtype))
            total = total * rescale + weights.sum(2, keepdims=True)
            return new_maximum, total, out * rescale + added

        shape = (*q.shape[:2], 1, q.shape[3])
        maximum = jnp.full(shape, INITIAL_MAXIMUM, jnp.float32)
        out = jnp.zeros((*q.shape[:2], keys.v.shape[-1], q.shape[3]), jnp.float32)
        carry = (maximum, jnp.zeros(shape, jnp.float32), out)
        maximum, total, out = visible.loop(add_keys, carry)
        # A query that sees no key gets out 0 and a logsumexp far below any score.
        total = jnp.maximum(total, 1e-37)
        return None, ((out / total).astype(keys.v.dtype), maximum + jnp.log(total))

    blocks = (layout.split(q), layout.split_bounds(first, 0), layout.split_bounds(last, -1))
    _, (out, logsumexp) = jax.lax.scan(query_block, None, blocks)
    return layout.merge(out), layout.merge(logsumexp)[..., 0]


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
) -> tuple[jax.Array, KeyValueBlocks]:
    """-> gradient to q; d_keys, to which the gradients to keys and values are added."""
    layout = _QueryBlocks.from_shapes(q, keys)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_logsumexp

    def query_block(d_keys, block):
        q, first, last, d_out, logsumexp, delta = block
        visible = _VisibleKeys(keys, first, last, layout.size, scoring)

        def add_keys(j, carry):
            d_q, d_keys = carry
            scores = visible.scores(q, j)
            weights = jnp.exp(scores - logsumexp)
            d_weights = _product("bmkd,bmdr->bmkr", visible.block(keys.v, j), d_out)
            d_scores = weights * (d_weights - delta) * visible.scale
            if scoring.softcap:
                d_scores = d_scores * softcap_slope(scores, scoring.softcap)
            d_scores = d_scores.astype(q.dtype)

            def add(sums, weights, queries):
                added = visible.block(sums, j) + _product("bmkr,bmdr->bmkd", weights, queries)
                return jax.lax.dynamic_update_slice_in_dim(sums, added, j * keys.block, axis=2)

            d_q += _product("bmkd,bmkr->bmdr", visible.block(keys.k, j), d_scores)
            d_k = add(d_keys.k, d_scores, q)
            d_v = add(d_keys.v, weights.astype(d_out.dtype), d_out)
            return d_q, dataclasses.replace(d_keys, k=d_k, v=d_v)

        d_q, d_keys = visible.loop(add_keys, (jnp.zeros(q.shape, jnp.float32), d_keys))
        return d_keys, d_q.astype(q.dtype)

    blocks = (
        layout.split(q),
        layout.split_bounds(first, 0),
        layout.split_bounds(last, -1),
        layout.split(d_out),
        layout.split(logsumexp[..., None]),
        layout.split(delta[..., None]),
    )
    d_keys, d_q = jax.lax.scan(query_block, d_keys, blocks)
    return layout.merge(d_q), d_keys


@dataclasses.dataclass(frozen=True)
class _VisibleKeys:
    """The blocks of keys that some query of one block sees."""

    keys: KeyValueBlocks
    first: jax.Array  # int [B, r]
    last: jax.Array  # int [B, r]
    queries: int  # b neighbouring queries; r counts each once for every head of its group
    scoring: Scoring

    @property
    def scale(self) -> float:
        return self.scoring.scale_for(self.keys.k.shape[-1])

    def loop(self, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """carry = body(j, carry) for every visible block of keys j."""
        size, length = self.keys.block, self.keys.k.shape[2]
        sees_a_key = self.last >= self.first
        start = jnp.min(jnp.where(sees_a_key, self.first, length)) // size
        stop = jnp.max(jnp.where(sees_a_key, self.last, -1)) // size + 1
        expected = expected_key_blocks(self.keys, self.queries, self.scoring)
        return counted_loop("attention_key_blocks", start, stop, body, carry, expected)

    def block(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """Keys of block j, [B, M, c, ...] of [B, M, T', ...]."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.keys.block, self.keys.block, axis=2)

    def scores(self, q: jax.Array, j: jax.Array) -> jax.Array:
        """float32 [B, M, c, r], MASKED where a query does not see a key; q [B, M, d, r]."""
        scores = _product("bmkd,bmdr->bmkr", self.block(self.keys.k, j), q) * self.scale
        key = j * self.keys.block + jnp.arange(self.keys.block, dtype=jnp.int32)[:, None]
        visible = (key >= self.first[:, None]) & (key <= self.last[:, None])
        return jnp.where(visible[:, None], soft_cap(scores, self.scoring.softcap), MASKED)


@dataclasses.dataclass(frozen=True)
class _QueryBlocks:
    """[B, R, N, d] <-> blocks [I, B, M, d, r]: b queries times the G heads of a group, r = G b.

    Queries lie along the last axis, in scores [keys, queries] too: in this layout all products but
    small ones read memory in order. The last block is filled with queries that see no key.
    """

    num_queries: int  # R
    num_kv_heads: int  # M
    group: int  # G
    size: int  # b

    @classmethod
    def from_shapes(cls, q: jax.Array, keys: KeyValueBlocks) -> _QueryBlocks:
        num_kv_heads = keys.k.shape[1]
        size = min(keys.block, q.shape[1])
        return cls(q.shape[1], num_kv_heads, q.shape[2] // num_kv_heads, size)

    def split(self, x: jax.Array) -> jax.Array:
        x = pad_to_multiple(x, 1, self.size)
        x = x.reshape(len(x), -1, self.size, self.num_kv_heads, self.group, x.shape[-1])
        x = x.transpose(1, 0, 3, 5, 4, 2)  # [I, B, M, d, G, b]
        return x.reshape(*x.shape[:4], -1)

    def split_bounds(self, x: jax.Array, value: int) -> jax.Array:
        """[B, R] -> [I, B, r]; the queries that are appended hold `value`."""
        x = pad_to_multiple(x, 1, self.size, value)
        x = jnp.swapaxes(x.reshape(len(x), -1, self.size), 0, 1)
        return jnp.tile(x, self.group)

    def merge(self, blocks: jax.Array) -> jax.Array:
        x = blocks.reshape(*blocks.shape[:4], self.group, self.size)
        x = x.transpose(1, 0, 5, 2, 4, 3)  # [B, I, b, M, G, d]
        x = x.reshape(len(x), -1, self.num_kv_heads * self.group, x.shape[-1])
        return x[:, : self.num_queries]


def _product(equation: str, *factors: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)
