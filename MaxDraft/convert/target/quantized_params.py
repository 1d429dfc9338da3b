"""Which parameters of a target stay quantized in memory, and how their parts lie there.

A Param whose tensors are all quantized in one format becomes a Quantized of two Params, so that
shardings, shapes, counting and loading go on as for any table. Small parameters are dequantized:
norms and biases are vectors, embedding and head name the vocabulary, routers have no split axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from MaxDraft.convert.target.fp8 import Fp8Tensor, Grid
from MaxDraft.convert.target.mxfp4 import BLOCKS, MX_BLOCK, SCALES, Mxfp4Tensor
from MaxDraft.convert.target.quantization import WeightTensor, part_names
from MaxDraft.convert.tensor_layout import find_layout, per_expert, tensor_names
from MaxDraft.layers.params import Param, Part, Quantized, TensorLayout, Tree, flatten

EXPERTS, VOCAB = "target_experts", "target_vocab"
FP8_IN_MEMORY = "F8_E4M3"
# Axes that no mesh axis of tensor parallelism splits.
WHOLE = ("target_embed", "target_expert_embed", None)


def keep_quantized(table: Tree, tensors: Mapping[str, WeightTensor]) -> Tree:
    """The table where quantized matrices stay as they lie in the files.

    tensors: open_weights(...).
    """
    return jax.tree.map(lambda param: _quantized_param(param, tensors) or param, table)


def dequantized(table: Tree, tensors: Mapping[str, WeightTensor]) -> list[str]:
    """Paths of a table's parameters that are quantized in the files and not in memory."""
    return [
        path
        for path, param in flatten(table)
        if param.dtype != jnp.uint8
        and any(
            isinstance(tensors.get(name), Fp8Tensor | Mxfp4Tensor)
            for name in tensor_names(param, find_layout(tensors, param))
        )
    ]


def _quantized_param(param: Param, tensors: Mapping[str, WeightTensor]) -> Quantized | None:
    """The parameter as its files hold it; None where it is dequantized on loading."""
    split = {axis for axis in param.axes[-2:] if axis is not None}
    if len(param.shape) < 2 or not split or VOCAB in split:
        return None
    layout = find_layout(tensors, param)
    names = tensor_names(param, layout)
    stored = [tensors.get(name) for name in names]
    if any(
        not isinstance(tensor, Fp8Tensor | Mxfp4Tensor) or tensor.problem(layout.transposed)
        for tensor in stored
    ):
        return None  # loading raises an error where a scale is missing or misshaped
    inputs, outputs = param.axes[-2:]
    by_inputs = inputs in WHOLE and outputs not in WHOLE
    tiled = "in" if by_inputs else "out"
    if all(isinstance(tensor, Mxfp4Tensor) for tensor in stored):
        return _mxfp4(param, layout, tiled)
    if all(
        isinstance(tensor, Fp8Tensor) and tensor.values.dtype == FP8_IN_MEMORY for tensor in stored
    ):
        kinds = {
            (tensor.grid(layout.transposed), _name_end(name, tensors))
            for name, tensor in zip(names, stored, strict=True)
        }
        # Layers that are quantized differently cannot be stacked.
        return _fp8(param, layout, tiled, *kinds.pop()) if len(kinds) == 1 else None
    return None


def _name_end(name: str, tensors: Mapping[str, WeightTensor]) -> str:
    """The end by which the scale's name differs from that of the values."""
    return part_names(name, tensors)[0].removeprefix(name)


def _fp8(param: Param, layout: TensorLayout, tiled: str, grid: Grid, end: str) -> Quantized:
    inputs, outputs = param.shape[-2:]
    part = layout.part or Part(0, outputs)
    # Blocks that divide the parameter evenly, each inside one of the file's.
    a = math.gcd(inputs, grid.a)
    b = math.gcd(part.start, outputs, grid.b) if part.step == 1 else 1
    if grid.b >= part.total:
        b = outputs
    lead = param.axes[:-2] if EXPERTS in param.axes else ()
    scale = dataclasses.replace(
        param,
        shape=(*param.shape[:-2], inputs // a, outputs // b),
        axes=(*lead, None, None),
        tensor=layout.name + end,
        transposed=layout.transposed,
        part=Part(part.start, part.total, part.step * b),
        dtype=jnp.float32,
        other_layouts=(),
    )
    values = dataclasses.replace(
        param,
        tensor=layout.name,
        transposed=layout.transposed,
        part=layout.part,
        dtype=jnp.uint8,
        other_layouts=(),
    )
    return Quantized(values, scale, inputs, "fp8", tiled)


def _mxfp4(param: Param, layout: TensorLayout, tiled: str) -> Quantized | None:
    *lead, inputs, outputs = param.shape
    if layout.transposed or per_expert(layout):
        return None

    def piece(end: str, rows: int, axes: tuple[str | None, ...]) -> Param:
        return dataclasses.replace(
            param,
            shape=(*lead, rows, outputs),
            axes=axes,
            tensor=layout.name + end,
            transposed=True,
            part=layout.part,
            dtype=jnp.uint8,
            other_layouts=(),
        )

    values = piece(BLOCKS, inputs // 2, param.axes)
    scale = piece(SCALES, inputs // MX_BLOCK, (*param.axes[:-2], None, param.axes[-1]))
    return Quantized(values, scale, inputs, "mxfp4", tiled)
