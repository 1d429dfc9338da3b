"""Gated MLP: down(activation(gate(x)) * up(x)) (Shazeer 2020, SwiGLU and GEGLU)."""

import functools

import jax

from MaxDraft.layers import quantized
from MaxDraft.layers.params import Quantized

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def linear(x: jax.Array, weight: jax.Array | Quantized, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] @ weight [I, O] (+ bias [O]) in x's dtype."""
    if isinstance(weight, Quantized):
        y = quantized.multiply(x, weight)
    else:
        y = x @ weight.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def gated_mlp(x: jax.Array, w: dict[str, jax.Array], activation: str = "silu") -> jax.Array:
    """x [..., H]; w: gate, up [H, I], down [I, H], optional gate_bias, up_bias, down_bias."""
    gate = ACTIVATIONS[activation](linear(x, w["gate"], w.get("gate_bias")))
    up = linear(x, w["up"], w.get("up_bias"))
    return linear(gate * up, w["down"], w.get("down_bias"))
