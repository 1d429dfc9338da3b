"""The table of a target's parameters: shape, axes and tensor names, derived from its dimensions.

The names are those of Llama-like checkpoints; where the files of a family differ, DecoderDims.names
has the layouts by path. Paths are those of the tree of one layer: "q", "mlp/gate", "experts/down".

H hidden size, I intermediate, N heads, M key/value heads, d head size, E experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from MaxDraft.layers.params import Param, TensorLayout, Tree
from MaxDraft.targets.dims import (
    MLA,
    Attention,
    DecoderDims,
    DeltaNet,
    Experts,
    Layer,
    Mlp,
)
from MaxDraft.targets.plan import layer_groups

EMBED, HEADS, KV_HEADS = "target_embed", "target_heads", "target_kv_heads"
MLP = "target_mlp"
# Experts are split by axes of their own: their mesh axis also splits the other matrices' embed.
EXPERTS, EXPERT_EMBED, EXPERT_MLP = "target_experts", "target_expert_embed", "target_expert_mlp"

NAMES = {
    "attention_norm": "input_layernorm.weight",
    "attention_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
    # softmax attention
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    # latent attention
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
    # gated delta rule
    "qkvz": "linear_attn.in_proj_qkvz.weight",
    "ba": "linear_attn.in_proj_ba.weight",
    "qkv": "linear_attn.in_proj_qkv.weight",
    "z": "linear_attn.in_proj_z.weight",
    "b": "linear_attn.in_proj_b.weight",
    "a": "linear_attn.in_proj_a.weight",
    "conv": "linear_attn.conv1d.weight",
    "dt_bias": "linear_attn.dt_bias",
    "A_log": "linear_attn.A_log",
    "delta_norm": "linear_attn.norm.weight",
    "delta_o": "linear_attn.out_proj.weight",
    # feed-forward
    "mlp/gate": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
    "experts/router": "mlp.gate.weight",
    "experts/score_bias": "mlp.gate.e_score_correction_bias",
    "experts/gate": "mlp.experts.{expert}.gate_proj.weight",
    "experts/up": "mlp.experts.{expert}.up_proj.weight",
    "experts/down": "mlp.experts.{expert}.down_proj.weight",
    "experts/shared/gate": "mlp.shared_experts.gate_proj.weight",
    "experts/shared/up": "mlp.shared_experts.up_proj.weight",
    "experts/shared/down": "mlp.shared_experts.down_proj.weight",
    "experts/shared_gate": "mlp.shared_expert_gate.weight",
}


def decoder_params(
    dims: DecoderDims, captured_layers: Sequence[int], dtype: Any = jnp.bfloat16
) -> Tree:
    """Table of the target's parameters (layers/params.py), under Hugging Face tensor names."""
    H, V = dims.hidden_size, dims.vocab_size
    norm_init = "zeros" if dims.norm_offset else "ones"
    tree = {
        "embed": Param((V, H), ("target_vocab", EMBED), "model.embed_tokens.weight", dtype),
        "layers": tuple(
            tuple(
                _Layer(dims, dtype, group.numbers(place)).table(layer)
                for place, layer in enumerate(group.unit)
            )
            for group in layer_groups(dims.layers, tuple(captured_layers))
        ),
        "norm": Param((H,), (None,), "model.norm.weight", dtype, norm_init),
    }
    if not dims.tied_head:
        tree["head"] = Param(
            (H, V), (EMBED, "target_vocab"), "lm_head.weight", dtype, transposed=True
        )
    return tree


class _Layer:
    """Makes the Params of equal layers, stacked."""

    def __init__(self, dims: DecoderDims, dtype: Any, numbers: range):
        self.dims, self.dtype, self.numbers = dims, dtype, numbers
        self.names = dict(dims.names)

    def param(self, path, shape, axes, init="matrix", transposed=True, dtype=None) -> Param:
        layouts = self.names.get(path) or (TensorLayout(self.default_name(path), transposed),)
        first, *others = (
            dataclasses.replace(layout, name="model.layers.{layer}." + layout.name)
            for layout in layouts
        )
        return Param(
            shape,
            axes,
            first.name,
            dtype or self.dtype,
            init,
            first.transposed,
            self.numbers,
            first.part,
            tuple(others),
        )

    def default_name(self, path: str) -> str:
        if path in NAMES:
            return NAMES[path]
        matrix = path.removesuffix("_bias")  # a bias stands beside its matrix
        name = self.names[matrix][0].name if matrix in self.names else NAMES[matrix]
        return name.replace(".weight", ".bias")

    def matrix(self, path, rows, cols, axes) -> Param:
        return self.param(path, (rows, cols), axes)

    def vector(self, path, size, axis=None, init="ones", dtype=None) -> Param:
        return self.param(path, (size,), (axis,), init, False, dtype)

    def bias(self, path, size, axis=None) -> Param:
        return self.vector(path + "_bias", size, axis, "zeros")

    def norm(self, path, size) -> Param:
        return self.vector(path, size, init="zeros" if self.dims.norm_offset else "ones")

    def table(self, layer: Layer) -> Tree:
        H = self.dims.hidden_size
        table = {"attention_norm": self.norm("attention_norm", H)}
        match layer.mixer:
            case Attention():
                table |= self.attention(layer.mixer)
            case MLA():
                table |= self.latent(layer.mixer)
            case DeltaNet():
                table |= self.delta(layer.mixer)
        table["mlp_norm"] = self.norm("mlp_norm", H)
        match layer.feed_forward:
            case Mlp():
                table["mlp"] = self.mlp(layer.feed_forward)
            case Experts():
                table["experts"] = self.experts(layer.feed_forward)
        if layer.post_norms:
            table["attention_post_norm"] = self.norm("attention_post_norm", H)
            table["mlp_post_norm"] = self.norm("mlp_post_norm", H)
        return table

    def attention(self, a: Attention) -> Tree:
        H = self.dims.hidden_size
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        q_made = 2 * q_size if a.gated else q_size
        table = {
            "q": self.matrix("q", H, q_made, (EMBED, HEADS)),
            "k": self.matrix("k", H, kv_size, (EMBED, KV_HEADS)),
            "v": self.matrix("v", H, kv_size, (EMBED, KV_HEADS)),
            "o": self.matrix("o", q_size, H, (HEADS, EMBED)),
        }
        if a.qkv_bias:
            table["q_bias"] = self.bias("q", q_made, HEADS)
            table["k_bias"] = self.bias("k", kv_size, KV_HEADS)
            table["v_bias"] = self.bias("v", kv_size, KV_HEADS)
        if a.output_bias:
            table["o_bias"] = self.bias("o", H)
        if a.qk_norm:
            all_heads = a.qk_norm == "all_heads"
            table["q_norm"] = self.norm("q_norm", q_size if all_heads else a.head_dim)
            table["k_norm"] = self.norm("k_norm", kv_size if all_heads else a.head_dim)
        if a.sinks:
            table["sinks"] = self.vector("sinks", a.num_heads, init="zeros")
        return table

    def latent(self, a: MLA) -> Tree:
        H, N = self.dims.hidden_size, a.num_heads
        q_size = N * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank:
            table = {
                "q_a": self.matrix("q_a", H, a.q_lora_rank, (EMBED, None)),
                "q_a_norm": self.vector("q_a_norm", a.q_lora_rank),
                "q_b": self.matrix("q_b", a.q_lora_rank, q_size, (None, HEADS)),
            }
        else:
            table = {"q": self.matrix("q", H, q_size, (EMBED, HEADS))}
        table |= {
            "kv_a": self.matrix("kv_a", H, a.kv_lora_rank + a.qk_rope_head_dim, (EMBED, None)),
            "kv_a_norm": self.vector("kv_a_norm", a.kv_lora_rank),
            "kv_b": self.matrix(
                "kv_b", a.kv_lora_rank, N * (a.qk_nope_head_dim + a.v_head_dim), (None, HEADS)
            ),
            "o": self.matrix("o", N * a.v_head_dim, H, (HEADS, EMBED)),
        }
        if a.bias:
            if a.q_lora_rank:
                table["q_a_bias"] = self.bias("q_a", a.q_lora_rank)
            table["kv_a_bias"] = self.bias("kv_a", a.kv_lora_rank + a.qk_rope_head_dim)
            table["o_bias"] = self.bias("o", H)
        return table

    def delta(self, a: DeltaNet) -> Tree:
        H = self.dims.hidden_size
        k_size, v_size = a.num_k_heads * a.k_dim, a.num_v_heads * a.v_dim
        if a.fused:
            table = {
                "qkvz": self.matrix("qkvz", H, 2 * k_size + 2 * v_size, (EMBED, None)),
                "ba": self.matrix("ba", H, 2 * a.num_v_heads, (EMBED, None)),
            }
        else:
            table = {
                "qkv": self.matrix("qkv", H, 2 * k_size + v_size, (EMBED, None)),
                "z": self.matrix("z", H, v_size, (EMBED, None)),
                "b": self.matrix("b", H, a.num_v_heads, (EMBED, None)),
                "a": self.matrix("a", H, a.num_v_heads, (EMBED, None)),
            }
        channels = 2 * k_size + v_size
        return table | {
            "conv": self.matrix("conv", a.conv_width, channels, (None, None)),
            "dt_bias": self.vector("dt_bias", a.num_v_heads, dtype=jnp.float32),
            "A_log": self.vector("A_log", a.num_v_heads, init="zeros", dtype=jnp.float32),
            "delta_norm": self.vector("delta_norm", a.v_dim),
            "delta_o": self.matrix("delta_o", v_size, H, (None, EMBED)),
        }

    def mlp(self, m: Mlp, path="mlp") -> Tree:
        H, I = self.dims.hidden_size, m.intermediate_size
        table = {
            "gate": self.matrix(path + "/gate", H, I, (EMBED, MLP)),
            "up": self.matrix(path + "/up", H, I, (EMBED, MLP)),
            "down": self.matrix(path + "/down", I, H, (MLP, EMBED)),
        }
        if m.bias:
            table["gate_bias"] = self.bias(path + "/gate", I, MLP)
            table["up_bias"] = self.bias(path + "/up", I, MLP)
            table["down_bias"] = self.bias(path + "/down", H)
        return table

    def experts(self, e: Experts) -> Tree:
        H, I, E = self.dims.hidden_size, e.intermediate_size, e.num_experts

        def stack(name, shape, axes, init="matrix", transposed=True):
            path, axes = "experts/" + name, (EXPERTS, *axes)
            return self.param(path, (E, *shape), axes, init, transposed)

        table = {
            "router": self.matrix("experts/router", H, E, (None, None)),
            "gate": stack("gate", (H, I), (EXPERT_EMBED, EXPERT_MLP)),
            "up": stack("up", (H, I), (EXPERT_EMBED, EXPERT_MLP)),
            "down": stack("down", (I, H), (EXPERT_MLP, EXPERT_EMBED)),
        }
        if e.bias:
            table["gate_bias"] = stack("gate_bias", (I,), (EXPERT_MLP,), "zeros", False)
            table["up_bias"] = stack("up_bias", (I,), (EXPERT_MLP,), "zeros", False)
            table["down_bias"] = stack("down_bias", (H,), (None,), "zeros", False)
        if e.router.bias:
            table["router_bias"] = self.bias("experts/router", E)
        if e.router.selection_bias:
            # Float32 whatever the rest is: it decides between scores that are almost equal.
            table["score_bias"] = self.vector(
                "experts/score_bias", E, init="zeros", dtype=jnp.float32
            )
        if e.shared_intermediate_size:
            table["shared"] = self.mlp(Mlp(e.shared_intermediate_size), "experts/shared")
        if e.shared_gate:
            table["shared_gate"] = self.matrix("experts/shared_gate", H, 1, (None, None))
        return table
