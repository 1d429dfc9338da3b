"""config.json of a small model of each family, spelt as its published files are.

Windows, chunks and the original lengths of rope scalings are far below the 128 tokens of the
longest conversation, so that a run of a few steps meets them. The tokenizer is that of weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MaxDraft.tiny_target.recipe import SPECIAL_TOKENS, TEXT_END, TURN_END

VOCAB_SIZE = 512
MAX_POSITION_EMBEDDINGS = 256
_BOS = SPECIAL_TOKENS.index(TEXT_END)
_EOS = SPECIAL_TOKENS.index(TURN_END)
TOKENIZER_FIELDS = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": _BOS,
    "eos_token_id": _EOS,
    "pad_token_id": _BOS,
}
_COMMON = {
    **TOKENIZER_FIELDS,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
_LATENT = {  # with experts as DeepSeek-V3 routes them
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
CONFIGS = {
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 7,
        "head_dim": 24,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 7,
    },
    "deepseek_v3": {
        **_LATENT,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 2,
        "moe_layer_freq": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
    "glm4_moe_lite": {
        **_LATENT,
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "eos_token_id": [_BOS, _EOS],
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
    },
    "gpt_oss": {
        **_COMMON,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": 64,
        "head_dim": 32,
        "attention_bias": True,
        "num_local_experts": 8,
        "experts_per_token": 2,
        "num_experts_per_tok": 2,
        "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "sliding_window": 32,
        "initial_context_length": 64,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    },
    "llama4": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": "bfloat16",
        "text_config": {
            **_COMMON,
            "model_type": "llama4_text",
            "head_dim": 16,
            "intermediate_size": 32,
            "intermediate_size_mlp": 160,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [],
            "attention_chunk_size": 32,
            "attn_temperature_tuning": True,
            "floor_scale": 16,
            "attn_scale": 0.1,
            "use_qk_norm": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "gemma3": {
        **{key: value for key, value in _COMMON.items() if key != "hidden_act"},
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    },
}


def with_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of any family with the vocabulary of this tokenizer."""
    config = dict(config)
    if isinstance(config.get("text_config"), Mapping):
        return config | {"text_config": config["text_config"] | TOKENIZER_FIELDS}
    return config | TOKENIZER_FIELDS
