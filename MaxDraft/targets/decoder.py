"""The frozen target: one pre-norm decoder whose switches make it Llama, Qwen2, Qwen3, ...

    h = embed(x)
    for every layer:  h += attention(norm(h));  h += mlp(norm(h))
    logits = head(norm(h))

Layers are stacked and scanned. The scan is cut after every captured layer, so that the captured
features are simply what comes out of the cuts, and the weights are stored cut the same way: no copy
of a weight is made on the way in.

B batch, T sequence, H hidden size, I intermediate, N heads, M key/value heads, d head size,
V vocabulary, D draft vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from MaxDraft.layers.attention import packed_attention
from MaxDraft.layers.blocks import merge_length, split_length
from MaxDraft.layers.mlp import gated_mlp, linear
from MaxDraft.layers.norms import rms_norm
from MaxDraft.layers.params import Param, Tree
from MaxDraft.layers.rope import Rope, cos_sin, rotate
from MaxDraft.sharding import constrain


class TargetError(ValueError):
    """A target that this decoder cannot run: unknown family, missing field, impossible layers."""


@dataclasses.dataclass(frozen=True)
class DecoderDims:
    """Dimensions and switches of a target, read from its config.json by its family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    max_length: int  # max_position_embeddings
    tied_head: bool = False  # the LM head is the embedding, transposed
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotary embedding


def default_capture(num_layers: int) -> tuple[int, ...]:
    """The EAGLE-3 layers whose output is captured: [1, n//2 - 1, n - 4], 0-based."""
    return (1, num_layers // 2 - 1, num_layers - 4)


def check_capture(capture: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Returns the three layers, or raises TargetError where they collide or lie outside."""
    capture = tuple(capture) or default_capture(num_layers)
    if len(capture) != 3 or len(set(capture)) != 3 or list(capture) != sorted(capture):
        raise TargetError(
            f"captured layers {list(capture)} of a target with {num_layers} layers are not three "
            f"distinct ascending ones; set target_layer_ids, e.g. "
            f"[0, {max(num_layers // 2 - 1, 1)}, {num_layers - 1}]"
        )
    outside = [layer for layer in capture if not 0 <= layer < num_layers]
    if outside:
        raise TargetError(
            f"target_layer_ids {list(capture)}: layer {outside} does not exist, the target has "
            f"layers 0 to {num_layers - 1}"
        )
    return capture


def layer_groups(capture: Sequence[int], num_layers: int) -> list[range]:
    """Layers cut after each captured one: [1, 3, 6] of 8 -> 0-1, 2-3, 4-6, 7."""
    cuts = [0, *(layer + 1 for layer in capture), num_layers]
    return [range(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def decoder_params(dims: DecoderDims, capture: Sequence[int], dtype: Any = jnp.bfloat16) -> Tree:
    """Table of the target's parameters (layers/params.py), under Hugging Face tensor names."""
    H, I, V = dims.hidden_size, dims.intermediate_size, dims.vocab_size
    q_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim

    def group(layers: range) -> Tree:
        def matrix(rows, cols, axes, name):
            return Param((rows, cols), axes, prefix + name, dtype, transposed=True, layers=layers)

        def vector(size, axis, name, init="ones"):
            return Param((size,), (axis,), prefix + name, dtype, init, layers=layers)

        prefix = "model.layers.{layer}."
        table = {
            "attention_norm": vector(H, None, "input_layernorm.weight"),
            "q": matrix(H, q_size, ("target_embed", "target_heads"), "self_attn.q_proj.weight"),
            "k": matrix(H, kv_size, ("target_embed", "target_kv_heads"), "self_attn.k_proj.weight"),
            "v": matrix(H, kv_size, ("target_embed", "target_kv_heads"), "self_attn.v_proj.weight"),
            "o": matrix(q_size, H, ("target_heads", "target_embed"), "self_attn.o_proj.weight"),
            "mlp_norm": vector(H, None, "post_attention_layernorm.weight"),
            "mlp": {
                "gate": matrix(H, I, ("target_embed", "target_mlp"), "mlp.gate_proj.weight"),
                "up": matrix(H, I, ("target_embed", "target_mlp"), "mlp.up_proj.weight"),
                "down": matrix(I, H, ("target_mlp", "target_embed"), "mlp.down_proj.weight"),
            },
        }
        if dims.qkv_bias:
            table["q_bias"] = vector(q_size, "target_heads", "self_attn.q_proj.bias", "zeros")
            table["k_bias"] = vector(kv_size, "target_kv_heads", "self_attn.k_proj.bias", "zeros")
            table["v_bias"] = vector(kv_size, "target_kv_heads", "self_attn.v_proj.bias", "zeros")
        if dims.output_bias:
            table["o_bias"] = vector(H, None, "self_attn.o_proj.bias", "zeros")
        if dims.mlp_bias:
            table["mlp"]["gate_bias"] = vector(I, "target_mlp", "mlp.gate_proj.bias", "zeros")
            table["mlp"]["up_bias"] = vector(I, "target_mlp", "mlp.up_proj.bias", "zeros")
            table["mlp"]["down_bias"] = vector(H, None, "mlp.down_proj.bias", "zeros")
        if dims.qk_norm:
            table["q_norm"] = vector(dims.head_dim, None, "self_attn.q_norm.weight")
            table["k_norm"] = vector(dims.head_dim, None, "self_attn.k_norm.weight")
        return table

    tree = {
        "embed": Param(
            (V, H), ("target_vocab", "target_embed"), "model.embed_tokens.weight", dtype
        ),
        "layers": tuple(group(layers) for layers in layer_groups(capture, dims.num_layers)),
        "norm": Param((H,), (None,), "model.norm.weight", dtype, "ones"),
    }
    if not dims.tied_head:
        tree["head"] = Param(
            (H, V), ("target_embed", "target_vocab"), "lm_head.weight", dtype, transposed=True
        )
    return tree


# attend(q [B, T, N, d], k, v [B, T, M, d], cache of this layer) -> (out [B, T, N, d], new cache)
Attend = Callable[..., tuple[jax.Array, Any]]


def decoder_layer(
    x: jax.Array,  # [B, T, H]
    w: Tree,
    dims: DecoderDims,
    rotary: tuple[jax.Array, jax.Array],
    attend: Attend,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """One pre-norm layer -> ([B, T, H], new cache)."""

    def heads(name: str, count: int) -> jax.Array:
        y = linear(h, w[name], w.get(name + "_bias")).reshape(*h.shape[:2], count, dims.head_dim)
        y = rms_norm(y, w[name + "_norm"], dims.norm_eps) if name + "_norm" in w else y
        return constrain(
            y, "target_batch", None, "target_heads" if name == "q" else "target_kv_heads", None
        )

    h = rms_norm(x, w["attention_norm"], dims.norm_eps)
    q = rotate(heads("q", dims.num_heads), *rotary)
    k = rotate(heads("k", dims.num_kv_heads), *rotary)
    out, cache = attend(q, k, heads("v", dims.num_kv_heads), cache)
    x = x + linear(out.reshape(*x.shape[:2], -1), w["o"], w.get("o_bias"))
    x = x + gated_mlp(rms_norm(x, w["mlp_norm"], dims.norm_eps), w["mlp"])
    return constrain(x, "target_batch", None, None), cache


def embed(params: Tree, tokens: jax.Array, dtype: Any) -> jax.Array:
    """tokens int [B, T] -> [B, T, H]."""
    return params["embed"][tokens].astype(dtype)


def run_layers(
    params: Tree,
    embeddings: jax.Array,  # [B, T, H]
    positions: jax.Array,  # int [B, T], inside each document
    dims: DecoderDims,
    capture: Sequence[int],
    attend: Attend,
    caches: Any = None,  # one per group, stacked over its layers
) -> tuple[jax.Array, jax.Array, Any]:
    """-> captured features [B, T, 3H], final normed state [B, T, H], new caches."""
    rotary = cos_sin(dims.rope, positions)
    groups = layer_groups(capture, dims.num_layers)
    caches = caches if caches is not None else (None,) * len(groups)

    def body(x, layer):
        w, cache = layer
        return decoder_layer(x, w, dims, rotary, attend, cache)

    x = constrain(embeddings, "target_batch", None, None)
    captured, new_caches = [], []
    for layers, weights, cache in zip(groups, params["layers"], caches, strict=True):
        x, cache = jax.lax.scan(body, x, (weights, cache))
        new_caches.append(cache)
        if layers[-1] in capture:
            captured.append(x)
    features = jnp.concatenate(captured, axis=-1)
    return features, rms_norm(x, params["norm"], dims.norm_eps), tuple(new_caches)


def features(
    params: Tree,
    tokens: jax.Array,  # int [B, T]
    positions: jax.Array,  # int [B, T]
    segment_ids: jax.Array,  # int [B, T]
    dims: DecoderDims,
    capture: Sequence[int],
    dtype: Any,
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Packed documents -> embeddings [B, T, H], features [B, T, 3H], final state [B, T, H]."""

    def attend(q, k, v, _):
        return packed_attention(q, k, v, segment_ids, block), None

    embeddings = embed(params, tokens, dtype)
    aux, last, _ = run_layers(params, embeddings, positions, dims, capture, attend)
    return embeddings, aux, last


def head_weight(params: Tree) -> jax.Array:
    """LM head [H, V]."""
    return params["head"] if "head" in params else params["embed"].T


def logits(params: Tree, last: jax.Array) -> jax.Array:
    """Final state [..., H] -> float32 logits [..., V]."""
    weight = head_weight(params).astype(last.dtype)
    return jnp.matmul(last, weight, preferred_element_type=jnp.float32)


def draft_head_weight(params: Tree, draft_to_target: jax.Array) -> jax.Array:
    """The LM head's columns of the draft vocabulary's tokens: [H, D]."""
    if "head" in params:
        return params["head"][:, draft_to_target]
    return params["embed"][draft_to_target].T


def full_vocabulary(
    params: Tree, last: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:  # int32 [B, T], float32 [B, T]
    """The target's argmax over all V tokens, and log sum exp of its logits, at every position.

    Logits exist for `block` positions of each row at a time.
    """

    def of_block(states):
        scores = constrain(logits(params, states), "target_batch", None, "target_vocab")
        return jnp.argmax(scores, -1).astype(jnp.int32), jax.nn.logsumexp(scores, -1)

    blocks = split_length(last, block)
    best, log_norm = jax.lax.map(of_block, blocks)
    return merge_length(best, last.shape[1]), merge_length(log_norm, last.shape[1])
