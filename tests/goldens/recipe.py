"""The small random targets of the golden files: configurations, weights, tokens, sampled positions.

make_goldens.py (torch) and test_targets.py (JAX) both read this file, so that the two sides hold
the same numbers without a weight being stored. A tensor is drawn from NumPy's legacy generator,
whose stream never changes, seeded by the CRC-32 of the tensor's name xor SEED:

    matrix [out, in]    normal * gain / sqrt(in); gain 2 for q_proj and k_proj, else 1
    embedding [V, H]    normal
    norm weight         1 + 0.1 normal
    bias                0.3 normal

The gain makes attention sharp enough to feel its rotary angles. `original_max_position_embeddings`
is small, so that at T = 1024 most positions lie where a scaling changes the features.
"""

import zlib
from pathlib import Path

import numpy as np

SEED = 20250
LENGTH = 1024  # tokens of a golden sequence
POSITIONS = (0, 1, 2, 17, 63, 64, 200, 511, 512, 777, 1022, 1023)  # stored ones
FOLDER = Path(__file__).parent

_COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
_LLAMA = {**_COMMON, "model_type": "llama", "num_hidden_layers": 8, "tie_word_embeddings": False}
_QWEN2 = {**_COMMON, "model_type": "qwen2", "num_hidden_layers": 7, "tie_word_embeddings": False}


def _rope(kind="default", theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


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
        **_COMMON,
        **_rope(theta=1000000.0),
        "model_type": "qwen3",
        "num_hidden_layers": 8,
        "head_dim": 24,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
}


def draw(name, shape):
    """float32 array of the tensor `name`, in the checkpoint's layout ([out, in])."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) ^ SEED)
    x = rng.standard_normal(shape)
    if name.endswith(".bias"):
        x = 0.3 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    elif "embed_tokens" not in name:
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        x = gain * x / np.sqrt(shape[1])
    return x.astype(np.float32)


def draw_tokens(config, length=LENGTH):
    """int64 [length], the same for every vocabulary of one size."""
    return np.random.RandomState(SEED).randint(0, config["vocab_size"], length)


def captured_layers(config):
    """0-based layers whose output is a feature."""
    n = config["num_hidden_layers"]
    return [1, n // 2 - 1, n - 4]
