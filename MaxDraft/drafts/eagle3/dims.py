"""Dimensions of an EAGLE-3 head: what a user chooses, the target's where nothing is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from MaxDraft.drafts.drafter import DrafterError, DrafterOptions
from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import DecoderDims, TargetError
from MaxDraft.targets.draft_shape import draft_shape

NUM_CAPTURED = 3  # C, the target layers whose outputs `fc` fuses


@dataclasses.dataclass(frozen=True)
class HeadDims:
    """Dimensions of a head; hidden_size is the target's, whose embedding it reads.

    fc_norm, norm_output: EAGLE-3.1's two changes (arXiv:2605.09992). Each captured layer's output
    passes an RMSNorm of its own before `fc`; and what a step hands to the next is the normed state
    that the LM head reads, instead of the residual stream.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    draft_vocab_size: int
    target_vocab_size: int
    norm_eps: float
    rope: Rope
    fc_norm: bool = False
    norm_output: bool = False


def dims_from_options(options: DrafterOptions, target: DecoderDims) -> HeadDims:
    """The dimensions that `draft_shape` finds in the target, where the user does not say others."""
    shape = draft_shape(target)
    head_dim = options.head_dim or shape.head_dim
    dims = HeadDims(
        hidden_size=target.hidden_size,
        intermediate_size=options.intermediate_size or shape.intermediate_size,
        num_heads=options.num_attention_heads or shape.num_heads,
        num_kv_heads=options.num_key_value_heads or shape.num_kv_heads,
        head_dim=head_dim,
        draft_vocab_size=min(options.draft_vocab_size, target.vocab_size),
        target_vocab_size=target.vocab_size,
        norm_eps=target.norm_eps,
        rope=dataclasses.replace(shape.rope, rotary_dim=head_dim),
        fc_norm=options.fc_norm,
        norm_output=options.norm_output,
    )
    if dims.num_heads % dims.num_kv_heads:
        raise DrafterError(
            f"the head's {dims.num_heads} query heads cannot share {dims.num_kv_heads} key/value "
            f"heads evenly; set draft_num_attention_heads to a multiple of "
            f"draft_num_key_value_heads"
        )
    return dims


# Names of Rope's fields in checkpoints that were saved before they were Hugging Face's.
_FORMER_ROPE_FIELDS = {
    "head_dim": "rotary_dim",
    "kind": "rope_type",
    "original_length": "original_max_position_embeddings",
    "cos_scale": "attention_scaling",
    "factors": "short_factor",
}


def dims_from_json(saved: Mapping[str, Any]) -> HeadDims:
    """What `dataclasses.asdict` and JSON made of dimensions, also of older checkpoints.

    Fields that have been added since take their defaults.
    """
    fields = {_FORMER_ROPE_FIELDS.get(key, key): value for key, value in saved["rope"].items()}
    rope = Rope(**{**fields, "short_factor": tuple(fields.get("short_factor", ()))})
    return HeadDims(**{**saved, "rope": rope})


def default_captured_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose output is captured: [1, n//2 - 1, n - 4], 0-based.

    Li et al. 2025 say only low, middle and high; these numbers are those of EAGLE's code and of
    SGLang, which write them as [2, n//2, n - 3], inputs of the layers after.
    """
    return (1, num_layers // 2 - 1, num_layers - 4)


def check_captured_layers(layer_ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Three distinct ascending layers inside the target; the defaults where none are asked for."""
    layers = tuple(layer_ids) or default_captured_layers(num_layers)
    if num_layers < NUM_CAPTURED:
        raise TargetError(
            f"an EAGLE-3 head reads {NUM_CAPTURED} layers of its target, and this one has only "
            f"{num_layers}"
        )
    if len(layers) != NUM_CAPTURED or list(layers) != sorted(set(layers)):
        example = [0, max(num_layers // 2 - 1, 1), num_layers - 1]
        raise TargetError(
            f"captured layers {list(layers)} of a target with {num_layers} layers are not three "
            f"distinct ascending ones; set target_layer_ids, e.g. {example}"
        )
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise TargetError(
            f"target_layer_ids {list(layers)}: layer {outside} does not exist, the target has "
            f"layers 0 to {num_layers - 1}"
        )
    return layers
