"""Rotary position embedding (RoPE, Su et al. 2021) with the scalings that served checkpoints use.

The angle of pair j at position p is p / theta^(2j/d). `rope_type` says how it is changed:
    linear   every frequency is divided by `factor`
    llama3   frequencies of long wavelengths are divided by `factor`, those of short ones are kept,
             and between the two there is a ramp over the wavelength
    yarn     the ramp goes over the dimensions, and cos and sin are scaled (Peng et al. 2023)
    longrope every frequency is divided by a factor of its own, and cos and sin are scaled
             (Ding et al. 2024)
A pair is (x[j], x[j + d/2]), the rotate-half layout of most Hugging Face checkpoints, or, where a
family is `interleaved`, (x[2j], x[2j+1]). Dimensions of a head past the first d are not rotated.

The angle is the product of a position and a rounded frequency, so an error of one unit in the last
place of the frequency grows with the position. Frequencies are therefore computed in the same order
of operations and with the same roundings as transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model; the names are those of Hugging Face's `rope_parameters`."""

    theta: float  # rope_theta
    rotary_dim: int  # d: head_dim * partial_rotary_factor, the dimensions that are rotated
    rope_type: str = "default"  # default, linear, llama3, yarn or longrope
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # the length that the unscaled model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ends of the ramp are rounded to whole dimensions
    attention_scaling: float = 1.0  # yarn and longrope: cos and sin are multiplied by it
    short_factor: tuple[float, ...] = ()  # longrope: the factor of each pair
    interleaved: bool = False


def frequencies(rope: Rope) -> np.ndarray:
    """float32 [d/2]: radians per position of each pair (transformers' `inv_freq`)."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    # NumPy's float32 power is up to two units in the last place off. The power is taken in float64
    # and rounded once, and only then is the reciprocal taken in float32, as torch does.
    periods = (np.float64(np.float32(rope.theta)) ** exponents.astype(np.float64)).astype(
        np.float32
    )
    match rope.rope_type:
        case "linear":
            return _reciprocal(periods) / np.float32(rope.factor)
        case "llama3":
            return _llama3(_reciprocal(periods), rope)
        case "yarn":
            return _yarn(periods, rope)
        case "longrope":
            return _reciprocal(np.asarray(rope.short_factor, np.float32) * periods)
    return _reciprocal(periods)


def _reciprocal(periods: np.ndarray) -> np.ndarray:
    return np.float32(1) / periods


def _llama3(freq: np.ndarray, rope: Rope) -> np.ndarray:
    """Frequencies [d/2] of the unscaled model -> those of Llama 3.1."""
    length, factor = rope.original_max_position_embeddings, np.float32(rope.factor)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    # torch divides a number by a tensor as the number times the tensor's reciprocal.
    wavelength = np.float32(2 * math.pi) * _reciprocal(freq)
    scaled = np.where(wavelength > np.float32(length / low), freq / factor, freq)
    if low == high:  # Llama 4 has no ramp
        return scaled
    smooth = np.float32(length) * _reciprocal(wavelength) - np.float32(low)
    smooth = smooth / np.float32(high - low)
    ramp = (1 - smooth) * scaled / factor + smooth * scaled
    long, short = np.float32(length / low), np.float32(length / high)
    return np.where((wavelength >= short) & (wavelength <= long), ramp, scaled)


def _yarn(periods: np.ndarray, rope: Rope) -> np.ndarray:
    """Radians per position are blended from those of the unscaled and the stretched model."""
    length, dim = rope.original_max_position_embeddings, rope.rotary_dim

    def dimension_with(rotations: float) -> float:
        """The dimension whose pair makes so many rotations over the original length."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high if high != low else low + 0.001
    pairs = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    keep = 1 - ramp
    stretched = _reciprocal(np.float32(rope.factor) * periods)
    return stretched * (1 - keep) + _reciprocal(periods) * keep


def cos_sin(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions int [B, T] -> cos, sin float32 [B, T, d/2]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope)
    return jnp.cos(angles) * rope.attention_scaling, jnp.sin(angles) * rope.attention_scaling


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotates the first d dimensions of every head by the angles of its token's position.

    x [B, T, N, >= d]; cos, sin float32 [B, T, d/2]. Computed in float32; x's shape and dtype out.
    """
    size = 2 * cos.shape[-1]
    rotary, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = jnp.split(rotary, 2, axis=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        rotated = jnp.stack(pair, -1).reshape(rotary.shape)
    else:
        rotated = jnp.concatenate(pair, -1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], -1)
