"""Rotary position embedding (Su et al. 2021) with the scalings that served checkpoints use.

Angle of pair j at position p: p * theta^(-2j/d), changed by the scaling:
    linear   all frequencies divided by `factor`
    llama3   long wavelengths divided by `factor`, short ones kept, a ramp between
    yarn     the ramp is over dimensions, and cos/sin are scaled (Peng et al. 2023)
    longrope every frequency divided by a factor of its own, cos/sin scaled (Ding et al. 2024)
Pairs are (x[j], x[j + d/2]), the rotate-half layout of most Hugging Face checkpoints, or, where a
family is `interleaved`, (x[2j], x[2j+1]). Dimensions past the first d of a head are not turned.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model; `kind` is default, linear, llama3, yarn or longrope."""

    theta: float
    head_dim: int  # d, the dimensions of a head that are turned
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0  # positions the unscaled model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    cos_scale: float = 1.0  # yarn's and longrope's attention factor, applied to cos and sin
    factors: tuple[float, ...] = ()  # longrope: of each pair
    interleaved: bool = False


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
    if rope.kind == "longrope":
        return freq / np.asarray(rope.factors, np.float32)
    return freq


def _llama3(freq: np.ndarray, rope: Rope) -> np.ndarray:
    wavelength = 2 * np.pi / freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    width = max(high - low, 1e-6)  # Llama 4 has no ramp between: the two factors are equal
    smooth = np.clip((rope.original_length / wavelength - low) / width, 0.0, 1.0)
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


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """x [B, T, N, >= d] turned by its positions' angles; computed in float32, x's dtype out."""
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = jnp.stack(pair, -1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)
