"""The shape that a draft head has where the configuration gives none: one layer of Llama.

That is the form that serving engines read: grouped-query attention (GQA) with a rotary embedding of
whole heads, and an MLP gated by SiLU, whatever the target itself is made of.
"""

from __future__ import annotations

import dataclasses

from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import MLA, Attention, DecoderDims, Experts, Mlp, TargetError

MIN_KV_HEADS = 2  # sglang-jax cddbf6f (August 2026) crashes on a single one
MLA_HEAD_DIM = 128
MLA_KV_HEADS = 8
MAX_WIDTH = 6  # of the MLP, times the hidden size: a bound on the head's cost


@dataclasses.dataclass(frozen=True)
class DraftShape:
    """Dimensions and rotary embedding of a head."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope


def draft_shape(target: DecoderDims) -> DraftShape:
    """The heads of the target's softmax attention, the width of its MLP, its rotary embedding.

    MLA has no key/value heads that could be taken: a head for it has query heads of 128 that fill
    the hidden size, and at most eight key/value heads. A target whose layers are all mixtures of
    experts gives the width that a token passes through: that of its chosen experts and of the
    shared one, at most MAX_WIDTH hidden sizes.

    TargetError where no layer of the target has attention, or none has a rotary embedding, or where
    heads cannot be rotated in pairs.
    """
    mixers = [layer.mixer for layer in target.layers]
    softmax = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    latent = [mixer for mixer in mixers if isinstance(mixer, MLA)]
    if softmax:
        heads, kv_heads = softmax[0].num_heads, softmax[0].num_kv_heads
        head_dim, rope = softmax[0].head_dim, _softmax_rope(softmax)
    elif latent:
        head_dim = min(MLA_HEAD_DIM, target.hidden_size // 4 // 2 * 2)
        if head_dim < 2:
            raise TargetError(
                f"config.json: hidden_size {target.hidden_size} is too small for a draft head"
            )
        heads, rope = target.hidden_size // head_dim, latent[0].rope
        kv_heads = max(n for n in range(1, MLA_KV_HEADS + 1) if heads % n == 0)
    else:
        raise TargetError("no layer of the target has attention with heads for a draft head")
    if head_dim % 2:
        raise TargetError(
            f"a draft head has heads of the target's size, and {head_dim} dimensions cannot be "
            f"rotated in pairs"
        )
    if kv_heads < MIN_KV_HEADS and heads % MIN_KV_HEADS == 0:
        kv_heads = MIN_KV_HEADS
    return DraftShape(_width(target), heads, kv_heads, head_dim, _draft_rope(rope, head_dim))


def _softmax_rope(mixers: list[Attention]) -> Rope:
    """That of the layers that see everything, where windowed layers have one of their own."""
    ropes = [mixer.rope for mixer in sorted(mixers, key=lambda mixer: mixer.window) if mixer.rope]
    if not ropes:
        raise TargetError("no layer of the target has a rotary embedding for a draft head")
    return ropes[0]


def _width(target: DecoderDims) -> int:
    parts = [layer.feed_forward for layer in target.layers]
    dense = [part.intermediate_size for part in parts if isinstance(part, Mlp)]
    if dense:
        return dense[0]
    experts = next(part for part in parts if isinstance(part, Experts))
    chosen = experts.router.top_k * experts.intermediate_size
    return min(chosen + experts.shared_intermediate_size, MAX_WIDTH * target.hidden_size)


def _draft_rope(rope: Rope, head_dim: int) -> Rope:
    """The target's theta and, where a Llama can have it, its scaling; all dimensions are rotated.

    Longrope and the variants of yarn (DeepSeek, which scales the scores instead; gpt-oss, whose
    ramp ends between dimensions) are forms that engines do not read in a Llama head. There the head
    has the default embedding, as published heads of these targets do.
    """
    yarn_variant = rope.rope_type == "yarn" and (rope.attention_scaling == 1 or not rope.truncate)
    if rope.rope_type == "longrope" or yarn_variant:
        return Rope(theta=rope.theta, rotary_dim=head_dim)
    return dataclasses.replace(rope, rotary_dim=head_dim, interleaved=False)
