"""What a config.json leaves out means what transformers takes it to mean, or is an error."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import recipe
from transformers import AutoConfig

from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.table import decoder_params

ROPES = ("rope_scaling", "rope_parameters")
# The reference has no class of its own for Kimi K2; its files name DeepSeek-V3's.
CLASSES = {"kimi_k2": "deepseek_v3"}


def golden_config(name):
    with np.load(recipe.FOLDER / f"{name}.npz") as file:
        return json.loads(str(file["config"]))


CONFIGS = {
    name: config for name in recipe.CONFIGS if "text_config" not in (config := golden_config(name))
}


def without_one_field(config):
    """(name, the rest) for every field, those of the rope's scaling included."""
    for name in sorted(config.keys() - {"model_type"}):
        yield name, {key: value for key, value in config.items() if key != name}
    for outer in ROPES:
        for name in config.get(outer) or ():
            inner = {key: value for key, value in config[outer].items() if key != name}
            yield f"{outer}.{name}", config | {outer: inner}


def as_transformers_reads_it(config):
    fields = copy.deepcopy(config)
    model_type = fields.pop("model_type")
    read = AutoConfig.for_model(CLASSES.get(model_type, model_type), **fields).to_dict()
    return read | {"model_type": model_type}


def dims_or_none(config):
    try:
        return dims_from_config(config)
    except TargetError:
        return None


def shapes(dims):
    return jax.tree.map(
        lambda param: param.full_shape, decoder_params(dims, (0, 1, 2), jnp.float32)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_field_is_an_error_or_means_what_it_means_to_transformers(name):
    wrong, equal = [], 0
    for field, rest in without_one_field(CONFIGS[name]):
        ours = dims_or_none(rest)
        if ours is None:
            continue
        theirs = dims_or_none(as_transformers_reads_it(rest))
        if ours == theirs:
            equal += 1
        # Of other sizes: the tensors in the files do not fit, which loading tells.
        elif theirs is not None and shapes(ours) == shapes(theirs):
            wrong.append(field)
    assert not wrong
    assert equal > 3  # special tokens, dropout and the like are no part of the dimensions


def test_the_comparison_notices_a_window_that_is_left_out():
    whole = CONFIGS["mistral_window"]
    silent = dims_from_config(whole | {"sliding_window": None})
    theirs = dims_from_config(as_transformers_reads_it(whole))
    assert silent != theirs and shapes(silent) == shapes(theirs)


WHOLE = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "vocab_size",
    "head_dim",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "sliding_window",
    "attention_chunk_size",
    "decoder_sparse_step",
    "full_attention_interval",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "first_k_dense_replace",
    "max_position_embeddings",
)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", ["64", -1, 1.5, [4], {"a": 1}])
def test_a_size_that_is_no_whole_number_is_an_error_that_names_it(name, value):
    config, said = CONFIGS[name], 0
    for field in WHOLE:
        changed = config | {field: value}
        # What the family does not read, or reads another field for, is not looked at.
        if config.get(field) is None or dims_or_none(changed) == dims_from_config(config):
            continue
        with pytest.raises(TargetError, match=field):
            dims_from_config(changed)
        said += 1
    assert said > 3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_nothing_of_something_that_must_be_there_is_an_error(name, field):
    with pytest.raises(TargetError, match=field):
        dims_from_config(CONFIGS[name] | {field: 0})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gpt_oss", {"layer_types": ["linear_attention"] * 8}, "unknown kind 'linear_attention'"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "kinds of 3 layers"),
        ("gpt_oss", {"layer_types": "full_attention"}, "layer_types must list"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("gpt_oss", {"rope_parameters": None, "rope_theta": 1e4}, "rope_scaling"),
        ("gemma2", {"hidden_activation": "relu"}, "'relu' is not known"),
        ("gemma2", {"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern"),
        ("gemma3_text", {"hidden_size": None}, "'hidden_size'"),
        ("qwen3_moe", {"use_sliding_window": True, "layer_types": None}, "use_sliding_window"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "kinds of 3 layers"),
        ("qwen3_moe", {"mlp_only_layers": [99]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts_per_tok": 99}, "cannot choose 99"),
        ("qwen3_moe", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("qwen3_moe", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("mixtral", {"rope_theta": "1e6"}, "rope_theta must be a number"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"n_group": 5}, "5 groups"),
        ("deepseek_v3", {"topk_group": 9}, "best 9"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("kimi_k2", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("deepseek_v3", {"kv_lora_rank": None}, "'kv_lora_rank'"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type"),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
        ("phi4_mini", {"partial_rotary_factor": 0.5}, "short factors"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias"),
        ("llama4_scout", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ("llama4_scout", {"moe_layers": [8]}, "moe_layers"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "moe"] * 4}, "unknown kind 'moe'|kinds of"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 8}, "sliding_attention"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 3}, "3"),
    ],
)
def test_what_no_decoder_would_compute_rightly_is_an_error_that_names_it(name, change, named):
    config = CONFIGS[name]
    if "partial_rotary_factor" in change:
        inner = {part: config[part] | change for part in ROPES if config.get(part)}
        change = change | inner
    with pytest.raises(TargetError, match=named):
        dims_from_config(config | change)


def test_a_field_that_only_the_reference_code_knows_may_be_missing():
    config = dict(CONFIGS["minimax_m2"])
    for name in ("qk_norm_type", "scoring_func", "use_qk_norm", "shared_intermediate_size"):
        config.pop(name, None)
    assert dims_from_config(config) == dims_from_config(CONFIGS["minimax_m2"])
