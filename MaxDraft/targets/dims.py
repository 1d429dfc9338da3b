"""What a target is made of, as data: its family reads config.json into this, the decoder runs it.

A layer is a mixer (how tokens see each other) and a feed-forward part, each with its switches. A
switch stands here once with what it means; `decoder_params` (table.py) turns it into parameters,
mixers.py and layers/experts.py into arithmetic.
"""

from __future__ import annotations

import dataclasses

from MaxDraft.errors import UserError
from MaxDraft.layers.experts import Experts, Router  # noqa: F401, families import all from here
from MaxDraft.layers.params import TensorLayout
from MaxDraft.layers.rope import Rope


class TargetError(UserError):
    """A target that this decoder cannot run: unknown family, missing field, impossible layers."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention with N query heads that share M key/value heads."""

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
    qk_norm: str = ""  # RMSNorm of queries and keys: "head" each; "whole" all heads as one vector
    l2_norm: bool = False  # of every query and key head after the rotary embedding, no weight
    sinks: bool = False  # a learnt score per head that takes its share of the softmax
    gated: bool = False  # q_proj also makes a gate; outputs are multiplied by its sigmoid
    tempered: tuple[float, float] | None = None  # (floor, scale): queries grow with position


@dataclasses.dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values from one vector."""

    num_heads: int
    q_lora_rank: int  # of the compressed queries; 0: one plain projection
    kv_lora_rank: int
    qk_nope_head_dim: int  # of a query/key head, the part without rotary embedding
    qk_rope_head_dim: int  # the rotated part, its key shared by all heads
    v_dim: int
    rope: Rope
    scale: float
    bias: bool = False
    norm_eps: float = 1e-6  # of the norms of the compressed vectors, whatever the config says


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated delta rule (Yang et al. 2024): a recurrent state instead of keys and values."""

    num_k_heads: int
    num_v_heads: int
    k_dim: int
    v_dim: int
    conv_width: int
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
    post_norms: bool = False  # what is added to x is normed first (sandwich norms)


@dataclasses.dataclass(frozen=True)
class DecoderDims:
    """Dimensions and switches of a target, read from its config.json by its family."""

    vocab_size: int
    hidden_size: int
    norm_eps: float
    max_length: int  # positions it can be served with
    layers: tuple[Layer, ...]
    tied_head: bool = False  # the LM head is the embedding, transposed
    norm_offset: float = 0.0  # every RMSNorm multiplies by offset + weight (Gemma: 1)
    embed_scale: float = 1.0  # embeddings are multiplied by it
    logit_softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: as they are
    # Where a family's files differ from the usual names (table.py): (path in the tree, layouts).
    names: tuple[tuple[str, tuple[TensorLayout, ...]], ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)
