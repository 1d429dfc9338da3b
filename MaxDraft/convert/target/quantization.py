"""What a checkpoint's quantized tensors mean.

    FP8     X is float8 [out, in] and X_scale_inv or X_scale beside it, wherever in the files:
            w = X * scale, where a scale stands for the whole tensor, an output, or a block
    MXFP4   X_blocks uint8 [experts, out, in / 32, 16] and X_scales uint8 [experts, out, in / 32]:
            two e2m1 numbers a byte, the low half first, w = e2m1 * 2 ^ (scale - 127)
            (OCP Microscaling Formats 1.0); together they are the tensor X [experts, in, out]

Both multiply, whatever "inv" suggests. Only weights are quantized here: what a config.json says
about activations is for engines that multiply in 8 bits, and would only add their error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from MaxDraft.convert.stored_tensor import DTYPES, CheckpointError, StoredTensor
from MaxDraft.convert.target.quantization_config import DEFAULT_BLOCK, Quantization
from MaxDraft.layers.params import Part, TensorLayout

FP8 = ("F8_E4M3", "F8_E5M2")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
FP8_SUFFIXES = ("_scale_inv", "_scale")
BLOCKS, SCALES = "_blocks", "_scales"
MX_BLOCK = 32  # inputs that share an exponent
# By its four bits: sign, two of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# By byte: its two numbers, the low half's first, as the eight bytes that they are in memory.
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64)[:, 0]
# By the byte of a scale; 255 is no number.
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))

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

Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fp8Tensor:
    """A float8 tensor and its scale."""

    values: StoredTensor
    scale: StoredTensor | None  # None: it is missing
    block: tuple[int, int]  # [outputs, inputs]
    in_blocks: bool = False  # config.json says so: holds where a scale's shape fits outputs as well

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
        """How the scales lie, in the order of the parameter; None: the scale has a wrong shape."""
        if len(self.shape) < 2:
            return None
        *lead, rows, cols = self.shape
        inputs, outputs = (cols, rows) if transposed else (rows, cols)
        found = self.scale.shape
        if math.prod(found) == 1:
            return Grid((*([1] * len(lead)), 1, 1), False, inputs, outputs)
        if lead and _squeeze(found) == _squeeze(lead):
            return Grid((*lead, 1, 1), False, inputs, outputs)
        a, b = self.block if transposed else self.block[::-1]
        in_blocks = found == (*lead, -(-rows // a), -(-cols // b))
        # Llama 4's experts [experts, in, out] have scales [experts, 1, out] or [experts, out, 1].
        by_output = _squeeze(found) == _squeeze((*lead, outputs))
        if by_output and not (in_blocks and self.in_blocks):
            return Grid((*lead, 1, outputs), False, inputs, 1)
        if in_blocks:
            return Grid(found, transposed, *((b, a) if transposed else (a, b)))
        return None

    def problem(self, transposed: bool) -> str | None:
        """What is wrong with its scale."""
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
        """-> function from an index range of the parameter to its float32 numbers."""
        codes = oriented(dataclasses.replace(self.values, dtype="U8").map(), layout, shape)
        table = np.arange(256, dtype=np.uint8).view(DTYPES[self.values.dtype]).astype(np.float32)
        grid = self.grid(layout.transposed)
        scales = grid.of(self.scale)
        start, step = (layout.part.start, layout.part.step) if layout.part else (0, 1)

        def read(index: Index) -> np.ndarray:
            *lead, rows, cols = index
            a = np.arange(rows.start, rows.stop) // grid.a
            b = (start + step * np.arange(cols.start, cols.stop)) // grid.b
            some = scales[tuple(lead)] if lead and len(scales) > 1 else scales
            some = some.take(a, axis=-2).take(b, axis=-1)
            if layout.transposed:  # the look-up is several times faster in the file's order
                return (table[codes[index].swapaxes(-1, -2)]).swapaxes(-1, -2) * some
            return table[codes[index]] * some

        return read


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scales in the order of the parameter: [experts or 1, in / a, out / b], rounded up."""

    shape: tuple[int, ...]  # as stored, dimensions of one set right
    transposed: bool
    a: int
    b: int

    def of(self, scale: StoredTensor) -> np.ndarray:
        """The scales as float32."""
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

    of: Fp8Tensor

    @property
    def name(self) -> str:
        return self.of.scale.name

    @property
    def file(self) -> Path:
        return self.of.scale.file

    def reader(self, layout: TensorLayout, shape: tuple[int, ...]) -> Reader:
        """-> function from an index range of the parameter to its float32 numbers.

        layout.part.step: outputs of the float8 tensor that lie between two scales.
        """
        grid = self.of.grid(layout.transposed)
        scales = grid.of(self.of.scale)
        inputs = self.of.shape[-1] if layout.transposed else self.of.shape[-2]
        a = np.arange(shape[-2]) * (inputs // shape[-2]) // grid.a
        b = (layout.part.start + layout.part.step * np.arange(shape[-1])) // grid.b
        whole = np.broadcast_to(scales[..., a, :][..., b], shape)
        return lambda index: whole[index]


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """Blocks and scales that together are one tensor [experts, in, out]."""

    blocks: StoredTensor  # [experts, out, in / 2]
    scales: StoredTensor | None  # [experts, out, in / 32]; None: it is missing

    @property
    def name(self) -> str:
        return self.blocks.name.removesuffix(BLOCKS)

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, outputs, half = self.blocks.shape
        return (*lead, 2 * half, outputs)

    def problem(self, transposed: bool) -> str | None:
        """What is wrong with its scales."""
        if self.scales is None:
            return f"{self.blocks.name}: its scales {self.name}{SCALES} are missing"
        *lead, inputs, outputs = self.shape
        expected = (*lead, outputs, inputs // MX_BLOCK)
        if self.scales.dtype != "U8" or self.scales.shape != expected:
            return (
                f"{self.scales.name}: expected U8 {list(expected)} beside {self.blocks.name}, "
                f"found {self.scales.dtype} {list(self.scales.shape)}"
            )
        return None

    def reader(self, layout: TensorLayout, shape: tuple[int, ...]) -> Reader:
        """-> function from an index range of the parameter to its float32 numbers."""
        as_stored = dataclasses.replace(layout, transposed=True)
        blocks = oriented(self.blocks.map(), as_stored, shape)  # [..., in / 2, out]
        scales = oriented(self.scales.map(), as_stored, shape)  # [..., in / 32, out]

        def read(index: Index) -> np.ndarray:
            *lead, rows, cols = index
            first, last = rows.start // MX_BLOCK, -(-rows.stop // MX_BLOCK)
            bytes_ = blocks[(*lead, slice(first * MX_BLOCK // 2, last * MX_BLOCK // 2), cols)]
            some = scales[(*lead, slice(first, last), cols)].swapaxes(-1, -2)  # [..., out, blocks]
            numbers = (
                PAIRS.take(bytes_.swapaxes(-1, -2)).view(np.float32).reshape(*some.shape, MX_BLOCK)
            )
            numbers = (numbers * POWERS[some][..., None]).reshape(*some.shape[:-1], -1)
            inputs = slice(rows.start - first * MX_BLOCK, rows.stop - first * MX_BLOCK)
            return numbers.swapaxes(-1, -2)[..., inputs, :]

        return read


WeightTensor = StoredTensor | Fp8Tensor | ScaleTensor | Mxfp4Tensor


def pair(
    tensors: Mapping[str, StoredTensor],
    block: tuple[int, int] = DEFAULT_BLOCK,
    in_blocks: bool = False,
) -> dict[str, WeightTensor]:
    """Tensors by name, where a quantized one stands for what it means."""
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
    for name, tensor in tensors.items():
        if not name.startswith(("model.", "lm_head.")):
            continue
        packing = next((p for end, p in UNREAD_PACKINGS.items() if name.endswith(end)), None)
        if packing:
            raise CheckpointError(
                f"{folder} holds {name} {tensor.dtype} {list(tensor.shape)}: {packing} weights, "
                f"which cannot be read. Give as target_path the unquantized model that this one "
                f"was made from; a head trained on that one serves this one as well"
            )
        packed = tensor.dtype in FP8 or _is_mxfp4_block(name, tensor)
        if packed and quantization is None:
            raise CheckpointError(
                f"{folder} holds {name} {tensor.dtype} {list(tensor.shape)}, and no config.json or "
                f"hf_quant_config.json declares how it is quantized: copy the quantization_config "
                f"of the model's own config.json into the one there"
            )


def _is_mxfp4_block(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(BLOCKS) and tensor.dtype == "U8" and tensor.shape[-1:] == (16,)


def _scale_name(name: str, tensors: Mapping[str, Any]) -> str | None:
    found = [name + end for end in FP8_SUFFIXES if name + end in tensors]
    if len(found) > 1:
        raise CheckpointError(f"{name}: has two scales, {' and '.join(found)}")
    return found[0] if found else None


def part_names(name: str, tensors: Mapping[str, WeightTensor]) -> list[str]:
    """Names of the further tensors that a quantized one is made of."""
    if isinstance(tensors.get(name), Mxfp4Tensor):
        return [name + BLOCKS, name + SCALES]
    if isinstance(tensors.get(name), Fp8Tensor):
        scale = _scale_name(name, tensors)
        return [scale] if scale else []
    return []


def oriented(array: np.ndarray, layout: TensorLayout, shape: tuple[int, ...]) -> np.ndarray:
    """A stored array in the order of the parameter, its part only; nothing is copied."""
    array = array.swapaxes(-1, -2) if layout.transposed and array.ndim > 1 else array
    part = layout.part or Part(0, shape[-1])
    return array[..., part.start : part.start + shape[-1] * part.step : part.step]


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
