"""What the tiny target is: sizes, training, special tokens and the config.json that follows.

Apart from what makes it, so that the benchmark knows its dimensions where neither tokenizers nor
safetensors are installed.
"""

from __future__ import annotations

import dataclasses

TEXT_END = "<|endoftext|>"  # bos and pad; stands in no conversation
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # eos
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END)  # their ids are 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how hard; every run of the same settings takes the same steps."""

    steps: int = 400
    rows: int = 4  # B
    length: int = 192  # T
    learning_rate: float = 4e-3
    prompt_weight: float = 0.1  # of prompt tokens; those of answers weigh 1
    weight_decay: float = 0.1
    warmup_steps: int = 20
    seed: int = 0
    log_every: int = 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes of the target and of its training."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 8  # the fewest for which [1, n//2 - 1, n - 4] leaves every layer its own part
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 2048
    max_position_embeddings: int = 512
    conversations: int = -1  # that are kept; -1: all
    training: Training = dataclasses.field(default_factory=Training)


def hf_config(recipe: Recipe, vocab_size: int) -> dict:
    """config.json of a Llama; the rotary embedding in both spellings, old and new."""
    theta = 10000.0
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.hidden_size // recipe.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": recipe.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": SPECIAL_TOKENS.index(TEXT_END),
        "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
        "pad_token_id": SPECIAL_TOKENS.index(TEXT_END),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
