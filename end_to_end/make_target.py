"""Writes a small random target of a family, in the files in which people have such a model.

    python3 end_to_end/make_target.py FAMILY FOLDER

    FOLDER/target/                 config.json, generation_config.json, tokenizer, model.safetensors
    FOLDER/conversations.jsonl     what the tokenizer was trained on

The tensors are the family's own parameter table turned round: every parameter is drawn and written
where the loader looks first, so no tensor name stands here. DeepSeek-V3 and gpt-oss are quantized,
as they are published; the rest is bfloat16.

Every layer is random. The embedding is too, and the LM head knows, seen through it, which token
follows which in the conversations:

    head[v] ~ sum over t of P(v | t) embed[t]

so that the target's replies look like text, differ from prompt to prompt, and can be learnt. Where
the head is the embedding, the last norm's signs keep it from repeating the token it has just read.

E experts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from goldens import recipe

from MaxDraft.convert.loading import per_expert, stored_shape, tensor_name
from MaxDraft.convert.target.quantization import BLOCKS, E2M1, MX_BLOCK, SCALES
from MaxDraft.drafts.eagle3.dims import default_captured_layers
from MaxDraft.layers.params import Param, flatten
from MaxDraft.targets import registry
from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.table import decoder_params
from MaxDraft.tiny_target import corpus, tokenizer

VOCABULARY = 512
CONVERSATIONS = 400
LENGTH = 128  # tokens of the longest conversation
HEAD_SCALE = 2.5  # length of a row of the LM head: how far apart logits are
TIED_SCALE = 5.0  # of the last norm, where the embedding is the head: the same

_BOS = tokenizer.SPECIAL_TOKENS.index(tokenizer.TEXT_END)
_EOS = tokenizer.SPECIAL_TOKENS.index(tokenizer.TURN_END)

# --------------------------------------------------------------------------------- config.json
# Windows, chunks and the original lengths of rope scalings are far below LENGTH.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": _BOS,
    "eos_token_id": _EOS,
    "pad_token_id": _BOS,
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
# What stands before the names of a multimodal file's language model.
PREFIXES = {"llama4": "language_model."}


# ---------------------------------------------------------------------------------------- files
def main(argv: list[str]) -> int:
    if len(argv) != 3 or argv[1] not in {**CONFIGS, **recipe.CONFIGS}:
        print(
            f"usage: make_target.py FAMILY FOLDER, FAMILY one of {', '.join(CONFIGS)}; or a golden "
            f"target of the tests, {', '.join(sorted(recipe.CONFIGS.keys() - CONFIGS.keys()))}"
        )
        return 2
    write(argv[1], Path(argv[2]))
    return 0


def write(family: str, folder: Path) -> Path:
    """Everything that a run needs -> the target's folder."""
    target = folder / "target"
    target.mkdir(parents=True, exist_ok=True)
    records, bpe, _ = texts()
    with (folder / "conversations.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    tokenizer.save(bpe, target, _COMMON["max_position_embeddings"])
    config = config_of(family)
    ids = registry.text_config(config)
    tokenizer.write_json(
        target / "generation_config.json",
        {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_weights(config, target, PREFIXES.get(family, ""))
    return target


def config_of(family: str) -> dict[str, Any]:
    """Of the families above, or of a golden target with this tokenizer's vocabulary."""
    if family in CONFIGS:
        return CONFIGS[family]
    ours = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return recipe.CONFIGS[family] | {name: _COMMON[name] for name in ours}


def write_weights(config: dict[str, Any], folder: Path, prefix: str = "") -> None:
    """config.json and model.safetensors, quantized as config says."""
    tokenizer.write_json(folder / "config.json", config)
    quantize = QUANTIZERS[config.get("quantization_config", {}).get("quant_method")]
    tensors = {
        prefix + part: np.ascontiguousarray(array)
        for name, whole in stored(config)
        for part, array in quantize(name, whole)
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@functools.cache
def texts() -> tuple[list[corpus.Record], Any, np.ndarray]:
    """Conversations, their tokenizer, and how often an answer has token v after t: [t, v]."""
    records = corpus.conversations(corpus.read_entries(corpus.standard_library()))
    bpe = tokenizer.train(
        (message["content"] for record in records for message in record["messages"]), VOCABULARY
    )
    kept, follows = [], np.zeros((VOCABULARY, VOCABULARY))
    for record in records:
        encoded = tokenizer.encode(bpe, record["messages"])
        tokens, answered = np.array(encoded.tokens), np.array(encoded.answered)
        if len(tokens) <= LENGTH and len(kept) < CONVERSATIONS:
            kept.append(record)
            np.add.at(follows, (tokens[:-1], tokens[1:]), answered[1:])
    return kept, bpe, follows


# -------------------------------------------------------------------------------------- weights
def stored(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of the unquantized file."""
    dims = registry.dims_from_config(config)
    table = decoder_params(dims, default_captured_layers(dims.num_layers), jnp.bfloat16)
    drawn = {path: draw(path, param, dims) for path, param in flatten(table)}
    seen = texts()[2].sum(0)[:, None]
    common = (seen / seen.max()) ** 0.05  # [V, 1]: seldom tokens are seldom chosen
    if dims.tied_head:
        drawn["embed"] *= common
    else:
        drawn["head"] = (common * followers(drawn["embed"])).T
    fused: dict[str, np.ndarray] = {}
    for path, param in flatten(table):
        for name, piece in pieces(param, drawn[path]):
            array = fused.setdefault(name, np.zeros(stored_shape(param), param.dtype))
            place(array, param, piece)
    yield from fused.items()


def pieces(param: Param, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter cut into what each tensor holds of it."""
    layout = param.layouts[0]
    for row, layer in enumerate([None] if param.layers is None else param.layers):
        of_layer = values if layer is None else values[row]
        if per_expert(layout):
            for expert, one in enumerate(of_layer):
                yield tensor_name(layout, layer, expert), one
        else:
            yield tensor_name(layout, layer), of_layer


def place(array: np.ndarray, param: Param, piece: np.ndarray) -> None:
    """Writes what a tensor holds of a parameter into it: the inverse of reading."""
    layout = param.layouts[0]
    turned = array.swapaxes(-1, -2) if layout.transposed and array.ndim > 1 else array
    if layout.part:
        stop = layout.part.start + piece.shape[-1] * layout.part.step
        turned = turned[..., layout.part.start : stop : layout.part.step]
    turned[...] = piece.astype(array.dtype)


def draw(path: str, param: Param, dims: DecoderDims) -> np.ndarray:
    """Random float32 values, by the parameter's path."""
    x = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(param.full_shape)
    name = path.split("/")[-1]
    branch = dims.num_layers**-0.5  # of its two branches a layer adds half as much as it reads
    if name == "embed":
        x /= dims.embed_scale
    elif path == "norm" and dims.tied_head:
        x = TIED_SCALE * np.sign(x) - dims.norm_offset
    elif name.endswith("norm"):
        sandwich = branch if name.endswith("post_norm") else 1.0
        x = sandwich * (1 + 0.1 * x) - dims.norm_offset
    elif name.endswith("bias"):
        x *= 0.1
    elif len(param.shape) > 1:
        x *= (branch if name in ("o", "down") else 1.0) / np.sqrt(param.shape[-2])
    return x.astype(np.float32)


def followers(embed: np.ndarray) -> np.ndarray:
    """[V, H]: of every token the mean embedding of those it follows, all of one length."""
    _, _, follows = texts()
    likely = follows / np.maximum(follows.sum(1, keepdims=True), 1)
    sums = likely.T @ embed
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return HEAD_SCALE * sums / np.maximum(lengths, 1e-9)  # 0 where it follows none


# -------------------------------------------------------------------------------- quantization
def plain(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """As it is."""
    yield name, array


def fp8(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Matrices as float8 with a scale for every 128 x 128, but embedding, head and router."""
    if array.ndim < 2 or name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")):
        yield name, array
        return
    rows, cols = array.shape
    scale = np.empty((-(-rows // 128), -(-cols // 128)), np.float32)
    values = np.empty(array.shape, ml_dtypes.float8_e4m3fn)
    for a, b in np.ndindex(scale.shape):
        block = np.s_[128 * a : 128 * a + 128, 128 * b : 128 * b + 128]
        numbers = array[block].astype(np.float32)
        scale[a, b] = np.abs(numbers).max() / 448
        values[block] = (numbers / scale[a, b]).astype(values.dtype)
    yield name, values
    yield name + "_scale_inv", scale


def mxfp4(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Experts' matrices [E, in, out] as 4 bits a number with an exponent for every 32 inputs."""
    if array.ndim < 3:
        yield name, array
        return
    numbers = array.astype(np.float32).swapaxes(-1, -2)
    numbers = numbers.reshape(*numbers.shape[:-1], -1, MX_BLOCK)
    exponent = np.floor(np.log2(np.abs(numbers).max(-1))) - 2  # the largest number is 6 = 1.5 * 2^2
    scaled = np.ldexp(numbers, -exponent[..., None].astype(np.int32))
    code = np.abs(scaled[..., None] - E2M1).argmin(-1).astype(np.uint8)
    yield name + BLOCKS, code[..., ::2] | code[..., 1::2] << 4
    yield name + SCALES, (exponent + 127).astype(np.uint8)


QUANTIZERS = {None: plain, "fp8": fp8, "mxfp4": mxfp4}


if __name__ == "__main__":
    sys.exit(main(sys.argv))
