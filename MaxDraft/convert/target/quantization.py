"""What a checkpoint's quantized tensors mean: each stands for the matrix that it is a part of.

Only weights are quantized here: what a config.json says about activations is for engines that
multiply in 8 bits, and would only add their error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from MaxDraft.convert.stored_tensor import CheckpointError, StoredTensor
from MaxDraft.convert.target.fp8 import FP8, FP8_SUFFIXES, Fp8Tensor, ScaleTensor
from MaxDraft.convert.target.mxfp4 import BLOCKS, SCALES, Mxfp4Tensor
from MaxDraft.convert.target.quantization_config import DEFAULT_BLOCK, Quantization

# Ends of the names that only the tensors of one format have, of formats that are not read.
UNREAD_PACKINGS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "packed compressed-tensors",
    ".weight_scale_2": "NVFP4",
    ".weight.absmax": "4-bit bitsandbytes",
    ".SCB": "8-bit bitsandbytes",
    ".scales": "MLX",
    ".W_q": "HQQ",
}


WeightTensor = StoredTensor | Fp8Tensor | ScaleTensor | Mxfp4Tensor


def pair(
    tensors: Mapping[str, StoredTensor],
    block: tuple[int, int] = DEFAULT_BLOCK,
    in_blocks: bool = False,
) -> dict[str, WeightTensor]:
    """Tensors by name, where a quantized one stands for the matrix that it is a part of.

    block: [outputs, inputs] that share a scale of FP8. in_blocks: whether the checkpoint declares
    that there are blocks.
    """
    paired: dict[str, WeightTensor] = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype in FP8:
            scale = _scale_name(name, tensors)
            paired[name] = Fp8Tensor(tensor, tensors.get(scale), block, in_blocks)
            if scale:
                paired[scale] = ScaleTensor(paired[name])
        elif _is_mxfp4_block(name, tensor):
            *lead, groups, size = tensor.shape
            blocks = dataclasses.replace(tensor, shape=(*lead, groups * size))
            scales = name.removesuffix(BLOCKS) + SCALES
            paired[name] = blocks
            paired[name.removesuffix(BLOCKS)] = Mxfp4Tensor(blocks, tensors.get(scales))
    return paired


def check_packing(
    folder: Path, tensors: Mapping[str, StoredTensor], quantization: Quantization | None
) -> None:
    """CheckpointError where the files hold quantized weights that are not read or not declared.

    tensors: under the names of a plain language model.
    """
    text_tensors = [
        (name, tensor, f"{folder} holds {name} {tensor.dtype} {list(tensor.shape)}")
        for name, tensor in tensors.items()
        if name.startswith(("model.", "lm_head."))
    ]
    for name, _, description in text_tensors:
        packing = next((p for end, p in UNREAD_PACKINGS.items() if name.endswith(end)), None)
        if packing:
            raise CheckpointError(
                f"{description}: {packing} weights, which cannot be read. Give as target_path the "
                f"unquantized model that this one was made from; a head trained on that one "
                f"serves this one as well"
            )
    for name, tensor, description in text_tensors:
        is_quantized = tensor.dtype in FP8 or _is_mxfp4_block(name, tensor)
        if is_quantized and quantization is None:
            raise CheckpointError(
                f"{description}, and no config.json or hf_quant_config.json declares how it is "
                f"quantized: copy the quantization_config of the model's own config.json into the "
                f"one there"
            )


def _is_mxfp4_block(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(BLOCKS) and tensor.dtype == "U8" and tensor.shape[-1:] == (16,)


def _scale_name(name: str, tensors: Mapping[str, Any]) -> str | None:
    names = [name + suffix for suffix in FP8_SUFFIXES if name + suffix in tensors]
    if len(names) > 1:
        raise CheckpointError(f"{name}: has two scales, {' and '.join(names)}")
    return names[0] if names else None


def part_names(name: str, tensors: Mapping[str, WeightTensor]) -> list[str]:
    """Names of the further tensors that a quantized one is made of."""
    if isinstance(tensors.get(name), Mxfp4Tensor):
        return [name + BLOCKS, name + SCALES]
    if isinstance(tensors.get(name), Fp8Tensor):
        scale = _scale_name(name, tensors)
        return [scale] if scale else []
    return []
