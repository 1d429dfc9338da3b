"""The small random targets of the golden files: configurations, weights, tokens, sampled positions.

make_goldens.py (torch) and test_targets.py (JAX) both read this file, so that the two sides hold
the same numbers without a weight being stored. CONFIGS are spelt as the files people have, with
every switch of a family on; windows, chunks and the original lengths of rope scalings are far below
T = 1024, so that most positions lie where they change the features. A checkpoint is the names and
shapes of its tensors (the golden file lists them); each is drawn from NumPy's legacy generator,
whose stream never changes, seeded by the CRC-32 of the tensor's name xor SEED:

    matrix [out, in]    normal * gain / sqrt(in); stacked experts [E, a, b]: / sqrt(a)
    embedding [V, H]    normal
    norm weight         1 + 0.1 normal
    bias                0.3 normal
    convolution [C,1,W] normal / sqrt(W)
    and what _VECTORS says

The gains make attention sharp enough to feel its rotary angles, and expert choices clear ones.
"""

import json
import zlib
from pathlib import Path

import numpy as np

SEED = 20250
LENGTH = 1024  # tokens of a golden sequence
POSITIONS = (0, 1, 2, 17, 63, 64, 200, 511, 512, 777, 1022, 1023)  # stored ones
SINGLE = "model.safetensors"
FOLDER = Path(__file__).parent

_COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    # Token ids of the real vocabularies lie outside this one.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(kind="default", theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def _yarn(theta, **fields):
    """The spelling of older files."""
    scaling = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128}
    return {"rope_theta": theta, "rope_scaling": scaling | fields}


def _windowed(layers):
    """Qwen's windows: every other layer."""
    kinds = ["sliding_attention", "full_attention"] * layers
    fields = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0}
    return {**fields, "layer_types": kinds[:layers]}


# The dense families that were here first keep the numbers of their files.
_OLD = {k: v for k, v in _COMMON.items() if not k.endswith("_token_id")}
_LLAMA = {**_OLD, "model_type": "llama"}
_QWEN2 = {**_OLD, "model_type": "qwen2", "num_hidden_layers": 7}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK = {
    **_COMMON,
    **_LATENT,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "attention_bias": False,
}
_DEEPSEEK_V2 = {
    **_DEEPSEEK,
    **_yarn(10000.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.707),
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
}
_DEEPSEEK_V3 = {
    **_DEEPSEEK,
    **_yarn(10000.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.5),
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1,
}
_GLM4_MOE = {
    **_COMMON,
    "model_type": "glm4_moe",
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": True,
    "use_qk_norm": True,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
_MIXTRAL = {
    **_COMMON,
    "model_type": "mixtral",
    "intermediate_size": 32,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
_LLAMA4 = {
    **_COMMON,
    "model_type": "llama4_text",
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 96,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "use_qk_norm": True,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [],
    "attention_chunk_size": 100,
    "attn_temperature_tuning": True,
    "floor_scale": 64,
    "attn_scale": 0.3,
    "attention_bias": False,
}
_GEMMA = {
    **{key: value for key, value in _COMMON.items() if key != "hidden_act"},
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 100,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_GEMMA3 = {
    **_GEMMA,
    "model_type": "gemma3_text",
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 3,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_PHI3 = {**_COMMON, "model_type": "phi3", "original_max_position_embeddings": 2048}
_MISTRAL = {**_COMMON, "model_type": "mistral", "head_dim": 24, "rope_theta": 1000000.0}
_DELTA = {
    **_COMMON,
    "head_dim": 32,
    "attention_bias": False,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
}
_QWEN3_5 = {
    **_DELTA,
    "model_type": "qwen3_5_text",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}
_QWEN3_5_MOE = {**_QWEN3_5, **_EXPERTS, "model_type": "qwen3_5_moe_text"}
# A tower as small as it gets; its tensors lie in the checkpoint and are of no use to a draft head.
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 4,
    "patch_size": 4,
}

CONFIGS = {
    "llama": {**_LLAMA, **_rope()},
    "llama_llama3": {
        **_LLAMA,
        **_rope(
            "llama3",
            500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    },
    "llama_linear": {**_LLAMA, **_rope("linear", factor=4.0)},
    "llama_yarn": {
        **_LLAMA,
        **_rope("yarn", factor=8.0, original_max_position_embeddings=256),
    },
    "llama_tied": {**_LLAMA, **_rope(), "tie_word_embeddings": True},
    "llama_biases": {**_LLAMA, **_rope(), "attention_bias": True, "mlp_bias": True},
    "qwen2": {**_QWEN2, **_rope(theta=1000000.0)},
    "qwen2_tied": {**_QWEN2, **_rope(theta=1000000.0), "tie_word_embeddings": True},
    "qwen3": {
        **_OLD,
        **_rope(theta=1000000.0),
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": False,
    },
    "qwen2_window": {**_QWEN2, **_rope(theta=1000000.0), **_windowed(7)},
    "qwen3_window": {
        **_OLD,
        **_rope(theta=1000000.0),
        **_windowed(8),
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": True,
    },
    "qwen2_moe": {
        **_COMMON,
        **_EXPERTS,
        "model_type": "qwen2_moe",
        "rope_theta": 1000000.0,
        "qkv_bias": True,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": False,
        "sliding_window": 100,
        "max_window_layers": 4,
    },
    "qwen3_moe": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 7,
        "head_dim": 24,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 3],
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen2_moe_window": {
        **_COMMON,
        **_EXPERTS,
        **_windowed(8),
        "model_type": "qwen2_moe",
        "rope_theta": 1000000.0,
        "qkv_bias": True,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v2": {**_DEEPSEEK_V2, "attention_bias": True},
    "deepseek_v2_lite": {
        **_DEEPSEEK_V2,
        "num_hidden_layers": 7,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v3_plain_queries": {
        **_DEEPSEEK_V3,
        "num_hidden_layers": 7,
        "attention_bias": True,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "rope_scaling": None,
    },
    "kimi_k2": {
        **_DEEPSEEK_V3,
        **_yarn(50000.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
        "model_type": "kimi_k2",
        "num_hidden_layers": 7,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
    },
    "glm4": {
        **_COMMON,
        "model_type": "glm4",
        "num_hidden_layers": 7,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "attention_bias": True,
    },
    "glm4_moe": _GLM4_MOE,
    "glm4_moe_air": {
        **_GLM4_MOE,
        "num_hidden_layers": 7,
        "use_qk_norm": False,
        "n_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "glm4_moe_lite": {
        **_COMMON,
        **_LATENT,
        "model_type": "glm4_moe_lite",
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe_lite_yarn": {
        **_COMMON,
        **_LATENT,
        **_yarn(1000000.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.707),
        "model_type": "glm4_moe_lite",
        "attention_bias": True,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.8,
    },
    "minimax_m2": {
        **_COMMON,
        "model_type": "minimax_m2",
        "intermediate_size": 32,
        "head_dim": 24,
        "rotary_dim": 12,
        "rope_theta": 5000000.0,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1] * 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_mtp": True,
        "num_mtp_modules": 3,
        "mtp_transformer_layers": 1,
    },
    "mixtral": _MIXTRAL,
    "mixtral_window": {**_MIXTRAL, "num_hidden_layers": 7, "sliding_window": 100},
    "gpt_oss": {
        **_COMMON,
        "model_type": "gpt_oss",
        "intermediate_size": 24,
        "head_dim": 24,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
        "attention_bias": True,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_local_experts": 8,
        "experts_per_token": 3,
        "num_experts_per_tok": 3,
        "swiglu_limit": 7.0,
    },
    "llama4_scout": _LLAMA4,
    "llama4_maverick": {
        **_LLAMA4,
        "rope_scaling": None,
        "use_qk_norm": False,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 2,
        "attention_bias": True,
    },
    "llama4_multimodal": {
        "model_type": "llama4",
        "text_config": {**_LLAMA4, "num_hidden_layers": 7},
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 8,
            "projector_output_dim": 8,
            "vision_output_dim": 8,
        },
    },
    "gemma2": {
        **_GEMMA,
        "model_type": "gemma2",
        "rope_theta": 10000.0,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 15.0,
    },
    "gemma3_text": _GEMMA3,
    "gemma3_multimodal": {
        "model_type": "gemma3",
        "text_config": {**_GEMMA3, "num_hidden_layers": 7},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 1,
    },
    "phi3_mini": {**_PHI3, "num_key_value_heads": 4, "rope_scaling": None, "sliding_window": 100}
    | {"rope_theta": 10000.0},
    "phi4_mini": {
        **_PHI3,
        "num_hidden_layers": 7,
        "max_position_embeddings": 8192,
        "partial_rotary_factor": 0.75,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "seed_oss": {
        **_COMMON,
        **_rope(theta=10000000.0),
        "model_type": "seed_oss",
        "num_hidden_layers": 7,
        "head_dim": 24,
        "attention_bias": True,
        "attention_out_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {**_MISTRAL, "sliding_window": None},
    "mistral_window": {**_MISTRAL, "num_hidden_layers": 7, "sliding_window": 100},
    "qwen3_next": {
        **_DELTA,
        **_EXPERTS,
        "model_type": "qwen3_next",
        "rope_theta": 10000000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 0.25,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [2],
    },
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_multimodal": {
        "model_type": "qwen3_5",
        "text_config": {**_QWEN3_5, "num_hidden_layers": 7},
        "vision_config": {"model_type": "qwen3_5_vision", **_QWEN_VISION},
    },
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_5_moe_multimodal": {
        "model_type": "qwen3_5_moe",
        "text_config": {**_QWEN3_5_MOE, "num_hidden_layers": 7},
        "vision_config": {"model_type": "qwen3_5_moe_vision", **_QWEN_VISION},
    },
}
# Where the usual tokens bring two experts of some token closer than rounding: other tokens.
_TOKEN_SEEDS = {
    "qwen2_moe": 1,
    "deepseek_v3_plain_queries": 5,
    "kimi_k2": 9,
    "glm4_moe": 3,
    "glm4_moe_air": 2,
    "glm4_moe_lite": 5,
    "minimax_m2": 1,
    "mixtral_window": 1,
    "llama4_maverick": 1,
    "llama4_multimodal": 2,
    "qwen3_next": 5,
    "qwen3_5_moe_multimodal": 3,
}

_VECTORS = {  # last part of a name -> (mean, deviation)
    "bias": (0.0, 0.3),
    "down_proj_bias": (0.0, 0.3),
    "gate_up_proj_bias": (0.0, 2.0),  # some activations beyond the bounds of gpt-oss
    "e_score_correction_bias": (0.0, 0.2),
    "sinks": (2.0, 1.0),
    "A_log": (-3.0, 1.0),  # states that last from a few tokens to hundreds
    "dt_bias": (0.0, 1.0),
}
_GAINS = {  # the last two parts of a name -> gain of its matrix
    "q_proj.weight": 2.0,
    "k_proj.weight": 2.0,
    "qkv_proj.weight": 1.5,
    "q_b_proj.weight": 3.0,
    "gate.weight": 2.0,
    "router.weight": 2.0,
    "experts.gate_up_proj": 2.0,
}


def draw(name, shape):
    """float32 array of the tensor `name`, in the checkpoint's layout."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) ^ SEED)
    x = rng.standard_normal(shape)
    *_, module, kind = name.split(".")
    if kind in _VECTORS:
        mean, deviation = _VECTORS[kind]
        x = mean + deviation * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    elif module == "conv1d":
        x = x / np.sqrt(shape[2])
    elif module != "embed_tokens":
        x = _GAINS.get(f"{module}.{kind}", 1.0) * x / np.sqrt(shape[1])
    return x.astype(np.float32)


def write_checkpoint(folder, config, shapes):
    """config.json and model.safetensors with the drawn tensors of shapes {name: shape}."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: draw(name, shape) for name, shape in shapes.items()}, folder / SINGLE)
    return folder


def text_config(config):
    """The language model's part of a config."""
    return config.get("text_config", config)


def draw_tokens(family, length=LENGTH):
    """int64 [length], the same for almost every family."""
    seed = _TOKEN_SEEDS.get(family, SEED)
    return np.random.RandomState(seed).randint(0, _COMMON["vocab_size"], length)


def captured_layers(config):
    """0-based layers whose output is a feature."""
    n = text_config(config)["num_hidden_layers"]
    return [1, n // 2 - 1, n - 4]
