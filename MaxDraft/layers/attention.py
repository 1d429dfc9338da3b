"""Attention: in blocks for training, over a cache for decoding.

B batch, R rows (queries), T keys, N heads, M key/value heads, G = N / M, d head size.

What a row sees is an interval of keys, [first, last], since documents lie packed one after the
other: from the start of its document, of its window or of its chunk, up to itself. So every mask is
two numbers a row, and a block of keys that no row of a block sees is not computed at all.

    out = softmax(q k^T) v        log_sum = log sum exp(q k^T)

Forward and backward walk over blocks of keys under a running maximum (Milakov & Gimelshein 2018;
Dao et al. 2022): memory grows with T, never with T * T. `log_sum` joins what a row sees elsewhere
under the same softmax (`joined`), and has its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from MaxDraft.layers.norms import soft_cap
from MaxDraft.sharding import active_rules, partition_spec, ways

MASKED = -1e30  # finite, so that a row without any key stays free of NaN
_NOTHING = -1e29  # the maximum of no scores: above MASKED, so that exp(MASKED - it) is 0


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How queries score keys, where it is not q k / sqrt(d) over everything before them."""

    scale: float | None = None  # None: d ** -0.5
    softcap: float = 0.0  # 0: none
    window: int = 0  # a query sees itself and window - 1 keys before it; 0: all
    chunk: int = 0  # a query sees its own chunk of this many positions; 0: all


PLAIN = Scoring()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values, or their gradients, laid out to be read a block at a time."""

    k: jax.Array  # [B, M, T', d], T' a multiple of the block
    v: jax.Array  # [B, M, T', dv]
    block: int = dataclasses.field(metadata={"static": True})
    reach: int = dataclasses.field(metadata={"static": True})  # keys that a row sees, at most

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, block: int, reach: int | None = None) -> Keys:
        """k [B, T, M, d], v [B, T, M, dv]; reach: all of T where it is not given."""
        block = min(block, k.shape[1])
        reach = k.shape[1] if reach is None else reach
        return cls(*(_pad(jnp.swapaxes(x, 1, 2), 2, block) for x in (k, v)), block, reach)

    def arrays(self, length: int) -> tuple[jax.Array, jax.Array]:
        """k [B, T, M, d] and v [B, T, M, dv] again."""
        return jnp.swapaxes(self.k, 1, 2)[:, :length], jnp.swapaxes(self.v, 1, 2)[:, :length]

    def zeros(self) -> Keys:
        """Gradients of nothing yet, float32."""
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (self.k, self.v))
        return dataclasses.replace(self, **dict(zip("kv", zeros, strict=True)))


# ------------------------------------------------------------------------------- packed documents
def document_starts(segment_ids: jax.Array) -> jax.Array:
    """int [B, T] -> int32 [B, T], where the document of every token begins in its row."""
    rows = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    begins = jnp.where(segment_ids != before, rows, 0)
    return jax.lax.cummax(begins, axis=1)


def packed_attention(
    q: jax.Array,  # [B, T, N, d]
    k: jax.Array,  # [B, T, M, d]
    v: jax.Array,  # [B, T, M, dv]
    segment_ids: jax.Array,  # [B, T] documents packed into the row, each in one piece
    block: int,
    *,
    scoring: Scoring = PLAIN,
    positions: jax.Array | None = None,  # int [B, T] inside each document; needed for chunks
    sinks: jax.Array | None = None,  # [N] scores that take a share of the softmax and give nothing
) -> jax.Array:  # [B, T, N, dv]
    """Causal attention inside each document; softmax in float32.

    Under axis rules each device attends with its own heads and batch rows: which blocks of keys are
    walked over is then its own affair, and no device waits for another inside the walk.
    """
    active, shares, kv_heads = active_rules(), ways("target_heads"), k.shape[2]
    if active is None or q.shape[2] % shares or max(shares, kv_heads) % min(shares, kv_heads):
        return _packed_attention(q, k, v, segment_ids, positions, sinks, block, scoring)
    if kv_heads < shares:  # every device needs the one key head that its query heads share
        k, v = (jnp.repeat(x, shares // kv_heads, axis=2) for x in (k, v))
    mesh, rules = active

    def spec(*axes: str | None) -> PartitionSpec:
        return partition_spec(axes, rules)

    heads, tokens = spec("target_batch", None, "target_heads", None), spec("target_batch", None)
    given = [q, k, v, segment_ids, positions, sinks]
    specs = [heads, heads, heads, tokens, tokens, spec("target_heads")]
    run = jax.shard_map(
        functools.partial(_packed_attention, block=block, scoring=scoring),
        mesh=mesh,
        in_specs=tuple(None if x is None else spec for x, spec in zip(given, specs, strict=True)),
        out_specs=heads,
        check_vma=False,
    )
    return run(*given)


def _packed_attention(q, k, v, segment_ids, positions, sinks, block: int, scoring: Scoring):
    rows = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = document_starts(segment_ids)
    if scoring.window:
        first = jnp.maximum(first, rows - scoring.window + 1)
    if scoring.chunk:
        first = jnp.maximum(first, rows - positions % scoring.chunk)
    out, log_sum = _whole_attention(q, k, v, first, rows, block, scoring)
    if sinks is not None:
        share = jax.nn.sigmoid(log_sum - sinks.astype(jnp.float32))
        out = out * share[..., None].astype(out.dtype)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _whole_attention(q, k, v, first, last, block: int, scoring: Scoring):
    """-> out [B, T, N, dv], log_sum float32 [B, T, N]; with gradients to q, k and v."""
    return _forward(q, Keys.of(k, v, block), first, last, scoring)


def _whole_attention_forward(q, k, v, first, last, block, scoring):
    out = _whole_attention(q, k, v, first, last, block, scoring)
    return out, (q, k, v, first, last, *out)


def _whole_attention_backward(block, scoring, kept, cotangents):
    q, k, v, *rest = kept
    keys = Keys.of(k, v, block)
    d_q, gradients = _backward(q, keys, *rest, *cotangents, keys.zeros(), scoring)
    d_k, d_v = gradients.arrays(k.shape[1])
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_whole_attention.defvjp(_whole_attention_forward, _whole_attention_backward)


# ------------------------------------------------------------------------------------ any rows
@jax.custom_vjp
def row_attention(
    q: jax.Array,  # [B, R, N, d]
    keys: Keys,
    gradients: Keys | None,  # float32; None: no gradients are wanted
    first: jax.Array,  # int [B, R] the keys that a row sees: from this one
    last: jax.Array,  # int [B, R] to this one, itself included; below `first`: none
) -> tuple[jax.Array, jax.Array, Keys | None]:
    """-> out [B, R, N, d], log_sum float32 [B, R, N], gradients as they came.

    Many calls read the same keys. So that each adds to the gradient of all of them in place, and
    none makes an array of it, the keys' gradient is handed from call to call: forward,
    `gradients` only passes through; in the backward pass its cotangent is the sum so far.
    """
    return *_forward(q, keys, first, last, PLAIN), gradients


def _row_attention_forward(q, keys, gradients, first, last):
    out, log_sum = _forward(q, keys, first, last, PLAIN)
    return (out, log_sum, gradients), (q, keys, first, last, out, log_sum)


def _row_attention_backward(kept, cotangents):
    *d_out, so_far = cotangents
    d_q, gradients = _backward(*kept, *d_out, so_far, PLAIN)
    return d_q, None, gradients, None, None


row_attention.defvjp(_row_attention_forward, _row_attention_backward)


def joined(
    out: jax.Array,  # [..., N, d] of row_attention
    log_sum: jax.Array,  # float32 [..., N]
    q: jax.Array,  # [..., N, d]
    own_k: jax.Array,  # [J, ..., M, d] keys that only this row sees
    own_v: jax.Array,  # [J, ..., M, d]
) -> jax.Array:  # [..., N, d]
    """The same softmax over a row's own keys besides."""
    grouped = q.reshape(*q.shape[:-2], own_k.shape[-2], -1, q.shape[-1])
    scores = jnp.einsum("...mgd,j...md->...mgj", grouped, own_k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    log_sum = log_sum.reshape(scores.shape[:-1])
    total = jnp.logaddexp(log_sum, jax.nn.logsumexp(scores, -1))
    theirs = jnp.exp(log_sum - total)[..., None].astype(out.dtype)
    own = jnp.exp(scores - total[..., None]).astype(out.dtype)
    joint = theirs * out.reshape(grouped.shape) + jnp.einsum("...mgj,j...md->...mgd", own, own_v)
    return joint.reshape(q.shape)


# --------------------------------------------------------------------------------------- in blocks
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
        usual = (-(-self.keys.reach // size) + 1) / 2
        if self.scoring.window:  # b rows see b + window - 1 keys
            usual = min(usual, 1 + (self.rows + self.scoring.window - 2) / size)
        if self.scoring.chunk:
            usual = min(usual, (-(-self.scoring.chunk // size) + 1) / 2)
        some = self.last >= self.first
        start = jnp.min(jnp.where(some, self.first, length)) // size
        stop = jnp.max(jnp.where(some, self.last, -1)) // size + 1
        with jax.named_scope(f"runs_{usual:g}_times"):
            return jax.lax.fori_loop(start, stop, body, carry)

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


def _forward(q, keys, first, last, scoring):
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
        nothing = jnp.full(shape, _NOTHING, jnp.float32)
        out = jnp.zeros((*q.shape[:2], keys.v.shape[-1], q.shape[3]), jnp.float32)
        most, total, out = walk.over(add_keys, (nothing, jnp.zeros(shape, jnp.float32), out))
        some = jnp.maximum(total, 1e-37)  # nothing is seen: out 0, log_sum far below any score
        return None, ((out / some).astype(keys.v.dtype), most + jnp.log(some))

    given = (queries.split(q), queries.split_rows(first, 0), queries.split_rows(last, -1))
    _, (out, log_sum) = jax.lax.scan(of_queries, None, given)
    return queries.merge(out), queries.merge(log_sum)[..., 0]


def _backward(q, keys, first, last, out, log_sum, d_out, d_log_sum, so_far: Keys, scoring):
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
        x = _pad(x, 1, self.size)
        x = x.reshape(len(x), -1, self.size, self.kv_heads, self.group, x.shape[-1])
        x = x.transpose(1, 0, 3, 5, 4, 2)  # [I, B, M, d, G, b]
        return x.reshape(*x.shape[:4], -1)

    def split_rows(self, x: jax.Array, value: int) -> jax.Array:
        """[B, R] -> [I, B, r]; the rows added hold `value`."""
        x = _pad(x, 1, self.size, value)
        x = jnp.swapaxes(x.reshape(len(x), -1, self.size), 0, 1)
        return jnp.tile(x, self.group)

    def merge(self, blocks: jax.Array) -> jax.Array:
        x = blocks.reshape(*blocks.shape[:4], self.group, self.size)
        x = x.transpose(1, 0, 5, 2, 4, 3)  # [B, I, b, M, G, d]
        return x.reshape(len(x), -1, self.kv_heads * self.group, x.shape[-1])[:, : self.rows]


def _product(equation: str, *factors: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)


def _pad(x: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    """Up to a multiple of the block."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, pad, constant_values=value)


# ----------------------------------------------------------------------------------- over a cache
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
