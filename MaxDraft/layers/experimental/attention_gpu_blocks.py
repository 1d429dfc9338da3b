"""Blocks of queries over the blocks of keys that they see, as grids of GPU kernels.

Blocks are of 64 queries and keys at most, whatever `KeyValueBlocks` has. Widths that are no power
of two are padded at every call, those of the keys' gradients too, by copies. Products of float32
are computed in float32, not in TF32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from MaxDraft.layers.attention_keys import (
    MASKED,
    KeyValueBlocks,
    Scoring,
    expected_key_blocks,
    pad_to_multiple,
)
from MaxDraft.layers.loops import counted_loop, trip_count_scope
from MaxDraft.layers.norms import soft_cap

_MIN_WIDTH = 16  # what the GPU's matrix units take
_MAX_BLOCK = 64
_MAX_TILE_BYTES = 32 * 1024  # of a block of queries or keys: several must fit into shared memory


@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """[B, R, N, w] <-> [B, N, R', w'], R' a multiple of b, w' a power of two from 16 up."""

    num_queries: int  # R
    group: int  # G query heads share a key head
    size: int  # b queries in a block
    key_block: int  # c keys in a block
    k: jax.Array  # [B, M, T', d']
    v: jax.Array  # [B, M, T', dv']
    first: jax.Array  # int32 [B, R']; queries that are appended see no key
    last: jax.Array  # int32 [B, R']
    scale: float
    scoring: Scoring
    expected_key_blocks: float  # that a block of queries sees
    interpret: bool

    @classmethod
    def from_arrays(
        cls, q, keys: KeyValueBlocks, first, last, scoring: Scoring, interpret: bool
    ) -> QueryBlocks:
        """Raises ValueError where the blocks of `keys` are no multiple of a power of two."""
        k, v = (pad_to_multiple(x, 3, _power_of_two(x.shape[-1])) for x in (keys.k, keys.v))
        fitting = _MAX_TILE_BYTES // (max(k.shape[-1], v.shape[-1]) * k.dtype.itemsize)
        block = min(keys.block, max(_MIN_WIDTH, min(_MAX_BLOCK, fitting)))
        if keys.block % block or block != _power_of_two(block):
            raise ValueError(f"blocks of {keys.block} keys do not divide into powers of two")
        size = min(block, _power_of_two(q.shape[1]))
        return cls(
            num_queries=q.shape[1],
            group=q.shape[2] // k.shape[1],
            size=size,
            key_block=block,
            k=k,
            v=v,
            first=pad_to_multiple(first.astype(jnp.int32), 1, size),
            last=pad_to_multiple(last.astype(jnp.int32), 1, size, -1),
            scale=scoring.scale_for(q.shape[-1]),
            scoring=scoring,
            expected_key_blocks=expected_key_blocks(
                dataclasses.replace(keys, block=block), size, scoring
            ),
            interpret=interpret,
        )

    @property
    def length(self) -> int:
        """R'"""
        return self.first.shape[1]

    @property
    def expected_query_blocks(self) -> float:
        """Blocks of queries, of all heads of a group, that see a block of keys."""
        key_blocks = self.k.shape[2] // self.key_block
        return self.expected_key_blocks * self.group * (self.length // self.size) / key_blocks

    def visible(self, first, last, axis=None) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys that some query sees: from this one, to the one before that."""
        sees_a_key, length = last >= first, self.k.shape[2]
        start = jnp.where(sees_a_key, first, length).min(axis)
        stop = jnp.where(sees_a_key, last, -1).max(axis)
        c = self.key_block
        return jax.lax.div(start, c), jax.lax.div(stop + c, c)

    def loop_over_keys(self, first, last, body, carry):
        """carry = body(j, carry) for every block of keys j that some query sees; in a kernel."""
        bounds = self.visible(first, last)
        return counted_loop("attention_key_blocks", *bounds, body, carry, self.expected_key_blocks)

    def queries_of_keys(self) -> tuple[jax.Array, jax.Array]:
        """int32 [B, T' / c] each: the blocks of queries that see a block of keys, as `visible`."""
        first, last = (x.reshape(len(x), -1, self.size) for x in (self.first, self.last))
        start, stop = (x[..., None] for x in self.visible(first, last, -1))
        j = jnp.arange(self.k.shape[2] // self.key_block)
        sees = (start <= j) & (j < stop)  # [B, R' / b, T' / c]
        i = jnp.arange(sees.shape[1], dtype=jnp.int32)[:, None]
        return jnp.where(sees, i, sees.shape[1]).min(1), jnp.where(sees, i, -1).max(1) + 1

    def scores(self, q, k, j, first, last) -> jax.Array:
        """float32 [b, c], MASKED where a query does not see a key."""
        scores = soft_cap(product(q, k, contracted=(1, 1)) * self.scale, self.scoring.softcap)
        key = j * self.key_block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where((key >= first[:, None]) & (key <= last[:, None]), scores, MASKED)

    # ------------------------------------------------------------------------------- layout
    def split(self, x: jax.Array, width: int) -> jax.Array:
        """[B, R, N, w] -> [B, N, R', width]"""
        return jnp.swapaxes(pad_to_multiple(pad_to_multiple(x, 3, width), 1, self.size), 1, 2)

    def merge(self, x: jax.Array, width: int) -> jax.Array:
        """[B, N, R', w'] -> [B, R, N, width]"""
        return jnp.swapaxes(x, 1, 2)[:, : self.num_queries, :, :width]

    def query_shape(self, *width: int, dtype) -> jax.ShapeDtypeStruct:
        """Of what a kernel writes for every query and head."""
        B, M = self.k.shape[:2]
        return jax.ShapeDtypeStruct((B, M * self.group, self.length, *width), dtype)

    # -------------------------------------------------- the grid (block of queries, head, batch)
    def query_spec(self, *width: int) -> pl.BlockSpec:
        block = (None, None, self.size, *width)
        return pl.BlockSpec(block, lambda i, n, b: (b, n, i, *(0 for _ in width)))

    def all_keys_spec(self, width: int) -> pl.BlockSpec:
        block = (None, None, self.k.shape[2], width)
        return pl.BlockSpec(block, lambda i, n, b: (b, jax.lax.div(n, self.group), 0, 0))

    @property
    def bounds(self) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """`first` and `last` of a block of queries."""
        spec = pl.BlockSpec((None, self.size), lambda i, n, b: (b, i))
        return [(self.first, spec), (self.last, spec)]

    def call_over_queries(self, kernel, **arrays) -> list[jax.Array]:
        B, M = self.k.shape[:2]
        grid = (self.length // self.size, M * self.group, B)
        return self._call("attention_query_blocks", kernel, grid, **arrays)

    # ------------------------------------------------- the grid (block of keys, key head, batch)
    def key_spec(self, width: int) -> pl.BlockSpec:
        block = (None, None, self.key_block, width)
        return pl.BlockSpec(block, lambda j, m, b: (b, m, j, 0))

    def group_spec(self, *width: int) -> pl.BlockSpec:
        """All queries of the heads that share a key head."""
        block = (None, self.group, self.length, *width)
        return pl.BlockSpec(block, lambda j, m, b: (b, m, *(0 for _ in block[2:])))

    @property
    def all_bounds(self) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """`first` and `last` of all queries."""
        spec = pl.BlockSpec((None, self.length), lambda j, m, b: (b, 0))
        return [(self.first, spec), (self.last, spec)]

    def key_bounds(self, *numbers: jax.Array) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """One number for each block of keys, int32 [B, T' / c]."""
        spec = pl.BlockSpec((None, None), lambda j, m, b: (b, j))
        return [(x, spec) for x in numbers]

    def call_over_keys(self, kernel, **arrays) -> list[jax.Array]:
        B, M, length = self.k.shape[:3]
        grid = (length // self.key_block, M, B)
        return self._call("attention_key_blocks", kernel, grid, **arrays)

    def _call(
        self,
        name: str,
        kernel,
        grid: Sequence[int],
        *,
        inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
        outputs: Sequence[tuple[jax.ShapeDtypeStruct | jax.Array, pl.BlockSpec]],
        aliases: dict[int, int] | None = None,
    ) -> list[jax.Array]:
        with trip_count_scope(name, math.prod(grid)):
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


def _power_of_two(n: int) -> int:
    """The power of two that is n or more, and 16 at least."""
    return max(_MIN_WIDTH, 1 << (n - 1).bit_length())


def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 product of matrices; sums run over these axes of a and b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=precision)
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return dot(a, b, axes, preferred_element_type=jnp.float32)
