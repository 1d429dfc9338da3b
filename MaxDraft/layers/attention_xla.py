"""Attention over intervals of keys in XLA's own operations: on every platform.

A loop over blocks of rows, and in it one over the blocks of keys that some row of the block sees,
under a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.layers.attention_keys import MASKED, NOTHING, Keys, Scoring, pad, usual_blocks
from MaxDraft.layers.loops import counted_loop
from MaxDraft.layers.norms import soft_cap


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A block of queries over the blocks of keys that it sees."""

    keys: Keys
    first: jax.Array  # int [B, r]
    last: jax.Array  # int [B, r]
    rows: int  # b, in r once for each head of a group
    scoring: Scoring

    def over(self, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """carry = body(j, carry) for every block j of keys that some row sees.

        How many is known only then; the scope's name says how many they are where all rows of
        documents as long as can be are there, on average over the blocks of queries.
        """
        size, length = self.keys.block, self.keys.k.shape[2]
        usual = usual_blocks(self.keys, self.rows, self.scoring)
        some = self.last >= self.first
        start = jnp.min(jnp.where(some, self.first, length)) // size
        stop = jnp.max(jnp.where(some, self.last, -1)) // size + 1
        return counted_loop("attention_key_blocks", start, stop, body, carry, usual)

    def block(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """Keys of block j, [B, M, c, ...] of [B, M, T', ...]."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.keys.block, self.keys.block, axis=2)

    def scale(self) -> float:
        given = self.scoring.scale
        return self.keys.k.shape[-1] ** -0.5 if given is None else given

    def scores(self, q: jax.Array, j: jax.Array) -> jax.Array:
        """float32 [B, M, c, r], MASKED where a row does not see a key; q [B, M, d, r]."""
        scores = _product("bmkd,bmdr->bmkr", self.block(self.keys.k, j), q) * self.scale()
        key = j * self.keys.block + jnp.arange(self.keys.block, dtype=jnp.int32)[:, None]
        visible = (key >= self.first[:, None]) & (key <= self.last[:, None])
        return jnp.where(visible[:, None], soft_cap(scores, self.scoring.softcap), MASKED)


def forward(
    q: jax.Array,  # [B, R, N, d]
    keys: Keys,
    first: jax.Array,  # int [B, R]
    last: jax.Array,  # int [B, R]
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, R, N, dv], log_sum float32 [B, R, N]."""
    queries = _Queries.of(q, keys)

    def of_queries(_, given):
        q, first, last = given
        walk = _Walk(keys, first, last, queries.size, scoring)

        def add_keys(j, carry):
            most, total, out = carry
            scores = walk.scores(q, j)
            new = jnp.maximum(most, scores.max(2, keepdims=True))
            weights, shrink = jnp.exp(scores - new), jnp.exp(most - new)
            values = walk.block(keys.v, j)
            added = _product("bmkd,bmkr->bmdr", values, weights.astype(values.dtype))
            return new, total * shrink + weights.sum(2, keepdims=True), out * shrink + added

        shape = (*q.shape[:2], 1, q.shape[3])
        nothing = jnp.full(shape, NOTHING, jnp.float32)
        out = jnp.zeros((*q.shape[:2], keys.v.shape[-1], q.shape[3]), jnp.float32)
        most, total, out = walk.over(add_keys, (nothing, jnp.zeros(shape, jnp.float32), out))
        some = jnp.maximum(total, 1e-37)  # nothing is seen: out 0, log_sum far below any score
        return None, ((out / some).astype(keys.v.dtype), most + jnp.log(some))

    given = (queries.split(q), queries.split_rows(first, 0), queries.split_rows(last, -1))
    _, (out, log_sum) = jax.lax.scan(of_queries, None, given)
    return queries.merge(out), queries.merge(log_sum)[..., 0]


def backward(
    q, keys: Keys, first, last, out, log_sum, d_out, d_log_sum, so_far: Keys, scoring: Scoring
) -> tuple[jax.Array, Keys]:
    """-> gradient to q, and so_far with that to the keys.

    Weights are made again from the scores and their log sum.
    """
    queries = _Queries.of(q, keys)
    # d softmax: weights * (d_out v - d_out out), and d log_sum adds to every score its weight.
    offset = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_log_sum

    def of_queries(total, given):
        q, first, last, d_out, log_sum, offset = given
        walk = _Walk(keys, first, last, queries.size, scoring)

        def add_keys(j, carry):
            d_q, total = carry
            scores = walk.scores(q, j)
            weights = jnp.exp(scores - log_sum)
            d_weights = _product("bmkd,bmdr->bmkr", walk.block(keys.v, j), d_out)
            d_scores = weights * (d_weights - offset) * walk.scale()
            if scoring.softcap:  # of cap tanh(x / cap); no slope where a key is masked
                slope = 1 - (jnp.maximum(scores, -scoring.softcap) / scoring.softcap) ** 2
                d_scores = d_scores * slope
            d_scores = d_scores.astype(q.dtype)

            def add(sums, rows, values):
                added = walk.block(sums, j) + _product("bmkr,bmdr->bmkd", rows, values)
                return jax.lax.dynamic_update_slice_in_dim(sums, added, j * keys.block, axis=2)

            d_q += _product("bmkd,bmkr->bmdr", walk.block(keys.k, j), d_scores)
            d_k, d_v = add(total.k, d_scores, q), add(total.v, weights.astype(d_out.dtype), d_out)
            return d_q, dataclasses.replace(total, k=d_k, v=d_v)

        d_q, total = walk.over(add_keys, (jnp.zeros(q.shape, jnp.float32), total))
        return total, d_q.astype(q.dtype)

    given = (
        queries.split(q),
        queries.split_rows(first, 0),
        queries.split_rows(last, -1),
        queries.split(d_out),
        queries.split(log_sum[..., None]),
        queries.split(offset[..., None]),
    )
    total, d_q = jax.lax.scan(of_queries, so_far, given)
    return queries.merge(d_q), total


@dataclasses.dataclass(frozen=True)
class _Queries:
    """[B, R, N, d] <-> blocks [I, B, M, d, r]: b rows times the G heads that share a key, r = G b.

    Rows lie along the last axis, in scores [keys, rows] too: then all products but small ones read
    memory as it lies. Rows that see nothing fill the last block.
    """

    rows: int  # R
    kv_heads: int  # M
    group: int  # G
    size: int  # b

    @classmethod
    def of(cls, q: jax.Array, keys: Keys) -> _Queries:
        kv_heads = keys.k.shape[1]
        size = min(keys.block, q.shape[1])
        return cls(q.shape[1], kv_heads, q.shape[2] // kv_heads, size)

    def split(self, x: jax.Array) -> jax.Array:
        x = pad(x, 1, self.size)
        x = x.reshape(len(x), -1, self.size, self.kv_heads, self.group, x.shape[-1])
        x = x.transpose(1, 0, 3, 5, 4, 2)  # [I, B, M, d, G, b]
        return x.reshape(*x.shape[:4], -1)

    def split_rows(self, x: jax.Array, value: int) -> jax.Array:
        """[B, R] -> [I, B, r]; the rows added hold `value`."""
        x = pad(x, 1, self.size, value)
        x = jnp.swapaxes(x.reshape(len(x), -1, self.size), 0, 1)
        return jnp.tile(x, self.group)

    def merge(self, blocks: jax.Array) -> jax.Array:
        x = blocks.reshape(*blocks.shape[:4], self.group, self.size)
        x = x.transpose(1, 0, 5, 2, 4, 3)  # [B, I, b, M, G, d]
        return x.reshape(len(x), -1, self.kv_heads * self.group, x.shape[-1])[:, : self.rows]


def _product(equation: str, *factors: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)
