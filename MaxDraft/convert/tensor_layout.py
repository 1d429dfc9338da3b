"""Names, shapes and order of the tensors that hold a parameter in a checkpoint.

parameter[layer, in, out] = tensor_of_that_layer[out, in]      (TensorLayout.transposed)
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from MaxDraft.layers.params import Param, Part, TensorLayout


def tensor_name(layout: TensorLayout, layer: int | None, expert: int | None = None) -> str:
    """The checkpoint's name for one layer's parameter, or one expert's."""
    return layout.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))


def tensor_names(param: Param, layout: TensorLayout) -> list[str]:
    """All names behind a parameter: of its layers, and of their experts."""
    layers = [None] if param.layers is None else param.layers
    experts = range(param.shape[0]) if per_expert(layout) else [None]
    return [tensor_name(layout, layer, expert) for layer in layers for expert in experts]


def per_expert(layout: TensorLayout) -> bool:
    """Whether every expert has a tensor of its own."""
    return "{expert}" in layout.name


def find_layout(tensors: Container[str], param: Param) -> TensorLayout:
    """The first layout whose tensors are all there; the default where none is complete."""
    for layout in param.layouts:
        if all(name in tensors for name in tensor_names(param, layout)):
            return layout
    return param.layouts[0]


def stored_shape(param: Param, layout: TensorLayout | None = None) -> tuple[int, ...]:
    """Shape of one tensor in the file; layout None: the default one."""
    layout = layout or param.layouts[0]
    return as_stored(piece_shape(param, layout), layout)


def as_stored(shape: tuple[int, ...], layout: TensorLayout) -> tuple[int, ...]:
    *lead, last = shape
    shape = (*lead, layout.part.total if layout.part else last)
    return (*shape[:-2], shape[-1], shape[-2]) if layout.transposed else shape


def piece_shape(param: Param, layout: TensorLayout) -> tuple[int, ...]:
    """What one tensor holds of the parameter."""
    return param.shape[1:] if per_expert(layout) else param.shape


def oriented(array: np.ndarray, layout: TensorLayout, shape: tuple[int, ...]) -> np.ndarray:
    """A stored array in the order of the parameter, its part only; nothing is copied."""
    array = array.swapaxes(-1, -2) if layout.transposed and array.ndim > 1 else array
    part = layout.part or Part(0, shape[-1])
    return array[..., part.start : part.start + shape[-1] * part.step : part.step]
