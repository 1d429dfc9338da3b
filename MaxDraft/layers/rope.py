"""Rotary position embedding (Su et al. 2021) with the scalings that served checkpoints use.

Angle of pair j at position p: p * theta^(-2j/d), changed by the scaling:
    linear   all frequencies divided by `factor`
    llama3   long wavelengths divided by `factor`, short ones kept, a ramp between
    yarn     the ramp is over dimensions, and cos/sin are scaled (Peng et al. 2023)
Pairs are (x[j], x[j + d/2]): the rotate-half layout of the Hugging Face checkpoints.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model; `kind` is default, linear, llama3 or yarn."""

    theta: float
    head_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0  # positions the unscaled model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    cos_scale: float = 1.0  # yarn's attention factor, applied to cos and sin


def frequencies(rope: Rope) -> np.ndarray:
    """float32 [d/2]: radians per position of each pair."""
    exponents = np.arange(0, rope.head_dim, 2, dtype=np.float32) / np.float32(rope.head_dim)
    freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return freq / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(freq, rope)
    if rope.kind == "yarn":
        return _yarn(freq, rope)
    return freq


def _llama3(freq: np.ndarray, rope: Rope) -> np.ndarray:
    wavelength = 2 * np.pi / freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((rope.original_length / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * freq / rope.factor + smooth * freq).astype(np.float32)


def _yarn(freq: np.ndarray, rope: Rope) -> np.ndarray:
    def dimension_with(rotations: float) -> float:  # that turns so often over original_length
        turns = rope.original_length / (rotations * 2 * math.pi)
        return rope.head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    high = high if high != low else low + 0.001
    ramp = np.clip((np.arange(rope.head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return (freq * (1 - ramp) + freq / rope.factor * ramp).astype(np.float32)


def cos_sin(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions int [B, T] -> cos, sin float32 [B, T, d/2]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope)
    return jnp.cos(angles) * rope.cos_scale, jnp.sin(angles) * rope.cos_scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, N, d] turned by its positions' angles; computed in float32, x's dtype out."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x.dtype
    )
