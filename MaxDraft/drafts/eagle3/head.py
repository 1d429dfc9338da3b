"""The EAGLE-3 draft head: one Llama layer that reads hidden states of the target (Li et al. 2025).

    state_0 = fc(aux_hidden_states)                         fused outputs of C captured layers
    input   = [norm(embedding of the next token), norm(state)]
    state'  = state + attention(input)
    state'  = state' + mlp(norm(state'))                    fed back as the next step's state
    logits  = lm_head(norm(state'))

EAGLE-3.1 (arXiv:2605.09992): `fc_norm` norms each captured layer's output before fc; with
`norm_output` the state that is fed back is norm(state'), which the LM head reads as it is.

B batch, T positions, H hidden size, I intermediate, N query heads, M key/value heads (GQA),
d head size, C captured layers, D draft vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from MaxDraft.drafts.eagle3.dims import NUM_CAPTURED, HeadDims
from MaxDraft.layers.mlp import gated_mlp, linear
from MaxDraft.layers.norms import rms_norm
from MaxDraft.layers.params import Param, Tree
from MaxDraft.layers.rope import cos_sin, rotate
from MaxDraft.sharding import constrain


def head_params(dims: HeadDims) -> Tree:
    """Table of the head's parameters, float32 masters, under the published tensor names."""
    H, I = dims.hidden_size, dims.intermediate_size
    q_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim

    def matrix(rows, cols, axes, name):
        return Param((rows, cols), axes, name, transposed=True)

    def norm(name):
        return Param((H,), (None,), name, init="ones")

    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    fc_norm = {str(i): norm(f"fc_norm.{i}.weight") for i in range(NUM_CAPTURED)}
    return {
        **({"fc_norm": fc_norm} if dims.fc_norm else {}),
        "fc": matrix(NUM_CAPTURED * H, H, ("draft_embed", None), "fc.weight"),
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


def fuse_aux_hidden_states(params: Tree, dims: HeadDims, aux_hidden_states: jax.Array) -> jax.Array:
    """Captured layers' outputs [B, T, C * H] -> the state that enters step 0, [B, T, H]."""
    x = aux_hidden_states
    if dims.fc_norm:
        parts = jnp.split(x, NUM_CAPTURED, axis=-1)
        x = jnp.concatenate(
            [rms_norm(y, params["fc_norm"][str(i)], dims.norm_eps) for i, y in enumerate(parts)],
            axis=-1,
        )
    return constrain(linear(x, params["fc"]), "draft_batch", None, None)


def layer_input(params: Tree, dims: HeadDims, embeddings: jax.Array, state: jax.Array) -> jax.Array:
    """Embeddings [B, T, H] of the tokens that are read, state [B, T, H] -> [B, T, 2H]."""
    return jnp.concatenate(
        [
            rms_norm(embeddings, params["embedding_norm"], dims.norm_eps),
            rms_norm(state, params["state_norm"], dims.norm_eps),
        ],
        axis=-1,
    )


def queries(params: Tree, dims: HeadDims, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Layer input [B, T, 2H], positions int [B, T] of the rotary embedding -> [B, T, N, d]."""
    return rotate(_project(params, dims, x, "q"), *cos_sin(dims.rope, positions))


def keys_values(
    params: Tree, dims: HeadDims, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Layer input [B, T, 2H] -> keys and values [B, T, M, d]."""
    keys = rotate(_project(params, dims, x, "k"), *cos_sin(dims.rope, positions))
    return keys, _project(params, dims, x, "v")


def _project(params: Tree, dims: HeadDims, x: jax.Array, name: str) -> jax.Array:
    y = linear(x, params[name]).reshape(*x.shape[:2], -1, dims.head_dim)
    return constrain(y, "draft_batch", None, None, None)


def decoder_layer_output(
    params: Tree, dims: HeadDims, state: jax.Array, attended: jax.Array
) -> jax.Array:
    """State [B, T, H] and attention output [B, T, N, d] -> the step's output state [B, T, H].

    This is what the next step reads, and what `final_norm` reads: the residual stream, un-normed,
    or with `norm_output` its norm.
    """
    x = state + linear(attended.reshape(*state.shape[:2], -1), params["o"])
    x = x + gated_mlp(rms_norm(x, params["mlp_norm"], dims.norm_eps), params["mlp"])
    if dims.norm_output:
        x = rms_norm(x, params["norm"], dims.norm_eps)
    return constrain(x, "draft_batch", None, None)


def final_norm(params: Tree, dims: HeadDims, state: jax.Array) -> jax.Array:
    """A step's output state [..., H] -> what the LM head is multiplied with, [..., H]."""
    if dims.norm_output:
        return state
    return rms_norm(state, params["norm"], dims.norm_eps)


def logits(params: Tree, dims: HeadDims, state: jax.Array) -> jax.Array:
    """A step's output state [..., H] -> float32 logits over the draft vocabulary [..., D]."""
    weight = params["lm_head"].astype(state.dtype)
    hidden = final_norm(params, dims, state)
    return jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
