"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang & Sennrich 2019)."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., H], weight [H] -> [..., H] in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    # Rounded before the weight is applied, as the checkpoints' reference code does.
    return weight.astype(x.dtype) * wide.astype(x.dtype)
