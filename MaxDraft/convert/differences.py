"""What the tensors of a checkpoint lack of a parameter table, all in one message."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from MaxDraft.convert.stored_tensor import StoredTensor
from MaxDraft.convert.target.fp8 import FP8_SUFFIXES, Fp8Tensor, ScaleTensor
from MaxDraft.convert.target.mxfp4 import Mxfp4Tensor
from MaxDraft.convert.target.quantization import WeightTensor
from MaxDraft.convert.tensor_layout import find_layout, stored_shape, tensor_names
from MaxDraft.layers.params import Param, TensorLayout, Tree, flatten

WEIGHT_DTYPES = ("BF16", "F16", "F32")
_SHOWN = 20  # differences listed in one error


def differences(tensors: Mapping[str, WeightTensor], table: Tree) -> list[str]:
    """Every tensor of the table that the files lack, hold in another shape, or as no weight."""
    lines = []
    for _, param in flatten(table):
        layout = find_layout(tensors, param)
        expected = stored_shape(param, layout)
        for name in tensor_names(param, layout):
            if name not in tensors:
                lines.append(f"{name}: missing, expected {list(expected)}")
            else:
                problem = _problem(tensors[name], param, layout, expected)
                problem = problem or _stray_scale(name, tensors)
                lines += [problem] if problem else []
    return lines


def _problem(
    tensor: WeightTensor, param: Param, layout: TensorLayout, expected: tuple[int, ...]
) -> str | None:
    if isinstance(tensor, ScaleTensor):
        return tensor.tensor.problem(layout.transposed)
    is_quantized = isinstance(tensor, Fp8Tensor | Mxfp4Tensor)
    stays_quantized = not is_quantized and tensor.dtype == "U8" and param.dtype == np.uint8
    if not (is_quantized or stays_quantized or tensor.dtype in WEIGHT_DTYPES):
        return (
            f"{tensor.name}: {tensor.dtype} {list(tensor.shape)} where {list(expected)} of "
            f"{', '.join(WEIGHT_DTYPES)} is expected; take a checkpoint that is not quantized"
        )
    if _without_ones(tensor.shape) != _without_ones(expected):
        return f"{tensor.name}: expected {list(expected)}, found {list(tensor.shape)}"
    return tensor.problem(layout.transposed) if is_quantized else None


def _stray_scale(name: str, tensors: Mapping[str, WeightTensor]) -> str | None:
    """A scale beside a tensor that is not quantized: nobody knows whether it is applied already."""
    if not isinstance(tensors[name], StoredTensor):
        return None
    scales = [name + suffix for suffix in FP8_SUFFIXES if name + suffix in tensors]
    if not scales:
        return None
    return (
        f"{name}: is {tensors[name].dtype} with a scale {scales[0]} beside it; take a checkpoint "
        f"that is not quantized"
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution's [conv_dim, 1, W] holds the same as [conv_dim, W]."""
    return tuple(size for size in shape if size != 1)


def listed(lines: list[str]) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in lines[:_SHOWN] + more)
