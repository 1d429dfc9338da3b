"""The EAGLE-3 draft head: one Llama layer that reads the target's features (Li et al. 2025).

    state_0 = fc(features)                                  fused feature of row i
    input   = [norm(embedding of the next token), norm(state)]
    state'  = state + attention(input)
    state'  = state' + mlp(norm(state'))                    fed back as the next step's state
    logits  = lm_head(norm(state'))

B batch, T rows, H hidden size, I intermediate, N heads, M key/value heads, d head size,
D draft vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from MaxDraft.layers.mlp import gated_mlp, linear
from MaxDraft.layers.norms import rms_norm
from MaxDraft.layers.params import Param, Tree
from MaxDraft.layers.rope import Rope, cos_sin, rotate
from MaxDraft.sharding import constrain


@dataclasses.dataclass(frozen=True)
class HeadDims:
    """Dimensions of a draft head; hidden_size is the target's, whose embedding it reads."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    draft_vocab_size: int
    target_vocab_size: int
    norm_eps: float
    rope: Rope


def head_params(dims: HeadDims) -> Tree:
    """Table of the head's parameters, float32 masters, under the published tensor names."""
    H, I = dims.hidden_size, dims.intermediate_size
    q_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim

    def matrix(rows, cols, axes, name):
        return Param((rows, cols), axes, name, transposed=True)

    def norm(name):
        return Param((H,), (None,), name, init="ones")

    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    return {
        "fc": matrix(3 * H, H, ("draft_embed", None), "fc.weight"),
        "embedding_norm": norm("midlayer.input_layernorm.weight"),
        "state_norm": norm("midlayer.hidden_norm.weight"),
        "q": matrix(2 * H, q_size, ("draft_embed", "draft_heads"), attention + "q_proj.weight"),
        "k": matrix(2 * H, kv_size, ("draft_embed", "draft_kv_heads"), attention + "k_proj.weight"),
        "v": matrix(2 * H, kv_size, ("draft_embed", "draft_kv_heads"), attention + "v_proj.weight"),
        "o": matrix(q_size, H, ("draft_heads", "draft_embed"), attention + "o_proj.weight"),
        "mlp_norm": norm("midlayer.post_attention_layernorm.weight"),
        "mlp": {
            "gate": matrix(H, I, ("draft_embed", "draft_mlp"), mlp + "gate_proj.weight"),
            "up": matrix(H, I, ("draft_embed", "draft_mlp"), mlp + "up_proj.weight"),
            "down": matrix(I, H, ("draft_mlp", "draft_embed"), mlp + "down_proj.weight"),
        },
        "norm": norm("norm.weight"),
        "lm_head": matrix(
            H, dims.draft_vocab_size, ("draft_embed", "draft_vocab"), "lm_head.weight"
        ),
    }


def fuse(params: Tree, features: jax.Array) -> jax.Array:
    """Captured features [B, T, 3H] -> the state that enters step 0, [B, T, H]."""
    return constrain(linear(features, params["fc"]), "draft_batch", None, None)


def layer_input(params: Tree, dims: HeadDims, embeddings: jax.Array, state: jax.Array) -> jax.Array:
    """Embeddings [B, T, H] of the tokens that the rows read, state [B, T, H] -> [B, T, 2H]."""
    return jnp.concatenate(
        [
            rms_norm(embeddings, params["embedding_norm"], dims.norm_eps),
            rms_norm(state, params["state_norm"], dims.norm_eps),
        ],
        axis=-1,
    )


def queries(params: Tree, dims: HeadDims, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Layer input [B, T, 2H], positions int [B, T] of the rotary embedding -> [B, T, N, d]."""
    return rotate(_heads(params, dims, x, "q"), *cos_sin(dims.rope, positions))


def keys_values(
    params: Tree, dims: HeadDims, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Layer input [B, T, 2H] -> keys and values [B, T, M, d]."""
    keys = rotate(_heads(params, dims, x, "k"), *cos_sin(dims.rope, positions))
    return keys, _heads(params, dims, x, "v")


def _heads(params: Tree, dims: HeadDims, x: jax.Array, name: str) -> jax.Array:
    y = linear(x, params[name]).reshape(*x.shape[:2], -1, dims.head_dim)
    return constrain(y, "draft_batch", None, None, None)


def finish(params: Tree, dims: HeadDims, state: jax.Array, attended: jax.Array) -> jax.Array:
    """State [B, T, H] and attention output [B, T, N, d] -> the step's un-normed output [B, T, H].

    This is what the next step reads, and what `logits` reads.
    """
    x = state + linear(attended.reshape(*state.shape[:2], -1), params["o"])
    x = x + gated_mlp(rms_norm(x, params["mlp_norm"], dims.norm_eps), params["mlp"])
    return constrain(x, "draft_batch", None, None)


def logits(params: Tree, dims: HeadDims, state: jax.Array) -> jax.Array:
    """Un-normed output [..., H] -> float32 logits over the draft vocabulary [..., D]."""
    normed = head_input(params, dims, state)
    weight = params["lm_head"].astype(state.dtype)
    return jnp.matmul(normed, weight, preferred_element_type=jnp.float32)


def head_input(params: Tree, dims: HeadDims, state: jax.Array) -> jax.Array:
    """Un-normed output [..., H] -> what the LM head is multiplied with, [..., H]."""
    return rms_norm(state, params["norm"], dims.norm_eps)
