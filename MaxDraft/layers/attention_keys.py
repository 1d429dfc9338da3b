"""What attention reads: keys and values in blocks, and how queries score them.

The implementations of blockwise attention share this: attention_xla.py, and the kernels of
experimental/.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

MASKED = -1e30  # the score of a key that is not visible; finite: a query without keys gives no NaN
# The running maximum before any key: above MASKED, so that exp(MASKED - INITIAL_MAXIMUM) is 0.
INITIAL_MAXIMUM = -1e29


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How queries score keys, where it is not q k / sqrt(d) over all keys before them."""

    scale: float | None = None  # of q k; None: d ** -0.5
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: as they are
    window: int = 0  # sliding window: a query sees itself and window - 1 keys before it; 0: all
    chunk: int = 0  # chunked attention: a query sees its own chunk of positions; 0: all

    def scale_for(self, head_dim: int) -> float:
        """The factor of q k for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale


PLAIN = Scoring()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueBlocks:
    """Keys and values, or their gradients, laid out to be read a block at a time."""

    k: jax.Array  # [B, M, T', d], T' a multiple of the block
    v: jax.Array  # [B, M, T', dv]
    block: int = dataclasses.field(metadata={"static": True})  # keys in a block
    reach: int = dataclasses.field(metadata={"static": True})  # keys that a query sees, at most
    kernel: str = dataclasses.field(metadata={"static": True})  # of attention.IMPLEMENTATIONS

    @classmethod
    def from_arrays(
        cls,
        k: jax.Array,  # [B, T, M, d]
        v: jax.Array,  # [B, T, M, dv]
        block: int,
        reach: int | None = None,  # None: all of T
        kernel: str = "xla",
    ) -> KeyValueBlocks:
        """Lays keys and values out in blocks; T is padded with zeros to a multiple of the block."""
        reach = k.shape[1] if reach is None else reach
        if kernel == "xla":  # the blocks of a kernel are as wide as its device needs them
            block = min(block, k.shape[1])
        k, v = (pad_to_multiple(jnp.swapaxes(x, 1, 2), 2, block) for x in (k, v))
        return cls(k, v, block, reach, kernel)

    def arrays(self, length: int) -> tuple[jax.Array, jax.Array]:
        """k [B, T, M, d] and v [B, T, M, dv] without the padding; length: T."""
        return jnp.swapaxes(self.k, 1, 2)[:, :length], jnp.swapaxes(self.v, 1, 2)[:, :length]

    def zeros(self) -> KeyValueBlocks:
        """float32 zeros to which gradients are added."""
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (self.k, self.v))
        return dataclasses.replace(self, **dict(zip("kv", zeros, strict=True)))


def expected_key_blocks(keys: KeyValueBlocks, queries: int, scoring: Scoring) -> float:
    """Blocks of keys that a block of queries sees, on average over rows of one long document each.

    queries: neighbouring queries in a block.
    """
    blocks = (-(-keys.reach // keys.block) + 1) / 2
    if scoring.window:  # b queries together see b + window - 1 keys
        blocks = min(blocks, 1 + (queries + scoring.window - 2) / keys.block)
    if scoring.chunk:
        blocks = min(blocks, (-(-scoring.chunk // keys.block) + 1) / 2)
    return blocks


def softcap_slope(scores: jax.Array, softcap: float) -> jax.Array:
    """The derivative of softcap * tanh(x / softcap) by x, from the capped scores; 0 if masked."""
    return 1 - (jnp.maximum(scores, -softcap) / softcap) ** 2


def pad_to_multiple(x: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    """Appends `value` along an axis, up to a multiple of the block."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)
