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
def test_an_absent_field_is_an_error_or_transformers_default(name):
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
def test_a_size_that_is_no_whole_number_is_named(name, value):
    config, named = CONFIGS[name], 0
    for field in WHOLE:
        changed = config | {field: value}
        # What the family does not read, or reads another field for, is not looked at.
        if config.get(field) is None or dims_or_none(changed) == dims_from_config(config):
            continue
        with pytest.raises(TargetError, match=field):
            dims_from_config(changed)
        named += 1
    assert named > 3


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
        ("gpt_oss", {"layer_types": "full_attention"}, "layer_types must be a list"),
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
        ("mixtral", {"rope_theta": "1e6", "rope_parameters": None}, "rope_theta must be a number"),
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
def test_a_field_that_contradicts_or_is_unknown_is_named(name, change, named):
    config = CONFIGS[name]
    if "partial_rotary_factor" in change:
        inner = {part: config[part] | change for part in ROPES if config.get(part)}
        change = change | inner
    with pytest.raises(TargetError, match=named):
        dims_from_config(config | change)


def test_a_field_of_the_reference_code_alone_may_be_absent():
    config = dict(CONFIGS["minimax_m2"])
    for name in ("qk_norm_type", "scoring_func", "use_qk_norm", "shared_intermediate_size"):
        config.pop(name, None)
    assert dims_from_config(config) == dims_from_config(CONFIGS["minimax_m2"])


LLAMA = {key: value for key, value in CONFIGS["llama"].items() if key not in ROPES}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONGROPE |= {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def scaled(**changes):
    """A Llama's fields with yarn, some of them changed."""
    return {"rope_theta": 1e4, "rope_scaling": YARN | changes}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": 0}, "rope_theta .* 0"),
        ({"rope_theta": -1}, "rope_theta .* -1"),
        ({"rope_theta": True}, "rope_theta .* True"),
        ({"rope_theta": [1e4]}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta .* nan"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object of fields, not 'yarn'"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_parameters": 5}, "rope_parameters must be an object"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported"),
        (scaled(factor=0), "factor .* 0"),
        (scaled(factor=[4]), "factor"),
        (scaled(factor=True), "factor .* True"),
        (scaled(factor=float("inf")), "factor .* inf"),
        (scaled(original_max_position_embeddings=0), "original_max_position_embeddings"),
        (scaled(original_max_position_embeddings=64.5), "original_max_position_embeddings"),
        (scaled(attention_factor=0), "attention_factor"),
        (scaled(mscale=[1], mscale_all_dim=1.0), "mscale must be a number"),
        (scaled(truncate=1), "truncate must be true or false, not 1"),
        (scaled(attn_factor=0.9), "'attn_factor' 0.9.*transformers ignores it"),
        (scaled(short_factor=[1.0]), "'short_factor'"),
        (scaled(rope_theta=5e5), "differ in rope_theta"),
        (scaled() | {"original_max_position_embeddings": 32}, "original_max_position_embeddings"),
        (scaled() | {"rope_theta": 1}, "rope_theta 1.0 is too small"),
        ({"rope_scaling": LLAMA3, "rope_theta": 1e4}, "low_freq_factor 4.0 is above"),
        ({"rope_scaling": LONGROPE | {"short_factor": ["a"] * 8}}, "short_factor .* 'a'"),
        ({"rope_scaling": LONGROPE | {"long_factor": [0] * 8}}, "long_factor .* 0"),
        ({"rope_scaling": LONGROPE | {"short_factor": 1.0}}, "short_factor must be a list"),
        (
            {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 1}},
            "original_max_position_embeddings",
        ),
        # Readers take rope_scaling or rope_parameters, so both must say all of it.
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "differ in factor .* original_max_position_embeddings",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not known here"),
        ({"partial_rotary_factor": "0.5"}, "partial_rotary_factor must be a number"),
        ({"head_dim": 15}, "15 of a head's 15 dimensions"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps .* inf"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"model_type": ["llama"]}, "model_type must be text"),
        ({"text_config": [1]}, "text_config must be an object"),
    ],
)
def test_a_value_that_is_none_is_an_error_that_names_it(change, named):
    with pytest.raises(TargetError, match=named):
        dims_from_config(LLAMA | {"rope_theta": 1e4} | change)


KINDS = ["sliding_attention", "full_attention"] * 4
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        # Families whose heads are rotated whole in transformers, whatever the file says.
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        # Those that rotate a part of each.
        ("glm4", {"partial_rotary_factor": 2.0}, "partial_rotary_factor 2.0"),
        ("glm4", {"partial_rotary_factor": 0.2}, "3 of a head's 16 dimensions"),
        ("glm4", {"partial_rotary_factor": 0.01}, "0 of a head's 16 dimensions"),
        ("glm4", {"partial_rotary_factor": None, "rope_parameters": PLAIN}, "is null"),
        ("minimax_m2", {"rotary_dim": 8}, "rotary_dim 8"),
        ("phi3_mini", {"rope_parameters": YARN, "rope_theta": 1e4}, "original_max|'yarn'"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters .* apart"),
        ("gemma3_text", {"rope_parameters": {"full_attention": "x"}}, "full_attention must be"),
        ("gemma3_text", {"rope_parameters": NESTED, "rope_theta": 777.0}, "rope_theta is 777"),
        (
            "gemma3_text",
            {"rope_parameters": NESTED, "rope_local_base_freq": 5.0},
            "rope_local_base_freq is 5.0",
        ),
        (
            "gemma3_text",
            {"rope_parameters": NESTED, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters and rope_scaling differ in factor",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": YARN | {"truncate": False}}},
            "truncate False",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation"),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern"),
        ("llama4_scout", {"layer_types": ["full_attention"] * 8}, "layer_types .* layer 0"),
        ("llama4_scout", {"no_rope_layers": "11101110"}, "no_rope_layers must be a list"),
        ("llama4_scout", {"no_rope_layers": ["a"] * 8}, "no_rope_layers must have 0 or 1"),
        ("llama4_scout", {"moe_layers": [1.0]}, "moe_layers"),
        ("qwen3", {"layer_types": KINDS, "sliding_window": 8}, "use_sliding_window"),
        (
            "qwen3_moe",
            {"layer_types": KINDS[:7], "sliding_window": 8, "use_sliding_window": True},
            "layer_types has layers of both kinds",
        ),
        ("qwen3_next", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("qwen3_5_text", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
        ("qwen3_5_text", {"layer_types": [["full_attention"]] * 8}, "unknown kind"),
        ("qwen3_5_text", {"linear_num_value_heads": 3}, "3 linear_num_value_heads"),
        ("deepseek_v2", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v2", {"topk_group": 1, "num_experts_per_tok": 5}, "5 experts from 1 groups"),
        ("deepseek_v3", {"n_group": 16, "topk_group": 4}, "n_group 16 leaves 1"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "7 of a head's 7"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func"),
        ("minimax_m2", {"attn_type_list": [1, 0] * 4}, "attn_type_list"),
    ],
)
def test_what_transformers_computes_otherwise_is_an_error(name, change, named):
    config = CONFIGS[name]
    if change.get("partial_rotary_factor") and name != "gemma3_text":
        change = change | {"rope_parameters": config["rope_parameters"] | change}
    with pytest.raises(TargetError, match=named):
        dims_from_config(config | change)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "deepseek_v3"])
def test_max_length_ends_where_longropes_short_factors_end(name):
    config = {key: value for key, value in CONFIGS[name].items() if key not in ROPES}
    pairs = (config.get("qk_rope_head_dim") or config.get("head_dim")) // 2
    factors = {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    dims = dims_from_config(config | {"rope_theta": 1e4, "rope_scaling": LONGROPE | factors})
    assert dims.max_length == 64 < config["max_position_embeddings"]


THETAS = {
    "llama": 1e4,
    "mistral": 1e4,
    "mixtral": 1e6,
    "minimax_m2": 5e6,
    "llama4_scout": 5e5,
    "gpt_oss": 150000.0,
    "glm4": 1e4,
    "qwen3_next": 1e4,
}


@pytest.mark.parametrize("name", THETAS)
def test_a_file_without_theta_has_its_familys_default(name):
    config = CONFIGS[name]
    inner = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    config = {key: value for key, value in config.items() if key != "rope_parameters"}
    for spelling in ({"rope_parameters": inner}, {"rope_scaling": inner}):
        mixers = [layer.mixer for layer in dims_from_config(config | spelling).layers]
        found = {mixer.rope.theta for mixer in mixers if getattr(mixer, "rope", None)}
        assert found == {THETAS[name]}


def test_kimi_k2_without_a_class_must_have_its_theta():
    config = {key: value for key, value in CONFIGS["kimi_k2"].items() if key not in ROPES}
    with pytest.raises(TargetError, match="rope_theta"):
        dims_from_config(config)


def test_fields_inside_or_beside_a_scaling_are_equal():
    def rope_of(fields):
        return dims_from_config(LLAMA | fields).layers[0].mixer.rope

    inner = {key: value for key, value in YARN.items() if not key.startswith("original")}
    beside = {"rope_scaling": inner, "original_max_position_embeddings": 64}
    nested = {"rope_parameters": YARN | {"rope_theta": 1e4}}
    assert rope_of(beside) == rope_of({"rope_scaling": YARN}) == rope_of(nested)


def test_each_family_reads_its_own_activation_field():
    gelu = {"hidden_activation": "gelu_pytorch_tanh"}
    assert dims_from_config(CONFIGS["llama"] | gelu) == dims_from_config(CONFIGS["llama"])
    silu = CONFIGS["gemma2"] | {"hidden_act": "silu"}
    assert dims_from_config(silu) == dims_from_config(CONFIGS["gemma2"])


def test_windows_that_both_fields_say_are_taken():
    windowed = {"use_sliding_window": True, "sliding_window": 8}
    dims = dims_from_config(CONFIGS["qwen3"] | windowed | {"layer_types": KINDS})
    assert [layer.mixer.window for layer in dims.layers] == [8, 0] * 4
    dims = dims_from_config(CONFIGS["qwen3_moe"] | windowed | {"layer_types": KINDS[:1] * 7})
    assert [layer.mixer.window for layer in dims.layers] == [8] * 7


def test_llama_4s_older_files_say_the_temperature_by_a_number():
    config = CONFIGS["llama4_scout"]
    same = dims_from_config(config | {"attn_temperature_tuning": 4})
    assert same == dims_from_config(config)
    assert dims_from_config(config | {"attn_temperature_tuning": 0}) != same
