"""Long sequences in blocks: [B, T, ...] <-> [blocks, B, block, ...], padded with zeros."""

import jax
import jax.numpy as jnp


def split_length(x: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] -> [ceil(T / block), B, block, ...]."""
    block = min(block, x.shape[1])
    count = -(-x.shape[1] // block)
    pad = [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(x.shape[0], count, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def merge_length(blocks: jax.Array, length: int) -> jax.Array:
    """[blocks, B, block, ...] -> [B, length, ...], the padding cut off."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
