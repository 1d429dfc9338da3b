"""What a target is made of, as data: its family reads config.json into this, the decoder runs it.

A layer is a mixer (how tokens see each other) and a feed-forward part, each with its switches. A
switch stands here once, with what it means and the field of config.json that it comes from;
`decoder_params` (table.py) turns it into parameters, mixers.py and layers/experts.py into
arithmetic.
"""

from __future__ import annotations

import dataclasses

from MaxDraft.errors import UserError
from MaxDraft.layers.expert_products import Experts
from MaxDraft.layers.params import TensorLayout
from MaxDraft.layers.rope import Rope
from MaxDraft.layers.router import Router  # noqa: F401, families import all from here


class TargetError(UserError):
    """A target that this decoder cannot run: unknown family, missing field, impossible layers."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention: N query heads in groups that share M key/value heads (GQA).

    window      `sliding_window`, in layers of type sliding_attention
    chunk       `attention_chunk_size` (Llama 4)
    softcap     `attn_logit_softcapping` (Gemma 2)
    qk_norm     RMSNorm of queries and keys: "head" normalizes each head by itself (Qwen3, Gemma 3,
                GLM's `use_qk_norm`), "all_heads" all heads of a token as one vector (MiniMax-M2)
    l2_norm     queries and keys are divided by their root mean square after the rotary embedding,
                without a weight (Llama 4's `use_qk_norm`)
    sinks       gpt-oss: a learnt score per head that joins the softmax and has no value
    gated       Qwen3-Next: q_proj also makes a gate; the output is multiplied by its sigmoid
    attn_temperature_tuning
                Llama 4: (`floor_scale`, `attn_scale`); queries are multiplied by
                1 + attn_scale * log(1 + floor((position + 1) / floor_scale))
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None  # None: no position enters this layer (NoPE)
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    window: int = 0  # a token sees itself and window - 1 tokens before it; 0: all
    chunk: int = 0  # a token sees its own chunk of this many positions; 0: all
    softcap: float = 0.0  # scores become softcap * tanh(scores / softcap); 0: as they are
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: str = ""
    l2_norm: bool = False
    sinks: bool = False
    gated: bool = False
    attn_temperature_tuning: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values from one vector."""

    num_heads: int
    q_lora_rank: int  # of the compressed queries; 0: one plain projection
    kv_lora_rank: int
    qk_nope_head_dim: int  # of a query/key head, the part without rotary embedding
    qk_rope_head_dim: int  # the rotated part, its key shared by all heads
    v_head_dim: int
    rope: Rope
    scale: float
    bias: bool = False
    norm_eps: float = 1e-6  # of the norms of the compressed vectors; no field changes it


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated delta rule (Yang et al. 2024): a recurrent state instead of keys and values."""

    num_k_heads: int  # linear_num_key_heads
    num_v_heads: int  # linear_num_value_heads
    k_dim: int  # linear_key_head_dim
    v_dim: int  # linear_value_head_dim
    conv_width: int  # linear_conv_kernel_dim
    fused: bool  # the files hold in_proj_qkvz and in_proj_ba, else qkv, z, b and a apart


@dataclasses.dataclass(frozen=True)
class Mlp:
    """down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    activation: str = "silu"  # silu or gelu_tanh
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: x += mixer(norm(x)); x += feed_forward(norm(x))."""

    mixer: Attention | MLA | DeltaNet
    feed_forward: Mlp | Experts
    post_norms: bool = False  # the outputs of both parts are normalized before they are added


@dataclasses.dataclass(frozen=True)
class DecoderDims:
    """Dimensions and switches of a target, read from its config.json by its family."""

    vocab_size: int
    hidden_size: int
    norm_eps: float  # rms_norm_eps
    max_length: int  # positions that it can be served with: max_position_embeddings, or less
    layers: tuple[Layer, ...]
    tied_head: bool = False  # tie_word_embeddings: the LM head is the embedding, transposed
    norm_offset: float = 0.0  # every RMSNorm multiplies by offset + weight (Gemma: 1)
    embed_scale: float = 1.0  # embeddings are multiplied by it (Gemma: the root of hidden_size)
    logit_softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: as they are
    # Where a family's files differ from the names in table.py: (path in the tree, layouts).
    names: tuple[tuple[str, tuple[TensorLayout, ...]], ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)
