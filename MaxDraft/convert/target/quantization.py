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
from typing import Any

import numpy as np

from MaxDraft.convert.stored_tensor import DTYPES, CheckpointError, StoredTensor
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
_DEFAULT_BLOCK = (128, 128)
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")

Index = tuple[slice, ...]
Reader = Callable[[Index], np.ndarray]


# ---------------------------------------------------------------------------------- config.json
@dataclasses.dataclass(frozen=True)
class Quantization:
    """What config.json says about the weights."""

    method: str
    block: tuple[int, int] = _DEFAULT_BLOCK  # [outputs, inputs] of a block, where there are blocks
    in_blocks: bool = False  # it says that there are
    activations: bool = False  # it also says how activations are quantized

    def __str__(self) -> str:
        ignored = "; its quantization of activations is not applied" if self.activations else ""
        return f"{self.method} weights{ignored}"


def check_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """How the target's weights are quantized; None: they are not.

    CheckpointError for what cannot be read.
    """
    # Multimodal files may say it of their text only; the older name is compressed-tensors'.
    inner = config.get("text_config")
    sources = (config, inner if isinstance(inner, Mapping) else {})
    names = ("quantization_config", "compression_config")
    said = next((source[name] for source in sources for name in names if source.get(name)), None)
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise _refusal(f"quantization_config {said!r}")
    method = said.get("quant_method")
    if method == "fp8":
        return _plain_fp8(said)
    if method == "fbgemm_fp8":
        return Quantization(method, activations=True)
    if method == "mxfp4":
        return Quantization(method)
    if method == "compressed-tensors":
        return _compressed_tensors(said)
    raise _refusal(f"quant_method '{method}'")


def _plain_fp8(said: Mapping[str, Any]) -> Quantization:
    if said.get("expert_dtype", "fp8") != "fp8":
        raise _refusal(f"expert_dtype '{said['expert_dtype']}'")
    size = said.get("weight_block_size")
    return Quantization("fp8", _block(size), size is not None, True)


def _block(size: Any) -> tuple[int, int]:
    if size is None:
        return _DEFAULT_BLOCK
    two = isinstance(size, list | tuple) and len(size) == 2
    if not two or any(type(one) is not int or one < 1 for one in size):
        raise _refusal(f"weight blocks of {size!r}")
    return (size[0], size[1])


def _compressed_tensors(said: Mapping[str, Any]) -> Quantization:
    sparsity = _part(said, "sparsity_config").get("format") or "dense"
    if sparsity != "dense":
        raise _refusal(f"compressed-tensors sparsity '{sparsity}'")
    if said.get("transform_config"):  # rotations of the weights and what enters them
        raise _refusal(f"compressed-tensors transform_config {said['transform_config']!r}")
    found = _part(said, "config_groups")
    groups = [_part(found, name) for name in found]
    blocks = set()
    for group in groups:
        weights = _part(group, "weights")
        if not weights:
            continue
        for name, usual in (("symmetric", True), ("dynamic", False), ("actorder", None)):
            if weights.get(name) not in (usual, None):
                raise _refusal(f"compressed-tensors weights with {name} {weights[name]!r}")
        layout = group.get("format") or said.get("format")
        kind, bits = weights.get("type"), weights.get("num_bits")
        strategy = weights.get("strategy")
        if layout not in _FLOAT_FORMATS or (kind, bits) != ("float", 8):
            raise _refusal(f"compressed-tensors format '{layout}' with {bits}-bit {kind} weights")
        if strategy not in ("tensor", "channel", "block"):
            raise _refusal(f"compressed-tensors weights with strategy '{strategy}'")
        if strategy == "block":
            blocks.add(_block(weights.get("block_structure")))
    if len(blocks) > 1:
        raise _refusal(f"compressed-tensors groups with different blocks {sorted(blocks)}")
    activations = any(group.get("input_activations") for group in groups)
    block = next(iter(blocks), _DEFAULT_BLOCK)
    return Quantization("compressed-tensors", block, block in blocks, activations)


def _part(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """said[name], an object of fields; {} where it says nothing."""
    value = said.get(name) or {}
    if not isinstance(value, Mapping):
        raise _refusal(f"compressed-tensors {name} {value!r}")
    return value


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json says {what}, which cannot be read. Known are fp8, fbgemm_fp8, mxfp4 and "
        f"compressed-tensors with 8-bit float weights; take such a checkpoint or an unquantized one"
    )


# -------------------------------------------------------------------------------------- tensors
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
    block: tuple[int, int] = _DEFAULT_BLOCK,
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
        elif name.endswith(BLOCKS) and tensor.dtype == "U8" and tensor.shape[-1:] == (16,):
            *lead, groups, size = tensor.shape
            blocks = dataclasses.replace(tensor, shape=(*lead, groups * size))
            scales = name.removesuffix(BLOCKS) + SCALES
            paired[name] = blocks
            paired[name.removesuffix(BLOCKS)] = Mxfp4Tensor(blocks, tensors.get(scales))
    return paired


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
