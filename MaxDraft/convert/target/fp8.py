"""FP8: X is float8 [out, in], with X_scale_inv or X_scale beside it, wherever in the files.

    w = X * scale

A scale stands for the whole tensor, an output, or a block; it multiplies, whatever "inv" suggests.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from MaxDraft.convert.stored_tensor import DTYPES, CheckpointError, Index, Reader, StoredTensor
from MaxDraft.convert.tensor_layout import oriented
from MaxDraft.layers.params import TensorLayout

FP8 = ("F8_E4M3", "F8_E5M2")
FP8_SUFFIXES = ("_scale_inv", "_scale")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclasses.dataclass(frozen=True)
class Fp8Tensor:
    """A float8 tensor and its scale."""

    values: StoredTensor
    scale: StoredTensor | None  # None: it is missing
    block: tuple[int, int]  # [outputs, inputs]
    # Whether config.json declares blocks: it decides where a scale's shape fits outputs as well.
    in_blocks: bool = False

    @property
    def name(self) -> str:
        return self.values.name

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def grid(self, transposed: bool) -> Grid | None:
        """How the scales lie, in the order of the parameter; None where their shape fits none."""
        if len(self.shape) < 2:
            return None
        *lead, rows, cols = self.shape
        inputs, outputs = (cols, rows) if transposed else (rows, cols)
        shape = self.scale.shape
        if math.prod(shape) == 1:
            return Grid((*([1] * len(lead)), 1, 1), False, inputs, outputs)
        if lead and _squeeze(shape) == _squeeze(lead):
            return Grid((*lead, 1, 1), False, inputs, outputs)
        a, b = self.block if transposed else self.block[::-1]
        in_blocks = shape == (*lead, -(-rows // a), -(-cols // b))
        # Llama 4's experts [experts, in, out] have scales [experts, 1, out] or [experts, out, 1].
        by_output = _squeeze(shape) == _squeeze((*lead, outputs))
        if by_output and not (in_blocks and self.in_blocks):
            return Grid((*lead, 1, outputs), False, inputs, 1)
        if in_blocks:
            return Grid(shape, transposed, *((b, a) if transposed else (a, b)))
        return None

    def problem(self, transposed: bool) -> str | None:
        """What is wrong with the scale, None where nothing is."""
        if self.scale is None:
            names = " nor ".join(self.name + suffix for suffix in FP8_SUFFIXES)
            return f"{self.name}: is {self.values.dtype} and its scale is missing: neither {names}"
        if self.scale.dtype not in SCALE_DTYPES:
            return f"{self.scale.name}: dtype {self.scale.dtype} is no scale's"
        if self.grid(transposed) is None:
            return (
                f"{self.scale.name}: shape {list(self.scale.shape)} fits no scale of {self.name} "
                f"{list(self.shape)}: neither one number, nor one for each output, nor one for "
                f"each block of {self.block[0]} outputs and {self.block[1]} inputs"
            )
        return None

    def reader(self, layout: TensorLayout, shape: tuple[int, ...]) -> Reader:
        """A function from a range of the parameter to its float32 numbers."""
        codes = oriented(dataclasses.replace(self.values, dtype="U8").map(), layout, shape)
        table = np.arange(256, dtype=np.uint8).view(DTYPES[self.values.dtype]).astype(np.float32)
        grid = self.grid(layout.transposed)
        scales = grid.read_scales(self.scale)
        start, step = (layout.part.start, layout.part.step) if layout.part else (0, 1)

        def read(index: Index) -> np.ndarray:
            *lead, rows, cols = index
            a = np.arange(rows.start, rows.stop) // grid.a
            b = (start + step * np.arange(cols.start, cols.stop)) // grid.b
            factors = scales[tuple(lead)] if lead and len(scales) > 1 else scales
            factors = factors.take(a, axis=-2).take(b, axis=-1)
            if layout.transposed:  # the look-up is several times faster in the file's order
                return (table[codes[index].swapaxes(-1, -2)]).swapaxes(-1, -2) * factors
            return table[codes[index]] * factors

        return read


@dataclasses.dataclass(frozen=True)
class Grid:
    """How scales lie: in the order of the parameter [experts or 1, in / a, out / b], rounded up."""

    shape: tuple[int, ...]  # as stored, with a dimension of one where the parameter has one
    transposed: bool
    a: int  # inputs that share a scale
    b: int  # outputs that share a scale

    def read_scales(self, scale: StoredTensor) -> np.ndarray:
        """The scales as float32; CheckpointError where one is NaN or infinite."""
        array = scale.read().astype(np.float32).reshape(self.shape)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{scale.name}: has scales that are no finite numbers")
        return array.swapaxes(-1, -2) if self.transposed else array


@dataclasses.dataclass(frozen=True)
class ScaleTensor:
    """The scale of a float8 tensor, as a parameter of its own.

    Such a parameter is [..., in / a, out / b] with a and b that divide evenly; where the file's
    last block is cut short, a scale of it is there several times.
    """

    tensor: Fp8Tensor

    @property
    def name(self) -> str:
        return self.tensor.scale.name

    @property
    def file(self) -> Path:
        return self.tensor.scale.file

    def reader(self, layout: TensorLayout, shape: tuple[int, ...]) -> Reader:
        """A function from a range of the parameter to its float32 scales.

        layout.part.step: outputs of the float8 tensor that lie between two scales.
        """
        grid = self.tensor.grid(layout.transposed)
        scales = grid.read_scales(self.tensor.scale)
        inputs = self.tensor.shape[-1] if layout.transposed else self.tensor.shape[-2]
        a = np.arange(shape[-2]) * (inputs // shape[-2]) // grid.a
        b = (layout.part.start + layout.part.step * np.arange(shape[-1])) // grid.b
        whole = np.broadcast_to(scales[..., a, :][..., b], shape)
        return lambda index: whole[index]


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
