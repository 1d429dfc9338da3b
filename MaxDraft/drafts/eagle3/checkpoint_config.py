"""Reading the config.json of an EAGLE-3 head.

A head is flat, or has the fields of its layer nested under `transformer_layer_config`
(vLLM's speculators). Every field must be one we read, one known to have no effect, or one at its
neutral value; anything else is refused, since it may change the drafts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from MaxDraft.drafts.drafter import DrafterError
from MaxDraft.drafts.eagle3.dims import NUM_CAPTURED, HeadDims
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.fields import field, listed, mapping, shown

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
NESTED = "transformer_layer_config"
ENGINES_THETA = 10000.0  # what engines take where a head says no rope_theta

_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps")
_READ = {
    *_NEEDED,
    *("num_key_value_heads", "head_dim", "draft_vocab_size", "hidden_act", "eagle_config"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("original_max_position_embeddings", "max_position_embeddings", "num_hidden_layers"),
    *("fc_norm", "norm_output", "sliding_window", "use_sliding_window", "layer_types"),
    *("target_hidden_size", "architectures", LAYER_IDS, NESTED),
}
# Fields on which no draft depends, and fields of transformers' own that say how text is generated.
_WITHOUT_EFFECT = {
    *("model_type", "speculators_model_type", "speculators_version", "speculators_config"),
    *("transformers_version", "torch_dtype", "dtype", "auto_map", "name_or_path", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("use_cache", "initializer_range", "attention_dropout", "max_window_layers", "target_model"),
    *("target_model_type", "embed_requires_grad", "has_no_defaults_at_init", "ttt_length"),
    *("_attn_implementation", "_attn_implementation_autoset", "tokenizer_class", "prefix"),
    *("return_dict", "return_dict_in_generate", "output_hidden_states", "output_attentions"),
    *("output_scores", "torchscript", "use_bfloat16", "tf_legacy_loss", "finetuning_task"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "max_length", "min_length"),
    *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "remove_invalid_values", "exponential_decay_length_penalty"),
}
# Fields that change what is computed, and the value at which they do not.
_NEUTRAL = {
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "pretraining_tp": 1,
    "chunk_size_feed_forward": 0,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": {},
}
_NEUTRAL_OF_EAGLE_CONFIG = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}


def read_config(config: Mapping[str, Any]) -> tuple[HeadDims, tuple[int, ...] | None]:
    """config.json -> dims, captured layers (None: it names none); DrafterError lists what is wrong.

    Values may be any JSON.
    """
    problems: list[str] = []

    def attempt(read, *arguments):
        try:
            return read(*arguments)
        except TargetError as error:
            problems.append(str(error).removeprefix("config.json: "))
            return None

    layer = attempt(_layer, config)
    if layer is not None:
        problems += _not_understood(config, layer)
        attempt(_check_full_attention, layer)
        dims = attempt(_dims, layer, config)
    captured_layers = attempt(_captured_layers, config)
    if problems:
        raise DrafterError("config.json:" + "".join(f"\n  {line}" for line in problems))
    return dims, captured_layers or None


def _layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's fields, those beside a nested layer included."""
    nested = mapping(config, NESTED)
    outer = {name: value for name, value in config.items() if name != NESTED}
    if not nested:
        return outer
    # What stands beside the nested layer is about the whole head, not about its layer.
    of_the_head = ("draft_vocab_size", "fc_norm", "norm_output", "target_hidden_size")
    return {**nested, **{name: outer[name] for name in of_the_head if name in outer}}


def _not_understood(config: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    """Fields that change what the head computes, or of which that is not known."""
    fields = {**layer, **{name: value for name, value in config.items() if name != NESTED}}
    problems = [
        _other_value(name, fields[name], neutral)
        for name, neutral in _NEUTRAL.items()
        if fields.get(name) is not None and not _same(fields[name], neutral)
    ]
    known = _READ | _WITHOUT_EFFECT | _NEUTRAL.keys()
    problems += [
        f"{name}: {_short(value)} is not understood, and may change what the head computes; take "
        f"the field out of a copy of the folder if it does not"
        for name, value in sorted(fields.items())
        if name not in known and value is not None
    ]
    eagle_config = fields.get("eagle_config")
    for name, value in eagle_config.items() if isinstance(eagle_config, Mapping) else ():
        if name == LAYER_IDS or value is None:
            continue
        if name not in _NEUTRAL_OF_EAGLE_CONFIG:
            problems.append(f"eagle_config.{name}: {_short(value)} is not understood")
        elif not _same(value, _NEUTRAL_OF_EAGLE_CONFIG[name]):
            neutral = _NEUTRAL_OF_EAGLE_CONFIG[name]
            problems.append(_other_value(f"eagle_config.{name}", value, neutral))
    return problems


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def _other_value(name: str, value: Any, neutral: Any) -> str:
    return f"{name}: is {_short(value)}, which this head does not compute, only {_short(neutral)}"


def _short(value: Any) -> str:
    # As it stands in the file: true, not True.
    return json.dumps(value) if isinstance(value, bool | None) else shown(value)


def _check_full_attention(layer: Mapping[str, Any]) -> None:
    """TargetError unless the layer sees everything before it.

    Readers of Llama-like configs take a window from `layer_types` where it is there; else from
    sliding_window, unless use_sliding_window says that it is not used.
    """
    window = field(layer, "sliding_window", 0)
    used = field(layer, "use_sliding_window", True)
    kinds = listed(layer, "layer_types")
    if kinds:
        if any(kind != "full_attention" for kind in kinds):
            raise TargetError(
                f"layer_types: is {_short(list(kinds))}; the head is trained and run with full "
                f"attention only"
            )
        return
    if window and used and window < field(layer, "max_position_embeddings", window + 1):
        raise TargetError(
            f"sliding_window: is {window}; the head is trained and run with full attention only"
        )


def _dims(layer: Mapping[str, Any], config: Mapping[str, Any]) -> HeadDims:
    missing = [name for name in _NEEDED if layer.get(name) is None]
    if missing:
        raise TargetError(f"has no {', '.join(missing)}")
    says_rope = layer.get("rope_theta") is not None or mapping(layer, "rope_parameters")
    rope = hf_config.rope(layer if says_rope else {**layer, "rope_theta": ENGINES_THETA})
    if hf_config.activation(layer) != "silu":
        raise TargetError(f"hidden_act '{layer['hidden_act']}': a head's is silu")
    if rope.rope_type == "longrope":
        raise TargetError("rope_type longrope: engines read none in a head")
    if field(layer, "num_hidden_layers", 1) != 1:
        raise TargetError(f"num_hidden_layers: is {layer['num_hidden_layers']}, must be 1")
    hidden_size, num_heads = field(layer, "hidden_size"), field(layer, "num_attention_heads")
    num_kv_heads = field(layer, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise TargetError(
            f"{num_heads} num_attention_heads cannot share {num_kv_heads} num_key_value_heads"
        )
    if field(layer, "target_hidden_size", hidden_size) != hidden_size:
        raise TargetError(
            f"target_hidden_size: is {layer['target_hidden_size']}, and the head's hidden_size is "
            f"{hidden_size}; only a head as wide as its target can be used"
        )
    vocab_size = field(layer, "vocab_size")
    draft_vocab_size = field(layer, "draft_vocab_size", vocab_size)
    if draft_vocab_size > vocab_size:
        raise TargetError(f"draft_vocab_size: {draft_vocab_size} is above vocab_size {vocab_size}")
    return HeadDims(
        hidden_size=hidden_size,
        intermediate_size=field(layer, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hf_config.head_dim(layer),
        draft_vocab_size=draft_vocab_size,
        target_vocab_size=vocab_size,
        norm_eps=field(layer, "rms_norm_eps"),
        rope=rope,
        fc_norm=field(layer, "fc_norm"),
        norm_output=field(layer, "norm_output"),
    )


def _captured_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Captured layers as outputs; empty where the file names none."""
    outputs = _layer_ids(mapping(config, "eagle_config"))
    inputs = _layer_ids(config)
    if outputs and inputs and [layer + 1 for layer in outputs] != inputs:
        raise TargetError(
            f"{LAYER_IDS}: {inputs} at the top level is not eagle_config's ids (outputs of layers) "
            f"plus one: {outputs}"
        )
    layers = outputs or [layer - 1 for layer in inputs]
    if layers and (len(layers) != NUM_CAPTURED or min(layers) < 0):
        raise TargetError(
            f"{LAYER_IDS}: {_short(inputs or outputs)} are not three layers of a target"
        )
    return tuple(layers)


def _layer_ids(config: Mapping[str, Any]) -> list[int]:
    ids = listed(config, LAYER_IDS) or []
    if not all(type(layer) is int for layer in ids):
        raise TargetError(f"{LAYER_IDS}: {_short(ids)} is no list of layer numbers")
    return list(ids)
