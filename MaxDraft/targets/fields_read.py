"""Which fields of a config.json its family reads, so that none is passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.fields import shown

# Fields that scale or cap numbers inside of some family's model -> the value that changes nothing;
# None: null alone. Granite has the multipliers and logits_scaling, Cohere logit_scale, OLMo and
# DBRX clip_qkv, Gemma the caps and query_pre_attn_scalar.
_NEUTRAL = {
    "residual_multiplier": 1,
    "embedding_multiplier": 1,
    "attention_multiplier": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "clip_qkv": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "query_pre_attn_scalar": None,
}

# Fields that change no number of a trained model, or that other readers look at. chunk_size_... and
# pretraining_tp split the same products; the router's jitter and losses are of its own training;
# max_window_layers is what transformers made layer_types from, which hf_config.qwen_windows needs.
_BOOKKEEPING = {
    "architectures",
    "auto_map",
    "aux_loss_alpha",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_window_layers",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "quantization_config",
    "return_dict",
    "router_jitter_noise",
    "seq_aux",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_BOOKKEEPING_ENDINGS = ("_token_id", "_token_index", "_dropout", "_pdrop", "_coef")


class NotedFields(dict):
    """The fields of a config.json; `read` has the names of those that were looked up.

    A copy that `|` makes notes what is looked up in it in the same set.
    """

    def __init__(self, fields: Mapping[str, Any], read: set[str] | None = None):
        super().__init__(fields)
        self.read: set[str] = set() if read is None else read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __or__(self, other: Mapping[str, Any]) -> NotedFields:
        return NotedFields(dict(self) | dict(other), self.read)


def check_fields_not_read(config: NotedFields) -> None:
    """TargetError where a field that was not read would change what the model computes."""
    values = {name: dict.get(config, name) for name in fields_not_read(config)}
    wrong = [
        f"{name} {shown(value)}"
        for name, value in values.items()
        if name in _NEUTRAL and value != _NEUTRAL[name]
    ]
    if wrong:
        raise TargetError(
            f"config.json: {', '.join(wrong)} would change what the target computes, and the "
            f"decoder of model_type {shown(config['model_type'])} does not read it. Give a "
            f"target_path whose model does without"
        )


def fields_not_read(config: NotedFields) -> list[str]:
    """The names of fields with a value that nothing looked up, without mere bookkeeping."""
    return sorted(
        name
        for name, value in config.items()
        if value is not None
        and name not in config.read | _BOOKKEEPING
        and not name.startswith("_")
        and not name.endswith(_BOOKKEEPING_ENDINGS)
    )
