"""The head that a configuration asks for, on a target: its dimensions."""

from __future__ import annotations

import dataclasses

from MaxDraft.drafts.eagle3.head import HeadDims
from MaxDraft.pyconfig import Config, ConfigError
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.draft_shape import draft_shape


def head_dims(config: Config, target: DecoderDims) -> HeadDims:
    """The dimensions of the head: those of draft_shape, where the config does not say otherwise."""
    shape = draft_shape(target)
    head_dim = config.draft_head_dim or shape.head_dim
    dims = HeadDims(
        hidden_size=target.hidden_size,
        intermediate_size=config.draft_intermediate_size or shape.intermediate_size,
        num_heads=config.draft_num_attention_heads or shape.num_heads,
        num_kv_heads=config.draft_num_key_value_heads or shape.num_kv_heads,
        head_dim=head_dim,
        draft_vocab_size=min(config.draft_vocab_size, target.vocab_size),
        target_vocab_size=target.vocab_size,
        norm_eps=target.norm_eps,
        rope=dataclasses.replace(shape.rope, rotary_dim=head_dim),
    )
    if dims.num_heads % dims.num_kv_heads:
        raise ConfigError(
            f"the head's {dims.num_heads} query heads cannot share {dims.num_kv_heads} key/value "
            f"heads evenly; set draft_num_attention_heads to a multiple of "
            f"draft_num_key_value_heads"
        )
    return dims
