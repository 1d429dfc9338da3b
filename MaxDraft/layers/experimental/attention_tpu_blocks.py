"""Blocks of queries over the blocks of keys that they see, as grids of TPU kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from MaxDraft.layers.attention_keys import (
    MASKED,
    KeyValueBlocks,
    Scoring,
    expected_key_blocks,
    pad_to_multiple,
)
from MaxDraft.layers.loops import trip_count_scope
from MaxDraft.layers.norms import soft_cap

# Of a vector register: a number for each query is repeated over so many lanes or sublanes.
LANES, SUBLANES = 128, 8
# Of a block: scores [queries, keys] and what is computed from them must fit into VMEM.
_MAX_QUERIES = 1024


@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """[B, R, N, w] <-> [B, M, I, r, w]: b queries times the G heads of a group, r = G b.

    The last block is filled with queries that see no key.
    """

    num_queries: int  # R
    group: int  # G
    size: int  # b
    keys: KeyValueBlocks
    scoring: Scoring
    first: jax.Array  # int32 [B, I, r]
    last: jax.Array  # int32 [B, I, r]
    start: jax.Array  # int32 [B, I] a block of queries sees the blocks of keys from this one
    stop: jax.Array  # int32 [B, I] to the one before this
    interpret: bool

    @classmethod
    def from_arrays(
        cls, q, keys: KeyValueBlocks, first, last, scoring: Scoring, interpret: bool
    ) -> QueryBlocks:
        group, size = q.shape[2] // keys.k.shape[1], keys.block
        while group * size > _MAX_QUERIES and size % (2 * SUBLANES) == 0:
            size //= 2

        def split(x, value):
            x = pad_to_multiple(x.astype(jnp.int32), 1, size, value)
            return jnp.tile(x.reshape(len(x), -1, size), group)

        first, last = split(first, 0), split(last, -1)
        sees_a_key = last >= first
        start = jnp.where(sees_a_key, first, keys.k.shape[2]).min(-1) // keys.block
        stop = jnp.where(sees_a_key, last, -1).max(-1) // keys.block + 1
        return cls(q.shape[1], group, size, keys, scoring, first, last, start, stop, interpret)

    @property
    def length(self) -> int:
        """r"""
        return self.group * self.size

    @property
    def count(self) -> int:
        """I"""
        return self.start.shape[1]

    @property
    def scale(self) -> float:
        return self.scoring.scale_for(self.keys.k.shape[-1])

    @property
    def bounds(self) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """`first` and `last` as inputs of a kernel [r, lanes], the same for all heads."""
        spec = pl.BlockSpec((None, None, self.length, LANES), lambda b, m, i, j, *_: (b, i, 0, 0))
        return [(self.columns(self.first), spec), (self.columns(self.last), spec)]

    def scores(self, a, b, block, first, last, keys_axis: int) -> jax.Array:
        """float32 a b^T of a block of keys and one of queries, MASKED where a key is not visible.

        first, last: [r, 1] where keys lie along axis 1, [1, r] where they lie along axis 0.
        """
        scores = soft_cap(product_transposed(a[...], b[...]) * self.scale, self.scoring.softcap)
        key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, keys_axis)
        key += block * self.keys.block
        return jnp.where((key >= first) & (key <= last), scores, MASKED)

    # ------------------------------------------------------------------------------- layout
    def split(self, x: jax.Array) -> jax.Array:
        """[B, R, N, w] -> [B, M, I, r, w]"""
        x = pad_to_multiple(x, 1, self.size)
        x = x.reshape(len(x), -1, self.size, x.shape[2] // self.group, self.group, x.shape[3])
        x = x.transpose(0, 3, 1, 4, 2, 5)  # [B, M, I, G, b, w]
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def merge(self, x: jax.Array) -> jax.Array:
        """[B, M, I, r, w] -> [B, R, N, w]"""
        x = x.reshape(*x.shape[:3], self.group, -1, x.shape[-1])
        x = x.transpose(0, 2, 4, 1, 3, 5)  # [B, I, b, M, G, w]
        x = x.reshape(len(x), -1, x.shape[3] * self.group, x.shape[-1])
        return x[:, : self.num_queries]

    def columns(self, x: jax.Array) -> jax.Array:
        """[..., r] -> [..., r, lanes]"""
        return jnp.broadcast_to(x[..., None], (*x.shape, LANES))

    def lines(self, x: jax.Array) -> jax.Array:
        """[..., r] -> [..., sublanes, r]"""
        return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], SUBLANES, x.shape[-1]))

    def query_shape(self, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """Of what a kernel writes for every query."""
        B, M = self.keys.k.shape[:2]
        return jax.ShapeDtypeStruct((B, M, self.count, self.length, width), dtype)

    def query_spec(self, width: int) -> pl.BlockSpec:
        """A block of queries, on the grid of `call_over_keys`."""
        block = (None, None, None, self.length, width)
        return pl.BlockSpec(block, lambda b, m, i, j, *_: (b, m, i, 0, 0))

    def key_spec(self, width: int) -> pl.BlockSpec:
        """A block of keys, on the grid of `call_over_keys`.

        After the last visible block the index stays there, so that nothing more is fetched.
        """

        def index(b, m, i, j, start, stop):
            return b, m, jnp.maximum(jnp.minimum(start[b, i] + j, stop[b, i] - 1), 0), 0

        return pl.BlockSpec((None, None, self.keys.block, width), index)

    def outer_key_spec(self, width: int) -> pl.BlockSpec:
        """A block of keys, on the grid of `call_over_queries`; after the last the index stays."""

        def index(b, m, j, i, start, stop, low, high):
            return b, m, jnp.maximum(jnp.minimum(low[b] + j, high[b] - 1), 0), 0

        return pl.BlockSpec((None, None, self.keys.block, width), index)

    # -------------------------------------------------------------------------- the calls
    def call_over_keys(self, kernel, **arrays) -> list[jax.Array]:
        """kernel(start, stop, ...) on the grid (batch, key head, block of queries, of keys)."""
        B, M = self.keys.k.shape[:2]
        longest = jnp.maximum((self.stop - self.start).max(), 1)
        grid, scalars = (B, M, self.count, longest), [self.start, self.stop]
        return self._call("attention_query_blocks", kernel, grid, scalars, **arrays)

    def call_over_queries(self, kernel, **arrays) -> list[jax.Array]:
        """kernel(start, stop, low, high, ...) on the grid (batch, key head, block of keys, ...)."""
        B, M = self.keys.k.shape[:2]
        low, high = self.start.min(1), self.stop.max(1)  # the blocks of keys that any query sees
        longest = jnp.maximum((high - low).max(), 1)
        grid, scalars = (B, M, longest, self.count), [self.start, self.stop, low, high]
        return self._call("attention_key_blocks", kernel, grid, scalars, **arrays)

    def _call(
        self,
        name: str,
        kernel,
        grid: Sequence[int | jax.Array],
        scalars: Sequence[jax.Array],
        *,
        inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
        outputs: Sequence[tuple[jax.ShapeDtypeStruct | jax.Array, pl.BlockSpec]],
        scratch: Sequence[tuple[int, int]],
        aliases: dict[int, int] | None = None,
    ) -> list[jax.Array]:
        B, M = self.keys.k.shape[:2]
        key_blocks = expected_key_blocks(self.keys, self.size, self.scoring)
        with trip_count_scope(name, B * M * self.count * key_blocks):
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
                interpret=self.interpret,
            )(*scalars, *(x for x, _ in inputs))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [m, n] [n, w] -> [m, w]"""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def product_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [m, w] [n, w] -> [m, n]"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
