"""What attention reads: keys and values in blocks, and how queries score them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# attention_xla.py, attention_tpu.py, attention_gpu.py; tests interpret the kernels.
KERNELS = ("xla", "tpu", "gpu", "tpu_interpreted", "gpu_interpreted")
MASKED = -1e30  # finite, so that a row without any key stays free of NaN
NOTHING = -1e29  # the maximum of no scores: above MASKED, so that exp(MASKED - it) is 0


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
    kernel: str = dataclasses.field(metadata={"static": True})  # one of KERNELS

    @classmethod
    def of(
        cls,
        k: jax.Array,  # [B, T, M, d]
        v: jax.Array,  # [B, T, M, dv]
        block: int,
        reach: int | None = None,  # None: all of T
        kernel: str = "xla",
    ) -> Keys:
        reach = k.shape[1] if reach is None else reach
        if kernel == "xla":  # a kernel's blocks are as wide as its device has it
            block = min(block, k.shape[1])
        k, v = (pad(jnp.swapaxes(x, 1, 2), 2, block) for x in (k, v))
        return cls(k, v, block, reach, kernel)

    def arrays(self, length: int) -> tuple[jax.Array, jax.Array]:
        """k [B, T, M, d] and v [B, T, M, dv] again."""
        return jnp.swapaxes(self.k, 1, 2)[:, :length], jnp.swapaxes(self.v, 1, 2)[:, :length]

    def zeros(self) -> Keys:
        """Gradients of nothing yet, float32."""
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (self.k, self.v))
        return dataclasses.replace(self, **dict(zip("kv", zeros, strict=True)))


def usual_blocks(keys: Keys, rows: int, scoring: Scoring) -> float:
    """Blocks of keys that a block of rows sees, on average over documents as long as can be."""
    usual = (-(-keys.reach // keys.block) + 1) / 2
    if scoring.window:  # b rows see b + window - 1 keys
        usual = min(usual, 1 + (rows + scoring.window - 2) / keys.block)
    if scoring.chunk:
        usual = min(usual, (-(-scoring.chunk // keys.block) + 1) / 2)
    return usual


def pad(x: jax.Array, axis: int, block: int, value: float = 0) -> jax.Array:
    """Up to a multiple of the block."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)
