"""What a draft head for a target looks like where the config does not say: one layer of Llama.

That is the form which serving engines read: plain grouped-query attention with a full rotary
embedding, and a SiLU-gated MLP, whatever the target itself is made of.
"""

from __future__ import annotations

import dataclasses

from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import MLA, Attention, DecoderDims, Experts, Mlp, TargetError

MIN_KV_HEADS = 2  # an engine (sglang-jax) crashes on one
LATENT_HEAD_DIM = 128
LATENT_KV_HEADS = 8
MAX_WIDTH = 6  # times the hidden size; the widest that published heads have


@dataclasses.dataclass(frozen=True)
class DraftShape:
    """Dimensions and rotary embedding of a head."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope


def draft_shape(target: DecoderDims) -> DraftShape:
    """Heads of the target's softmax attention, width of its MLP, base of its rotary embedding.

    Latent attention has no key/value heads to take: heads of 128 that fill the hidden size, eight
    or fewer of them for keys and values. A target of experts alone gives the width that a token
    passes through: its chosen experts and the shared one, at most MAX_WIDTH hidden sizes.
    """
    mixers = [layer.mixer for layer in target.layers]
    softmax = [m for m in mixers if isinstance(m, Attention)]
    if not any(isinstance(m, Attention | MLA) for m in mixers):
        raise TargetError("no layer of the target has attention with heads for a draft head")
    if softmax:
        heads, kv_heads = softmax[0].num_heads, softmax[0].num_kv_heads
        head_dim = softmax[0].head_dim
        # Of two, the one of the layers that see everything.
        ropes = [m.rope for m in sorted(softmax, key=lambda m: m.window) if m.rope]
        if not ropes:
            raise TargetError("no layer of the target has a rotary embedding for a draft head")
        rope = ropes[0]
    else:
        latent = next(m for m in mixers if isinstance(m, MLA))
        head_dim = min(LATENT_HEAD_DIM, target.hidden_size // 4)
        heads, rope = target.hidden_size // head_dim, latent.rope
        kv_heads = max(n for n in range(1, LATENT_KV_HEADS + 1) if heads % n == 0)
    if kv_heads < MIN_KV_HEADS and heads % MIN_KV_HEADS == 0:
        kv_heads = MIN_KV_HEADS
    return DraftShape(_width(target), heads, kv_heads, head_dim, _draft_rope(rope, head_dim))


def _width(target: DecoderDims) -> int:
    parts = [layer.feed_forward for layer in target.layers]
    dense = [part.intermediate_size for part in parts if isinstance(part, Mlp)]
    if dense:
        return dense[0]
    experts = next(part for part in parts if isinstance(part, Experts))
    active = experts.router.top_k * experts.intermediate_size + experts.shared_size
    return min(active, MAX_WIDTH * target.hidden_size)


def _draft_rope(rope: Rope, head_dim: int) -> Rope:
    """The target's base and, where a Llama can have it, its scaling; every dimension turned.

    Longrope and yarn's variants (DeepSeek's scaled scores, gpt-oss' ramp between dimensions) are
    forms that engines do not read in a Llama head: there the head turns by the plain base, as
    published heads of these targets do.
    """
    variant = rope.rope_type == "yarn" and (rope.attention_scaling == 1.0 or not rope.truncate)
    if rope.rope_type == "longrope" or variant:
        return Rope(theta=rope.theta, rotary_dim=head_dim)
    return dataclasses.replace(rope, rotary_dim=head_dim, interleaved=False)
