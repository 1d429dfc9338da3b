"""Model FLOPs of a training step: what the method needs, 2 per multiply-add.

Forward only for the target; forward and backward (3x) for what is trained, which each drafter
counts itself. Recomputation in the backward pass is the implementation's choice and is not counted.
Attention counts the causal half. The target's products are read off its parameter table: a token is
multiplied with every matrix once, and of a mixture's experts with those it is sent to.
"""

from __future__ import annotations

import math

import jax

from MaxDraft.drafts.drafter import Drafter
from MaxDraft.layers.params import Param
from MaxDraft.targets.dims import (
    MLA,
    Attention,
    DecoderDims,
    DeltaNet,
    Layer,
)
from MaxDraft.targets.plan import layer_groups
from MaxDraft.targets.table import decoder_params


def per_token(
    target: DecoderDims,
    drafter: Drafter,
    num_steps: int,
    length: float,
    supervised_share: float = 1.0,
) -> dict[str, float]:
    """FLOPs of each part of a training step for one token of a document of `length` tokens.

    Args:
      length: tokens in a document, which decides what attention costs.
      supervised_share: tokens that some step of the rollout supervises / tokens. The target's
        LM head is needed for their teachers only.
    """
    return {
        "target layers": _products(target),
        "target attention": sum(_attention(layer, length) for layer in target.layers),
        "target LM head": supervised_share * 2 * target.hidden_size * target.vocab_size,
        **drafter.flops_per_token(num_steps, length, supervised_share),
    }


def _products(target: DecoderDims) -> float:
    """2 per weight that a token is multiplied with, over all layers."""
    table = decoder_params(target, ())
    total = 0.0
    for group, units in zip(layer_groups(target.layers, ()), table["layers"], strict=True):
        for layer, params in zip(group.unit, units, strict=True):
            for param in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Param)):
                total += 2 * group.repeats * _multiplied_weights(param, layer)
    return total


def _multiplied_weights(param: Param, layer: Layer) -> float:
    """Weights of a parameter that one token is multiplied with; vectors are no products."""
    if param.axes[0] == "target_experts":
        share = layer.feed_forward.router.top_k / layer.feed_forward.num_experts
        return math.prod(param.shape) * share if len(param.shape) == 3 else 0.0
    return math.prod(param.shape) if len(param.shape) == 2 else 0.0


def _attention(layer: Layer, length: float) -> float:
    """Scores and the sum over values, for one token, on average over a document."""
    match layer.mixer:
        case Attention() as a:
            keys = _visible_keys(length, a.window, a.chunk)
            return 2 * 2 * a.num_heads * a.head_dim * keys
        case MLA() as a:
            widths = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
            return 2 * a.num_heads * widths * length / 2
        case DeltaNet() as a:  # the state is read, corrected and read again
            return 3 * 2 * a.num_v_heads * a.k_dim * a.v_dim


def _visible_keys(length: float, window: int, chunk: int) -> float:
    """Keys that a token sees, on average over a document."""
    if window and window < length:
        return window - window * (window - 1) / (2 * length)
    return min(length, chunk or length) / 2
