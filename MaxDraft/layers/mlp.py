"""SiLU-gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

import jax


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] @ weight [I, O] (+ bias [O]) in x's dtype."""
    y = x @ weight.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def gated_mlp(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """x [..., H]; w: gate, up [H, I], down [I, H], optional gate_bias, up_bias, down_bias."""
    gate = jax.nn.silu(linear(x, w["gate"], w.get("gate_bias")))
    up = linear(x, w["up"], w.get("up_bias"))
    return linear(gate * up, w["down"], w.get("down_bias"))
