"""Attention over intervals of keys as Pallas kernels for GPU (Triton): what attention_xla.py has.

    forward     for every block of rows and head, over the blocks of keys that it sees
    backward    the same walk for the gradient to q; then for every block of keys, over the blocks
                of rows that see some of it, the gradients to k and v, added to what is there

Blocks are of 64 rows and keys at most, whatever Keys has. Scores exist in registers alone. Widths
that are no power of two are padded at every call, gradients of the keys too, by copies. Products of
float32 are float32's, not TF32's. The algorithm is FlashAttention's (Dao et al. 2022; 2023 for the
loops' order). cuDNN's kernels are not used, since their masks are of whole packed rows: they know
nothing of any set of rows that sees an interval each, and give gradients of all keys at every call.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from MaxDraft.layers.attention_keys import MASKED, NOTHING, Keys, Scoring, pad, usual_blocks
from MaxDraft.layers.loops import counted_loop, trip_count_scope

_LEAST = 16  # what the GPU's matrix units take
_TILE_BYTES = 32 * 1024  # of a block of rows or keys: several must fit into shared memory


def forward(
    q: jax.Array,  # [B, R, N, d]
    keys: Keys,
    first: jax.Array,  # int [B, R]
    last: jax.Array,  # int [B, R]
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """-> out [B, R, N, dv], log_sum float32 [B, R, N]."""
    walk = _Walk.of(q, keys, first, last, scoring)
    b, wide, wide_v = walk.size, walk.k.shape[-1], walk.v.shape[-1]

    def kernel(q, k, v, first, last, out, log_sum):
        q, first, last = q[...], first[...], last[...]

        def add_keys(j, carry):
            most, total, sums = carry
            here = pl.ds(j * walk.block, walk.block)
            scores = walk.scores(q, k[here, :], j, first, last)
            new = jnp.maximum(most, scores.max(1))
            weights, shrink = jnp.exp(scores - new[:, None]), jnp.exp(most - new)
            added = _product(weights.astype(v.dtype), v[here, :])
            return new, total * shrink + weights.sum(1), sums * shrink[:, None] + added

        most, total, sums = walk.over_keys(
            first,
            last,
            add_keys,
            (
                jnp.full((b,), NOTHING, jnp.float32),
                jnp.zeros((b,), jnp.float32),
                jnp.zeros((b, wide_v), jnp.float32),
            ),
        )
        some = jnp.maximum(total, 1e-37)  # nothing is seen: out 0, log_sum far below any score
        out[...] = (sums / some[:, None]).astype(out.dtype)
        log_sum[...] = most + jnp.log(some)

    out, log_sum = walk.call_on_rows(
        kernel,
        inputs=[
            (walk.split(q, wide), walk.of_rows(wide)),
            (walk.k, walk.of_all_keys(wide)),
            (walk.v, walk.of_all_keys(wide_v)),
            *walk.interval,
        ],
        outputs=[
            (walk.shape(wide_v, dtype=keys.v.dtype), walk.of_rows(wide_v)),
            (walk.shape(dtype=jnp.float32), walk.of_rows()),
        ],
    )
    return walk.merge(out, keys.v.shape[-1]), walk.merge(log_sum[..., None], 1)[..., 0]


def backward(
    q, keys: Keys, first, last, out, log_sum, d_out, d_log_sum, so_far: Keys, scoring: Scoring
) -> tuple[jax.Array, Keys]:
    """-> gradient to q, and so_far with that to the keys."""
    walk = _Walk.of(q, keys, first, last, scoring)
    b, c, wide, wide_v = walk.size, walk.block, walk.k.shape[-1], walk.v.shape[-1]
    offset = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_log_sum
    rows = walk.split(q, wide), walk.split(d_out, wide_v)
    numbers = [walk.split(x[..., None], 1)[..., 0] for x in (log_sum, offset)]

    def d_scores(scores, q, d_out, v, log_sum, offset):
        """-> weights, and the gradient to q k."""
        weights = jnp.exp(scores - log_sum[:, None])
        d_weights = _product(d_out, v, turned=(1, 1))
        d_scores = weights * (d_weights - offset[:, None]) * walk.scale
        if scoring.softcap:  # of cap tanh(x / cap); no slope where a key is masked
            slope = 1 - (jnp.maximum(scores, -scoring.softcap) / scoring.softcap) ** 2
            d_scores = d_scores * slope
        return weights.astype(d_out.dtype), d_scores.astype(q.dtype)

    def to_queries(q, d_out, k, v, first, last, log_sum, offset, d_q):
        q, d_out, first, last = q[...], d_out[...], first[...], last[...]
        log_sum, offset = log_sum[...], offset[...]

        def add_keys(j, sums):
            here = pl.ds(j * c, c)
            scores = walk.scores(q, k[here, :], j, first, last)
            _, change = d_scores(scores, q, d_out, v[here, :], log_sum, offset)
            return sums + _product(change, k[here, :])

        sums = walk.over_keys(first, last, add_keys, jnp.zeros((b, wide), jnp.float32))
        d_q[...] = sums.astype(d_q.dtype)

    [d_q] = walk.call_on_rows(
        to_queries,
        inputs=[
            (rows[0], walk.of_rows(wide)),
            (rows[1], walk.of_rows(wide_v)),
            (walk.k, walk.of_all_keys(wide)),
            (walk.v, walk.of_all_keys(wide_v)),
            *walk.interval,
            *((x, walk.of_rows()) for x in numbers),
        ],
        outputs=[(walk.shape(wide, dtype=q.dtype), walk.of_rows(wide))],
    )

    def to_keys(low, high, q, d_out, k, v, first, last, log_sum, offset, k_was, v_was, d_k, d_v):
        j, start, stop = pl.program_id(0), low[...], high[...]

        def add_rows(k, v, t, carry):
            k_sum, v_sum = carry
            g, here = jax.lax.rem(t, walk.group), pl.ds(jax.lax.div(t, walk.group) * b, b)
            scores = walk.scores(q[g, here, :], k, j, first[here], last[here])
            given = q[g, here, :], d_out[g, here, :], v, log_sum[g, here], offset[g, here]
            weights, change = d_scores(scores, *given)
            return (
                k_sum + _product(change, q[g, here, :], turned=(0, 0)),
                v_sum + _product(weights, d_out[g, here, :], turned=(0, 0)),
            )

        @pl.when(start < stop)  # keys that nobody sees keep what they have
        def add():
            group, carry = walk.group, (k_was[...], v_was[...])
            body = functools.partial(add_rows, k[...], v[...])
            bounds = start * group, stop * group
            sums = counted_loop("attention_query_blocks", *bounds, body, carry, walk.usual_rows)
            d_k[...], d_v[...] = sums

    B, M, length = walk.k.shape[:3]
    low, high = walk.rows_of_keys()
    was = [pad(x, 3, width) for x, width in ((so_far.k, wide), (so_far.v, wide_v))]

    def of_group(*width):
        block = (None, walk.group, walk.rows, *width)
        return pl.BlockSpec(block, lambda j, m, b: (b, m, *(0 for _ in block[2:])))

    def of_keys(width):
        return pl.BlockSpec((None, None, c, width), lambda j, m, b: (b, m, j, 0))

    of_rows = pl.BlockSpec((None, walk.rows), lambda j, m, b: (b, 0))
    number = pl.BlockSpec((None, None), lambda j, m, b: (b, j))
    d_k, d_v = walk.call(
        to_keys,
        grid=(length // c, M, B),
        inputs=[
            (low, number),
            (high, number),
            (rows[0], of_group(wide)),
            (rows[1], of_group(wide_v)),
            (walk.k, of_keys(wide)),
            (walk.v, of_keys(wide_v)),
            (walk.first, of_rows),
            (walk.last, of_rows),
            *((x, of_group()) for x in numbers),
            (was[0], of_keys(wide)),
            (was[1], of_keys(wide_v)),
        ],
        outputs=[(was[0], of_keys(wide)), (was[1], of_keys(wide_v))],
        aliases={10: 0, 11: 1},
    )
    d_k, d_v = d_k[..., : so_far.k.shape[-1]], d_v[..., : so_far.v.shape[-1]]
    return walk.merge(d_q, q.shape[-1]), dataclasses.replace(so_far, k=d_k, v=d_v)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Blocks of rows over the blocks of keys that they see. Widths are powers of two, of 16 up."""

    kept: int  # R
    group: int  # G
    size: int  # b rows in a block
    block: int  # c keys in a block
    k: jax.Array  # [B, M, T', d']
    v: jax.Array  # [B, M, T', dv']
    first: jax.Array  # int32 [B, R'], R' a multiple of b; rows that are added see nothing
    last: jax.Array  # int32 [B, R']
    scale: float
    scoring: Scoring
    usual: float  # blocks of keys that a block of rows sees
    interpret: bool

    @classmethod
    def of(cls, q, keys: Keys, first, last, scoring: Scoring) -> _Walk:
        k, v = (pad(x, 3, _power(x.shape[-1])) for x in (keys.k, keys.v))
        most = _TILE_BYTES // (max(k.shape[-1], v.shape[-1]) * k.dtype.itemsize)
        block = min(keys.block, max(_LEAST, min(64, most)))
        if keys.block % block or block != _power(block):
            raise ValueError(f"blocks of {keys.block} keys do not divide into powers of two")
        size = min(block, _power(q.shape[1]))
        usual = usual_blocks(dataclasses.replace(keys, block=block), size, scoring)
        return cls(
            kept=q.shape[1],
            group=q.shape[2] // k.shape[1],
            size=size,
            block=block,
            k=k,
            v=v,
            first=pad(first.astype(jnp.int32), 1, size),
            last=pad(last.astype(jnp.int32), 1, size, -1),
            scale=q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale,
            scoring=scoring,
            usual=usual,
            interpret=keys.kernel.endswith("interpreted"),
        )

    @property
    def rows(self) -> int:
        """R'"""
        return self.first.shape[1]

    @property
    def usual_rows(self) -> float:
        """Blocks of rows of all heads that a block of keys is seen by."""
        blocks = self.k.shape[2] // self.block
        return self.usual * self.group * (self.rows // self.size) / blocks

    def bounds(self, first, last, axis=None) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys that rows see: from this one, to the one before that."""
        some, length = last >= first, self.k.shape[2]
        start = jnp.where(some, first, length).min(axis)
        stop = jnp.where(some, last, -1).max(axis)
        return jax.lax.div(start, self.block), jax.lax.div(stop + self.block, self.block)

    def over_keys(self, first, last, body, carry):
        """carry = body(j, carry) for every block j of keys that some row sees; in a kernel."""
        bounds = self.bounds(first, last)
        return counted_loop("attention_key_blocks", *bounds, body, carry, self.usual)

    def rows_of_keys(self) -> tuple[jax.Array, jax.Array]:
        """int32 [B, T' / c] each: the blocks of rows that a block of keys is seen by."""
        first, last = (x.reshape(len(x), -1, self.size) for x in (self.first, self.last))
        start, stop = (x[..., None] for x in self.bounds(first, last, -1))
        j = jnp.arange(self.k.shape[2] // self.block)
        sees = (start <= j) & (j < stop)  # [B, R' / b, T' / c]
        i = jnp.arange(sees.shape[1], dtype=jnp.int32)[:, None]
        return jnp.where(sees, i, sees.shape[1]).min(1), jnp.where(sees, i, -1).max(1) + 1

    def scores(self, q, k, j, first, last) -> jax.Array:
        """float32 [b, c], MASKED where a row does not see a key."""
        scores = _product(q, k, turned=(1, 1)) * self.scale
        if self.scoring.softcap:
            scores = self.scoring.softcap * jnp.tanh(scores / self.scoring.softcap)
        key = j * self.block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where((key >= first[:, None]) & (key <= last[:, None]), scores, MASKED)

    # ------------------------------------------------------------------------------- layout
    def split(self, x: jax.Array, width: int) -> jax.Array:
        """[B, R, N, w] -> [B, N, R', width]"""
        return jnp.swapaxes(pad(pad(x, 3, width), 1, self.size), 1, 2)

    def merge(self, x: jax.Array, width: int) -> jax.Array:
        return jnp.swapaxes(x, 1, 2)[:, : self.kept, :, :width]

    # -------------------------------------------------------------------------- the call
    def shape(self, *width: int, dtype) -> jax.ShapeDtypeStruct:
        """Of what is written for every row and head."""
        B, M = self.k.shape[:2]
        return jax.ShapeDtypeStruct((B, M * self.group, self.rows, *width), dtype)

    def of_rows(self, *width: int) -> pl.BlockSpec:
        block = (None, None, self.size, *width)
        return pl.BlockSpec(block, lambda i, n, b: (b, n, i, *(0 for _ in width)))

    def of_all_keys(self, width: int) -> pl.BlockSpec:
        block = (None, None, self.k.shape[2], width)
        return pl.BlockSpec(block, lambda i, n, b: (b, jax.lax.div(n, self.group), 0, 0))

    @property
    def interval(self) -> list[tuple[jax.Array, pl.BlockSpec]]:
        of_rows = pl.BlockSpec((None, self.size), lambda i, n, b: (b, i))
        return [(self.first, of_rows), (self.last, of_rows)]

    def call_on_rows(self, kernel, **given) -> list[jax.Array]:
        """kernel for every block of rows, head and row of the batch."""
        B, M = self.k.shape[:2]
        grid = (self.rows // self.size, M * self.group, B)
        return self.call(kernel, grid=grid, **given)

    def call(self, kernel, *, grid, inputs, outputs, aliases=None) -> list[jax.Array]:
        with trip_count_scope("attention_kernel_blocks", math.prod(grid)):
            return pl.pallas_call(
                kernel,
                grid=grid,
                in_specs=[spec for _, spec in inputs],
                out_specs=[spec for _, spec in outputs],
                out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
                input_output_aliases=aliases or {},
                compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
                interpret=self.interpret,
            )(*(x for x, _ in inputs))


def _power(n: int) -> int:
    """The power of two that is n or more, and 16 at least."""
    return max(_LEAST, 1 << (n - 1).bit_length())


def _product(a: jax.Array, b: jax.Array, turned: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32; sums run over these axes of a and b."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=exact)
    sums = (((turned[0],), (turned[1],)), ((), ()))
    return dot(a, b, sums, preferred_element_type=jnp.float32)
