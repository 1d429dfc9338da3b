"""Attention over intervals of keys as Pallas kernels for TPU: what attention_xla.py has.

    forward     for every block of rows, over the blocks of keys that it sees: running softmax
    backward    the same walk for the gradient to q; then for every block of keys, over the blocks
                of rows, the gradients to k and v, added in place to what is there already

Scores exist in VMEM alone. Which blocks of keys a block of rows sees is read from scalar memory:
the others are neither fetched nor computed, and the grid ends with the longest walk.

The algorithm is FlashAttention's (Dao et al. 2022), with a backward kernel for rows and one for
keys as jax's splash attention has them. Splash fixes its mask when a kernel is built; here the mask
is two numbers a row that are known only when the batch is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from MaxDraft.layers.attention_keys import MASKED, NOTHING, Keys, Scoring, pad, usual_blocks
from MaxDraft.layers.loops import trip_count_scope

_LANES, _SUBLANES = 128, 8  # of a register: a number a row takes that many places side by side
_MOST_ROWS = 1024  # in a block: scores [rows, keys] and what is made of them must fit into VMEM


def forward(
    q: jax.Array,  # [B, R, N, d]
    keys: Keys,
    first: jax.Array,  # int [B, R]
    last: jax.Array,  # int [B, R]
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, R, N, dv], log_sum float32 [B, R, N]."""
    walk = _Walk.of(q, keys, first, last, scoring)
    r, dv = walk.in_block, keys.v.shape[-1]

    def kernel(start, stop, q, k, v, first, last, out, log_sum, most, total, sums):
        b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def begin():
            most[...] = jnp.full_like(most, NOTHING)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        @pl.when(start[b, i] + j < stop[b, i])
        def add_keys():
            scores = walk.scores(q, k, start[b, i] + j, first[:, :1], last[:, :1], 1)
            new = jnp.maximum(most[:, :1], scores.max(1, keepdims=True))
            weights, shrink = jnp.exp(scores - new), jnp.exp(most[:, :1] - new)
            total[...] = total[...] * shrink + weights.sum(1, keepdims=True)
            sums[...] = sums[...] * shrink + _product(weights.astype(v.dtype), v[...])
            most[...] = jnp.broadcast_to(new, most.shape)

        @pl.when(j == pl.num_programs(3) - 1)
        def end():  # nothing is seen: out 0, log_sum far below any score
            some = jnp.maximum(total[...], 1e-37)
            out[...] = (sums[...] / some[:, :1]).astype(out.dtype)
            log_sum[...] = most[...] + jnp.log(some)

    out, log_sum = walk.over_keys(
        kernel,
        inputs=[
            (walk.split(q), walk.of_rows(q.shape[-1])),
            (keys.k, walk.of_keys(q.shape[-1])),
            (keys.v, walk.of_keys(dv)),
            (walk.columns(walk.first), walk.of_any_head()),
            (walk.columns(walk.last), walk.of_any_head()),
        ],
        outputs=[
            (walk.shape(dv, keys.v.dtype), walk.of_rows(dv)),
            (walk.shape(_LANES, jnp.float32), walk.of_rows(_LANES)),
        ],
        scratch=[(r, _LANES), (r, _LANES), (r, dv)],
    )
    return walk.merge(out), walk.merge(log_sum[..., :1])[..., 0]


def backward(
    q, keys: Keys, first, last, out, log_sum, d_out, d_log_sum, so_far: Keys, scoring: Scoring
) -> tuple[jax.Array, Keys]:
    """-> gradient to q, and so_far with that to the keys."""
    walk = _Walk.of(q, keys, first, last, scoring)
    offset = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_log_sum
    d, dv, M = q.shape[-1], keys.v.shape[-1], keys.k.shape[1]
    rows = (walk.split(q), walk.split(d_out))
    numbers = [walk.split(x[..., None])[..., 0] for x in (log_sum, offset)]

    def d_scores(scores, d_weights, log_sum, offset):
        """-> weights, and the gradient to q k."""
        weights = jnp.exp(scores - log_sum)
        d_scores = weights * (d_weights - offset) * walk.scale
        if scoring.softcap:  # of cap tanh(x / cap); no slope where a key is masked
            slope = 1 - (jnp.maximum(scores, -scoring.softcap) / scoring.softcap) ** 2
            d_scores = d_scores * slope
        return weights.astype(d_out.dtype), d_scores.astype(q.dtype)

    def to_queries(start, stop, q, d_out, k, v, first, last, log_sum, offset, d_q, sums):
        b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def begin():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(start[b, i] + j < stop[b, i])
        def add_keys():
            scores = walk.scores(q, k, start[b, i] + j, first[:, :1], last[:, :1], 1)
            d_weights = _product_turned(d_out[...], v[...])
            _, change = d_scores(scores, d_weights, log_sum[:, :1], offset[:, :1])
            sums[...] += _product(change, k[...])

        @pl.when(j == pl.num_programs(3) - 1)
        def end():
            d_q[...] = sums[...].astype(d_q.dtype)

    [d_q] = walk.over_keys(
        to_queries,
        inputs=[
            (rows[0], walk.of_rows(d)),
            (rows[1], walk.of_rows(dv)),
            (keys.k, walk.of_keys(d)),
            (keys.v, walk.of_keys(dv)),
            (walk.columns(walk.first), walk.of_any_head()),
            (walk.columns(walk.last), walk.of_any_head()),
            *((walk.columns(x), walk.of_rows(_LANES)) for x in numbers),
        ],
        outputs=[(walk.shape(d, q.dtype), walk.of_rows(d))],
        scratch=[(walk.in_block, d)],
    )

    # Behind them: for every block of keys that some row sees, over the blocks of rows.
    low, high = walk.start.min(1), walk.stop.max(1)

    def place(b, j, low, high):
        return jnp.maximum(jnp.minimum(low[b] + j, high[b] - 1), 0)

    def to_keys(
        start, stop, low, high,
        q, d_out, k, v, first, last, log_sum, offset, k_so_far, v_so_far, d_k, d_v, k_sum, v_sum,
    ):  # fmt: skip
        b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        here = low[b] + j

        @pl.when(i == 0)
        def begin():
            k_sum[...], v_sum[...] = k_so_far[...], v_so_far[...]

        @pl.when((here < high[b]) & (start[b, i] <= here) & (here < stop[b, i]))
        def add_rows():
            scores = walk.scores(k, q, here, first[:1], last[:1], 0)
            d_weights = _product_turned(v[...], d_out[...])
            weights, change = d_scores(scores, d_weights, log_sum[:1], offset[:1])
            v_sum[...] += _product(weights, d_out[...])
            k_sum[...] += _product(change, q[...])

        # Behind the last block the place is that block's again, and its sum is written already.
        @pl.when((i == pl.num_programs(3) - 1) & ((here < high[b]) | (j == 0)))
        def end():
            d_k[...], d_v[...] = k_sum[...], v_sum[...]

    def of_rows(*block):
        return pl.BlockSpec((None, None, None, *block), lambda b, m, j, i, *_: (b, m, i, 0, 0))

    def of_any_head(*block):
        return pl.BlockSpec((None, None, *block), lambda b, m, j, i, *_: (b, i, 0, 0))

    def of_keys(width):
        def index(b, m, j, i, start, stop, low, high):
            return b, m, place(b, j, low, high), 0

        return pl.BlockSpec((None, None, keys.block, width), index)

    r = walk.in_block
    lines = (_SUBLANES, r)
    d_k, d_v = walk.call(
        to_keys,
        grid=(len(q), M, jnp.maximum((high - low).max(), 1), walk.blocks),
        times=len(q) * M * walk.blocks * walk.usual,
        scalars=[walk.start, walk.stop, low, high],
        inputs=[
            (rows[0], of_rows(r, d)),
            (rows[1], of_rows(r, dv)),
            (keys.k, of_keys(d)),
            (keys.v, of_keys(dv)),
            (walk.lines(walk.first), of_any_head(*lines)),
            (walk.lines(walk.last), of_any_head(*lines)),
            *((walk.lines(x), of_rows(*lines)) for x in numbers),
            (so_far.k, of_keys(d)),
            (so_far.v, of_keys(dv)),
        ],
        outputs=[(so_far.k, of_keys(d)), (so_far.v, of_keys(dv))],
        scratch=[(keys.block, d), (keys.block, dv)],
        aliases={12: 0, 13: 1},
    )
    return walk.merge(d_q), dataclasses.replace(so_far, k=d_k, v=d_v)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Blocks of rows over the blocks of keys that they see.

    [B, R, N, w] <-> [B, M, I, r, w]: b rows times the G heads that share a key, r = G b; rows that
    see nothing fill the last block.
    """

    rows: int  # R
    group: int  # G
    size: int  # b
    keys: Keys
    scoring: Scoring
    first: jax.Array  # int32 [B, I, r]
    last: jax.Array  # int32 [B, I, r]
    start: jax.Array  # int32 [B, I] the blocks of keys that a block of rows sees: from this one
    stop: jax.Array  # int32 [B, I] to the one before this

    @classmethod
    def of(cls, q, keys: Keys, first, last, scoring: Scoring) -> _Walk:
        group, size = q.shape[2] // keys.k.shape[1], keys.block
        while group * size > _MOST_ROWS and size % (2 * _SUBLANES) == 0:
            size //= 2

        def split(x, value):
            x = pad(x.astype(jnp.int32), 1, size, value)
            return jnp.tile(x.reshape(len(x), -1, size), group)

        first, last = split(first, 0), split(last, -1)
        some = last >= first
        start = jnp.where(some, first, keys.k.shape[2]).min(-1) // keys.block
        stop = jnp.where(some, last, -1).max(-1) // keys.block + 1
        return cls(q.shape[1], group, size, keys, scoring, first, last, start, stop)

    @property
    def in_block(self) -> int:
        return self.group * self.size

    @property
    def blocks(self) -> int:
        return self.start.shape[1]

    @property
    def usual(self) -> float:
        return usual_blocks(self.keys, self.size, self.scoring)

    @property
    def scale(self) -> float:
        given = self.scoring.scale
        return self.keys.k.shape[-1] ** -0.5 if given is None else given

    def scores(self, a, b, block, first, last, keys_axis: int) -> jax.Array:
        """float32 a b^T of a block of keys and one of rows, MASKED where a row does not see a key.

        first, last: [r, 1] where keys lie along axis 1, [1, r] where they lie along axis 0.
        """
        scores = _product_turned(a[...], b[...]) * self.scale
        if self.scoring.softcap:
            scores = self.scoring.softcap * jnp.tanh(scores / self.scoring.softcap)
        key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, keys_axis)
        key += block * self.keys.block
        return jnp.where((key >= first) & (key <= last), scores, MASKED)

    # ------------------------------------------------------------------------------- layout
    def split(self, x: jax.Array) -> jax.Array:
        """[B, R, N, w] -> [B, M, I, r, w]"""
        x = pad(x, 1, self.size)
        x = x.reshape(len(x), -1, self.size, x.shape[2] // self.group, self.group, x.shape[3])
        x = x.transpose(0, 3, 1, 4, 2, 5)  # [B, M, I, G, b, w]
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def merge(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:3], self.group, -1, x.shape[-1])
        x = x.transpose(0, 2, 4, 1, 3, 5)  # [B, I, b, M, G, w]
        return x.reshape(len(x), -1, x.shape[3] * self.group, x.shape[-1])[:, : self.rows]

    def columns(self, x: jax.Array) -> jax.Array:
        """[..., r] -> [..., r, lanes]"""
        return jnp.broadcast_to(x[..., None], (*x.shape, _LANES))

    def lines(self, x: jax.Array) -> jax.Array:
        """[..., r] -> [..., sublanes, r]"""
        return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], _SUBLANES, x.shape[-1]))

    # -------------------------------------------------------------------------- the call
    def shape(self, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """Of what is written for every row."""
        B, M = self.keys.k.shape[:2]
        return jax.ShapeDtypeStruct((B, M, self.blocks, self.in_block, width), dtype)

    def of_rows(self, width: int) -> pl.BlockSpec:
        block = (None, None, None, self.in_block, width)
        return pl.BlockSpec(block, lambda b, m, i, j, *_: (b, m, i, 0, 0))

    def of_any_head(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, self.in_block, _LANES), lambda b, m, i, j, *_: (b, i, 0, 0)
        )

    def of_keys(self, width: int) -> pl.BlockSpec:
        """Behind its last block a walk stays there, so that nothing more is fetched."""

        def index(b, m, i, j, start, stop):
            return b, m, jnp.maximum(jnp.minimum(start[b, i] + j, stop[b, i] - 1), 0), 0

        return pl.BlockSpec((None, None, self.keys.block, width), index)

    def over_keys(self, kernel, **given) -> list[jax.Array]:
        """kernel on the grid (batch, key head, block of rows, block of keys)."""
        B, M = self.keys.k.shape[:2]
        return self.call(
            kernel,
            grid=(B, M, self.blocks, jnp.maximum((self.stop - self.start).max(), 1)),
            times=B * M * self.blocks * self.usual,
            scalars=[self.start, self.stop],
            **given,
        )

    def call(
        self, kernel, *, grid, times: float, scalars, inputs, outputs, scratch, aliases=None
    ) -> list[jax.Array]:
        """times: how often the kernel computes where rows of documents are as long as can be."""
        with trip_count_scope("attention_kernel_blocks", times):
            return pl.pallas_call(
                kernel,
                out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(scalars),
                    grid=grid,
                    in_specs=[spec for _, spec in inputs],
                    out_specs=[spec for _, spec in outputs],
                    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
                ),
                input_output_aliases=aliases or {},
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
                ),
                interpret=self.keys.kernel.endswith("interpreted"),
            )(*scalars, *(x for x, _ in inputs))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [m, n] [n, w] -> [m, w]"""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _product_turned(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [m, w] [n, w] -> [m, n]"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
