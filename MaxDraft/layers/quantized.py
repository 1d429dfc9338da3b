"""Arithmetic on weights that stay quantized in memory: y = x @ dequantized(q), tile by tile.

    FP8     w[i, o] = values[i, o] * scale[i // a, o // b]
    MXFP4   w[i, o] = e2m1(nibble i of values[:, o]) * 2 ^ (scale[i // 32, o] - 127)

Values are bytes, also those of FP8: bytes are sliced in place, while a compiler without 8-bit
floats first converts a whole array of them into a wider dtype.

A scan takes one tile of q at a time, dequantizes it and multiplies, so that the dequantized matrix
never exists as a whole. Tiles are cut along q.tiled:
    "in"    y = sum over tiles of x[:, tile] @ w[tile, :], summed in float32
    "out"   y[:, tile] = x @ w[:, tile]

`multiply(x, q, product)` does this for any product that is linear in the weight, also where q is
[experts, in, out]: multiply(x, q, lambda x, w: ragged_dot(x, w, group_sizes)).
One expert of q is jax.tree.map(lambda leaf: leaf[e], q), again a Quantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from MaxDraft.layers.params import Quantized

_TILE = 1 << 22  # at most so many numbers in a dequantized tile, where the shape allows it
_NARROWEST = 128  # inputs or outputs of a tile: with fewer, matrix units would be partly idle


def dequantize(q: Quantized, dtype: jnp.dtype) -> jax.Array:
    """The whole matrix [..., in, out]."""
    if q.kind == "mxfp4":
        return _mxfp4(q).astype(dtype)
    *lead, rows, cols = q.values.shape
    a, b = q.scale.shape[-2:]
    numbers = jax.lax.bitcast_convert_type(q.values, jnp.float8_e4m3fn).astype(jnp.float32)
    blocks = numbers.reshape(*lead, a, rows // a, b, cols // b)
    return (blocks * q.scale[..., :, None, :, None]).reshape(q.values.shape).astype(dtype)


def _mxfp4(q: Quantized) -> jax.Array:
    """[..., in, out] float32."""
    halves = jnp.stack([q.values & 15, q.values >> 4], axis=-2)  # [..., in / 2, 2, out]
    code = halves.reshape(*q.values.shape[:-2], q.in_size, -1).astype(jnp.uint32)
    size = code & 7
    # Two bits of exponent with bias 1, one of mantissa; exponent 0 counts halves.
    normal = _float32_of_bits(((size >> 1) + 126) << 23 | (size & 1) << 22)
    number = jnp.where(size < 2, 0.5 * size.astype(jnp.float32), normal)
    # The scale's exponent has the bias of float32, and is put where float32 has its own. With an
    # exponent of 0 it would be 2^-127, a subnormal number that accelerators flush to zero.
    power = _float32_of_bits(q.scale.astype(jnp.uint32) << 23)
    signed = jnp.where(code > 7, -number, number)
    return signed * jnp.repeat(power, q.in_size // q.scale.shape[-2], axis=-2)


def _float32_of_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def multiply(
    x: jax.Array,  # [..., in]
    q: Quantized,
    product: Callable[[jax.Array, jax.Array], jax.Array] = _matmul,
) -> jax.Array:
    """product(x, dequantize(q, x.dtype)) [..., out] in x's dtype, tile by tile.

    product(x [..., i], w [..., i, o]) -> [..., o] for any range of inputs or outputs; it should
    give float32, which the tiles are summed in.
    """
    count = tile_count(q)
    if count == 1:
        return product(x, dequantize(q, x.dtype)).astype(x.dtype)
    if q.tiled == "in":
        size = q.in_size // count

        def add(total, index):
            part = jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=-1)
            weight = dequantize(tile(q, index, count), x.dtype)
            return total + product(part, weight).astype(jnp.float32), None

        shape = jax.eval_shape(lambda x: product(x, dequantize(q, x.dtype)), x).shape
        total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), jnp.arange(count))
        return total.astype(x.dtype)
    parts = jax.lax.map(
        lambda index: product(x, dequantize(tile(q, index, count), x.dtype)).astype(x.dtype),
        jnp.arange(count),
    )  # [tiles, ..., out / tiles]
    parts = jnp.moveaxis(parts, 0, -2)
    return parts.reshape(*parts.shape[:-2], -1)


def tile_count(q: Quantized) -> int:
    """The number of equal tiles that the matrix is cut into along q.tiled."""
    size, block = _along(q)
    numbers = q.in_size * math.prod(q.values.shape) // q.values.shape[-2]
    counts = [
        n
        for n in range(1, size + 1)
        if size % n == 0 and size // n % block == 0 and size // n >= min(_NARROWEST, size)
    ]
    return next((n for n in counts if numbers // n <= _TILE), counts[-1])


def tile(q: Quantized, index: jax.Array, count: int) -> Quantized:
    """Tile number `index` of `count`."""
    axis = -2 if q.tiled == "in" else -1

    def cut(leaf):
        if leaf.shape[axis] == 1:  # one scale for the whole dimension
            return leaf
        size = leaf.shape[axis] // count
        return jax.lax.dynamic_slice_in_dim(leaf, index * size, size, axis=axis)

    return dataclasses.replace(
        q,
        values=cut(q.values),
        scale=cut(q.scale),
        in_size=q.in_size // count if q.tiled == "in" else q.in_size,
    )


def _along(q: Quantized) -> tuple[int, int]:
    """Size of the tiled dimension, and how many numbers along it share a scale."""
    axis = -2 if q.tiled == "in" else -1
    size = q.in_size if q.tiled == "in" else q.values.shape[-1]
    scales = q.scale.shape[axis]
    return size, 1 if scales == 1 else size // scales
