"""Everything that a run on a small random target needs, written into one folder.

FOLDER/target/                 config.json, generation_config.json, tokenizer, model.safetensors
FOLDER/conversations.jsonl     what the tokenizer was trained on
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from MaxDraft import storage
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.random_target.configs import MAX_POSITION_EMBEDDINGS
from MaxDraft.random_target.quantize import QUANTIZERS
from MaxDraft.random_target.weights import draw_tensors, texts
from MaxDraft.targets import registry
from MaxDraft.tiny_target import tokenizer


def write(config: Mapping[str, Any], folder: Path) -> Path:
    """Target and conversations for a config.json with this tokenizer -> the target's folder."""
    target = folder / "target"
    target.mkdir(parents=True, exist_ok=True)
    records, bpe, _ = texts()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    storage.write_text(folder / "conversations.jsonl", lines)
    tokenizer.save(bpe, target, MAX_POSITION_EMBEDDINGS)
    fields = registry.text_config(config)
    storage.write_json(
        target / "generation_config.json",
        {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_weights(config, target)
    return target


def write_weights(config: Mapping[str, Any], folder: Path) -> None:
    """config.json and model.safetensors, quantized as the config says."""
    storage.write_json(folder / "config.json", config)
    method = config.get("quantization_config", {}).get("quant_method")
    if method not in QUANTIZERS:
        raise CheckpointError(
            f"a random target can be quantized as {', '.join(filter(None, QUANTIZERS))}, not as "
            f"{method!r}"
        )
    quantize = QUANTIZERS[method]
    # A multimodal file has its language model's tensors under a name of their own.
    prefix = "language_model." if "text_config" in config else ""
    tensors = {
        prefix + part: np.ascontiguousarray(array)
        for name, whole in draw_tensors(config)
        for part, array in quantize(name, whole)
    }
    content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    storage.write_bytes(folder / "model.safetensors", content)
