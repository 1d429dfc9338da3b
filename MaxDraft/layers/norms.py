"""RMSNorm, y = x / sqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019); soft caps."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float, offset: float = 0.0) -> jax.Array:
    """x [..., H], weight [H] (None: ones) -> [..., H] in x's dtype, times (offset + weight)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is None:
        return wide.astype(x.dtype)
    if offset:
        return (wide * (offset + weight.astype(jnp.float32))).astype(x.dtype)
    # Rounded before the weight is applied, as transformers does.
    return weight.astype(x.dtype) * wide.astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap): bounded by the cap, x itself where x is small; cap 0: no cap."""
    return cap * jnp.tanh(x / cap) if cap else x
