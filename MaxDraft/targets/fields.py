"""The fields of a config.json: kind, range, and what it means where one is absent or null.

FIELDS has one row for every field whose meaning is the same in all families that read it. What an
absent field means in one family alone stands in that family's DEFAULTS (registry.text_config fills
it in). Both are the defaults of transformers' configuration classes. A field without a default
must be there: a wrong guess would give wrong hidden states without any error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from MaxDraft.targets.dims import TargetError

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    default: Any = _REQUIRED
    least: int = 1
    most: int = 2**31 - 1

    def fits(self, value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and self.least <= value <= self.most
        )

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most:,}"


@dataclasses.dataclass(frozen=True)
class Number:
    """A number above 0 that float32 can hold; `zero`: or 0 itself."""

    default: Any = _REQUIRED
    zero: bool = False

    def fits(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return (self.zero and value == 0) or 2.0**-126 <= value < 2.0**127

    def __str__(self) -> str:
        return "a number of 0 or more" if self.zero else "a number above 0"


@dataclasses.dataclass(frozen=True)
class Flag:
    """true or false."""

    default: Any = _REQUIRED

    def fits(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


# Limits are far beyond every published model. Layers are the unit in which this program is built,
# and numbers of heads and their sizes are those of arrays that are made on the host.
_LAYERS, _HEADS, _HEAD_DIM = 1000, 1 << 16, 1 << 14

FIELDS: dict[str, Whole | Number | Flag] = {
    # The decoder
    "vocab_size": Whole(),
    "hidden_size": Whole(),
    "num_hidden_layers": Whole(most=_LAYERS),
    "rms_norm_eps": Number(),
    "max_position_embeddings": Whole(),
    "tie_word_embeddings": Flag(False),
    "final_logit_softcapping": Number(0.0),  # null: logits are as they are
    # Softmax attention
    "num_attention_heads": Whole(most=_HEADS),
    "num_key_value_heads": Whole(most=_HEADS),  # absent: num_attention_heads
    "head_dim": Whole(most=_HEAD_DIM),  # absent: hidden_size / num_attention_heads
    "attention_bias": Flag(False),
    "attention_out_bias": Flag(False),
    "qkv_bias": Flag(False),
    "use_qk_norm": Flag(False),
    "query_pre_attn_scalar": Number(),
    "attn_logit_softcapping": Number(0.0),  # null: scores are as they are
    "sliding_window": Whole(0),  # null: a token sees everything before it
    "sliding_window_pattern": Whole(most=_LAYERS),
    "use_sliding_window": Flag(False),
    "attention_chunk_size": Whole(0),  # null: a token sees everything before it
    "no_rope_layer_interval": Whole(4, most=_LAYERS),
    "attn_temperature_tuning": Flag(False),
    "floor_scale": Number(),
    "attn_scale": Number(),
    # Multi-head latent attention
    "q_lora_rank": Whole(0),  # null: queries are not compressed
    "kv_lora_rank": Whole(),
    "qk_nope_head_dim": Whole(most=_HEAD_DIM),
    "qk_rope_head_dim": Whole(most=_HEAD_DIM),
    "v_head_dim": Whole(most=_HEAD_DIM),
    "rope_interleave": Flag(True),
    # Gated DeltaNet
    "full_attention_interval": Whole(4, most=_LAYERS),
    "linear_num_key_heads": Whole(most=_HEADS),
    "linear_num_value_heads": Whole(most=_HEADS),
    "linear_key_head_dim": Whole(most=_HEAD_DIM),
    "linear_value_head_dim": Whole(most=_HEAD_DIM),
    "linear_conv_kernel_dim": Whole(most=1 << 10),
    # Feed-forward layers and experts
    "intermediate_size": Whole(),
    "intermediate_size_mlp": Whole(),
    "moe_intermediate_size": Whole(),
    "shared_expert_intermediate_size": Whole(),
    "mlp_bias": Flag(False),
    "num_experts": Whole(most=1 << 16),
    "num_local_experts": Whole(most=1 << 16),
    "n_routed_experts": Whole(most=1 << 16),
    "n_shared_experts": Whole(least=0, most=1 << 10),
    "num_experts_per_tok": Whole(most=1 << 16),
    "norm_topk_prob": Flag(),
    "routed_scaling_factor": Number(),
    "n_group": Whole(most=1 << 16),
    "topk_group": Whole(most=1 << 16),
    "first_k_dense_replace": Whole(least=0, most=_LAYERS),
    "moe_layer_freq": Whole(1, most=_LAYERS),
    "decoder_sparse_step": Whole(1, most=_LAYERS),
    "interleave_moe_layer_step": Whole(1, most=_LAYERS),
    # Rotary embedding
    "rope_theta": Number(),
    "rotary_dim": Whole(most=_HEAD_DIM),  # absent: head_dim
    "partial_rotary_factor": Number(1.0),
    "factor": Number(),
    "original_max_position_embeddings": Whole(least=2),
    "low_freq_factor": Number(),
    "high_freq_factor": Number(),
    "beta_fast": Number(32.0),
    "beta_slow": Number(1.0),
    "truncate": Flag(True),
    "attention_factor": Number(),  # absent: by the formula of the scaling
    "mscale": Number(0.0, zero=True),
    "mscale_all_dim": Number(0.0, zero=True),
    # EAGLE-3 heads
    "draft_vocab_size": Whole(),  # absent: vocab_size
    "target_hidden_size": Whole(),  # absent: hidden_size
    "fc_norm": Flag(False),
    "norm_output": Flag(False),
}
# The same of fields that hold text or a list; readers of their own know which values there are.
_OTHER_DEFAULTS = {
    "hidden_act": "silu",
    "topk_method": "greedy",
    "rope_type": "default",
    "mlp_only_layers": [],
}


def default(name: str) -> Any:
    """What an absent field means in every family; None where that is nothing, or an error."""
    row = FIELDS.get(name)
    value = _OTHER_DEFAULTS.get(name) if row is None else row.default
    return None if value is _REQUIRED else value


def field(config: Mapping[str, Any], name: str, absent: Any = _REQUIRED) -> Any:
    """config[name], of the kind and in the range of its row of FIELDS.

    Absent or null: `absent`, or else the row's default. TargetError naming the field where there is
    neither, and where it has another kind or lies outside of its range.
    """
    row, value = FIELDS[name], config.get(name)
    if value is None:
        value = row.default if absent is _REQUIRED else absent
        if value is _REQUIRED:
            raise TargetError(f"the target's config.json has no field '{name}'")
        return value
    if not row.fits(value):
        raise TargetError(f"config.json: {name} must be {row}, not {shown(value)}")
    return float(value) if isinstance(row, Number) else value


def mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """config[name], a JSON object of fields; {} where it is absent or null."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TargetError(f"config.json: {name} must be an object of fields, not {shown(value)}")
    return value


def listed(config: Mapping[str, Any], name: str) -> Sequence[Any] | None:
    """config[name], a list; None where it is absent or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise TargetError(f"config.json: {name} must be a list, not {shown(value)}")
    return value


def head_dim(config: Mapping[str, Any]) -> int:
    """`head_dim` where the file has it, else hidden_size / num_attention_heads."""
    if config.get("head_dim") is not None:
        return field(config, "head_dim")
    size, rest = divmod(field(config, "hidden_size"), field(config, "num_attention_heads"))
    if rest:
        raise TargetError(
            "config.json has no head_dim, and hidden_size is not a multiple of num_attention_heads"
        )
    if size > _HEAD_DIM:
        raise TargetError(
            f"config.json has no head_dim, and hidden_size / num_attention_heads is {size:,}, more "
            f"than {_HEAD_DIM:,}"
        )
    return size


def require(config: Mapping[str, Any], **known: Any) -> None:
    """TargetError where a field is there and has another value than the one that is known."""
    for name, value in known.items():
        if config.get(name, value) not in (value, None):
            raise TargetError(
                f"config.json: {name} {shown(config[name])} is not known for "
                f"{config['model_type']}, only {value!r}"
            )


def shown(value: Any) -> str:
    """A value from a file as part of one sentence: cut off where it is long."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a whole number of more than 20 digits"  # Python refuses to print very long ones
    try:
        text = repr(value)
    except ValueError:  # a list or an object that holds such a number
        return f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 200 else text[:200] + "..."
