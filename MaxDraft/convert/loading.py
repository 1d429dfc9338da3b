"""safetensors -> parameters, each device's part straight from the files.

    parameter[layer, in, out] = tensor_of_that_layer[out, in]      (TensorLayout.transposed)

Every device asks for its own index range, the range is turned round where the file holds [out, in],
and only that is read; quantized numbers are dequantized meanwhile. A part goes to its device one
layer at a time, into a buffer that stands there already: the host holds one layer's part of one
parameter, and nothing else twice.

A part of every row would touch every page of the file. Where a parameter is split so, its devices
read whole rows instead, and exchange them among each other:

    file [out, in], placed (in: fsdp, out: tensor)  ->  read as (out: tensor and fsdp), all-to-all
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from MaxDraft.convert.finite import check_finite
from MaxDraft.convert.stored_tensor import CheckpointError, StoredTensor, will_need
from MaxDraft.convert.target.quantization import (
    FP8_SUFFIXES,
    SCALES,
    Fp8Tensor,
    Index,
    Mxfp4Tensor,
    Reader,
    ScaleTensor,
    WeightTensor,
    oriented,
)
from MaxDraft.layers.params import Param, TensorLayout, Tree, flatten

WEIGHT_DTYPES = ("BF16", "F16", "F32")
_SHOWN = 20  # differences listed in one error
# A transposed or dequantized copy walks the file's rows in strips, so that both sides, and what is
# computed between them, stay in the CPU's cache.
_STRIP = 32
# Bytes that go to a device at once; or a layer's matrix, or an expert's, where that is more.
_PIECE = 16 << 20

Ranges = tuple[range, ...]


# ---------------------------------------------------------------------------------- names, shapes
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


def find_layout(tensors: Mapping[str, WeightTensor], param: Param) -> TensorLayout:
    """The first layout whose tensors are all there; the default where none is complete."""
    for layout in param.layouts:
        if all(name in tensors for name in tensor_names(param, layout)):
            return layout
    return param.layouts[0]


def stored_shape(param: Param, layout: TensorLayout | None = None) -> tuple[int, ...]:
    """Shape of one tensor in the file; layout None: the default one."""
    layout = layout or param.layouts[0]
    return _as_stored(_piece_shape(param, layout), layout)


def _as_stored(shape: tuple[int, ...], layout: TensorLayout) -> tuple[int, ...]:
    *lead, last = shape
    shape = (*lead, layout.part.total if layout.part else last)
    return (*shape[:-2], shape[-1], shape[-2]) if layout.transposed else shape


def _piece_shape(param: Param, layout: TensorLayout) -> tuple[int, ...]:
    """What one tensor holds of the parameter."""
    return param.shape[1:] if per_expert(layout) else param.shape


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
        return tensor.of.problem(layout.transposed)
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
    """A convolution's [C, 1, W] holds the same as [C, W]."""
    return tuple(size for size in shape if size != 1)


def listed(lines: list[str]) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in lines[:_SHOWN] + more)


# ----------------------------------------------------------------------------------------- reading
def load_parameters(
    folder: Path,
    tensors: Mapping[str, WeightTensor],
    table: Tree,
    placement: Tree | None,  # Shardings; None: all on this process' first device
) -> Tree:
    """-> tree of jax.Array of the table's shapes and dtypes.

    CheckpointError lists all missing and mis-shaped tensors at once.
    """
    lines = differences(tensors, table)
    if lines:
        raise CheckpointError(
            f"{folder} does not hold the expected tensors (shapes as stored):{listed(lines)}"
        )
    if placement is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        placement = jax.tree.map(lambda _: device, table)
    return jax.tree.map(lambda p, place: _load(tensors, p, place), table, placement)


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor, as what it holds of a parameter: [in, out], [experts, in, out], [size]."""

    tensor: WeightTensor
    layout: TensorLayout
    shape: tuple[int, ...]
    raw: bool  # quantized numbers stay as they are, as bytes

    def copy_to(self, out: np.ndarray, ranges: Ranges) -> None:
        """out[...] = parameter[ranges], converted to out's dtype."""
        read, tensor = self._reader(), self.tensor
        index = tuple(slice(r.start, r.stop) for r in ranges)
        computed = isinstance(tensor, Fp8Tensor | Mxfp4Tensor) and not self.raw
        if not isinstance(tensor, ScaleTensor):
            will_need(self._in_file(index))
        if len(index) < 2 or not (computed or self.layout.transposed):
            out[...] = read(index)
            self._check_finite(out)
            return
        # Strips of the file's rows, which are the parameter's last dimension where it is turned.
        axis = -1 if self.layout.transposed or isinstance(tensor, Mxfp4Tensor) else -2

        def copy_strip(strip: tuple[Index, Index]) -> None:
            there, here = strip
            out[here] = read(there)

        for _ in _threads().map(copy_strip, _strips(index, axis)):
            pass  # or what a thread raised would be lost
        self._check_finite(out)

    def _check_finite(self, out: np.ndarray) -> None:
        """CheckpointError where a number is not finite; bytes are checked for what they mean."""
        tensor = self.tensor
        if self.raw and isinstance(tensor, Fp8Tensor):
            out = out.view(tensor.values.map().dtype)
        elif self.raw and tensor.name.endswith(SCALES):
            out = out.view(ml_dtypes.float8_e8m0fnu)
        if not self.raw or out.dtype != np.uint8:
            check_finite(f"{tensor.name} in {tensor.file}", out)

    def _in_file(self, index: Index) -> np.ndarray:
        """The stored numbers that a range takes, where they lie."""
        if not isinstance(self.tensor, Mxfp4Tensor):
            return self._lying()[index]
        *lead, inputs, outputs = index
        pairs = slice(inputs.start // 2, -(-inputs.stop // 2))
        by_rows = dataclasses.replace(self.layout, transposed=True)
        return oriented(self.tensor.blocks.map(), by_rows, self.shape)[(*lead, pairs, outputs)]

    def _lying(self) -> np.ndarray:
        """The whole tensor in the order of the parameter; FP8 as bytes."""
        tensor = self.tensor
        if isinstance(tensor, Fp8Tensor):
            tensor = dataclasses.replace(tensor.values, dtype="U8")
        return oriented(
            tensor.map().reshape(_as_stored(self.shape, self.layout)), self.layout, self.shape
        )

    def _reader(self) -> Reader:
        if isinstance(self.tensor, StoredTensor) or (
            isinstance(self.tensor, Fp8Tensor) and self.raw
        ):
            return self._lying().__getitem__
        return self.tensor.reader(self.layout, self.shape)


def _strips(index: Index, axis: int) -> Iterator[tuple[Index, Index]]:
    """(place in the parameter, place in the output) of every strip of every expert."""
    sizes = [1] * (len(index) - 2) + [at.stop - at.start for at in index[-2:]]
    sizes[axis] = _STRIP
    for starts in itertools.product(
        *(range(at.start, at.stop, size) for at, size in zip(index, sizes, strict=True))
    ):
        there = tuple(
            slice(start, min(start + size, at.stop))
            for start, size, at in zip(starts, sizes, index, strict=True)
        )
        here = tuple(
            slice(part.start - at.start, part.stop - at.start)
            for part, at in zip(there, index, strict=True)
        )
        yield there, here


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Strips are read and converted side by side: neither holds Python's lock."""
    return ThreadPoolExecutor(os.cpu_count(), "loading")


def _load(tensors: Mapping[str, WeightTensor], param: Param, place: Sharding) -> jax.Array:
    layout = find_layout(tensors, param)

    def read(ranges: Ranges) -> np.ndarray:
        return _read(tensors, param, layout, ranges)

    by_outputs = layout.transposed or isinstance(
        tensors[tensor_names(param, layout)[0]], Mxfp4Tensor
    )
    rows = _whole_rows(param, place, by_outputs)
    if rows is not None:
        return _exchanged(param, rows, place, read)
    # Pieces are whole rows of the file.
    axis = len(param.full_shape) - 1 if param.layers is None and layout.transposed else 0
    return _place(
        param.full_shape,
        place,
        lambda ranges, devices: _on_devices(param, ranges, devices, read, axis),
    )


def _read(
    tensors: Mapping[str, WeightTensor], param: Param, layout: TensorLayout, ranges: Ranges
) -> np.ndarray:
    """parameter[ranges] from the files of its layers and experts."""
    shape, raw = _piece_shape(param, layout), np.dtype(param.dtype) == np.uint8
    out = np.empty([len(r) for r in ranges], param.dtype)

    def copy_layer(out: np.ndarray, layer: int | None, ranges: Ranges) -> None:
        if not per_expert(layout):
            Source(tensors[tensor_name(layout, layer)], layout, shape, raw).copy_to(out, ranges)
            return
        for row, expert in enumerate(ranges[0]):
            tensor = tensors[tensor_name(layout, layer, expert)]
            Source(tensor, layout, shape, raw).copy_to(out[row], ranges[1:])

    if param.layers is None:
        copy_layer(out, None, ranges)
    else:
        for row, layer in enumerate(ranges[0]):
            copy_layer(out[row], param.layers[layer], ranges[1:])
    return out


def _whole_rows(param: Param, place: Sharding, by_outputs: bool) -> NamedSharding | None:
    """Whole rows of the file instead of `place`; None where it has them, or none can be had.

    by_outputs: the file's rows are the parameter's last dimension.
    """
    shape = param.full_shape
    if len(shape) < 2 or not isinstance(place, NamedSharding):
        return None
    spec = _names(place, len(shape))
    rows, columns = (-1, -2) if by_outputs else (-2, -1)
    by_layer = param.layers is not None and (spec[0] or len(shape) == 2)
    joined = spec[rows] + spec[columns]
    if not spec[columns] or by_layer:
        return None
    spec[rows], spec[columns] = joined, ()
    whole_rows = NamedSharding(place.mesh, PartitionSpec(*spec))
    return None if shape[rows] % _splits(whole_rows, len(shape))[rows] else whole_rows


def _names(place: NamedSharding, dimensions: int) -> list[tuple[str, ...]]:
    """The mesh axes that really split each dimension."""
    spec = [axes if isinstance(axes, tuple) else (axes,) for axes in place.spec]
    spec += [()] * (dimensions - len(spec))
    return [tuple(name for name in axes if name and place.mesh.shape[name] > 1) for axes in spec]


def _splits(place: NamedSharding, dimensions: int) -> list[int]:
    """Into how many parts each dimension is split."""
    return [
        math.prod(place.mesh.shape[name] for name in axes) for axes in _names(place, dimensions)
    ]


# --------------------------------------------------------------------------------- onto the devices
def _place(
    shape: tuple[int, ...],
    place: Sharding,
    parts_of: Callable[[Ranges, list[jax.Device]], list[jax.Array]],
) -> jax.Array:
    """Every part that this process holds, made once for all of its devices that hold it."""
    devices: dict[Ranges, list[jax.Device]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        ranges = tuple(range(*at.indices(size)) for at, size in zip(index, shape, strict=True))
        devices.setdefault(ranges, []).append(device)
    parts = {}
    for ranges, holders in devices.items():
        parts |= dict(zip(holders, parts_of(ranges, holders), strict=True))
    order = [parts[device] for device in place.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, place, order)


def _exchanged(
    param: Param, rows: NamedSharding, place: NamedSharding, read: Callable[[Ranges], np.ndarray]
) -> jax.Array:
    """Read as `rows` says, a layer at a time or less, and moved into `place` on the devices."""
    shape, dtype = param.full_shape, np.dtype(param.dtype)
    zeros, move, write = _exchange(place, dtype)
    # A CPU would exchange bfloat16 as float32; bits go over as they are.
    bits = np.dtype(f"u{dtype.itemsize}")
    whole = zeros(shape)
    for index in _exchanged_pieces(param, rows, place):
        starts = tuple(at.start for at in index)

        def parts_of(
            ranges: Ranges, holders: list[jax.Device], starts: tuple[int, ...] = starts
        ) -> list[jax.Array]:
            moved = (range(r.start + s, r.stop + s) for r, s in zip(ranges, starts, strict=True))
            part = read(tuple(moved)).view(bits)
            return [jax.device_put(part, device) for device in holders]

        piece = _place(tuple(at.stop - at.start for at in index), rows, parts_of)
        whole = write(whole, move(piece), starts)
        jax.block_until_ready(whole)  # or the next pieces pile up on the host
    return whole


def _exchanged_pieces(param: Param, rows: NamedSharding, place: NamedSharding) -> Iterator[Index]:
    """Index of every piece: a layer, cut further along a dimension that `place` leaves whole."""
    steps = list(param.full_shape)
    if param.layers is not None:
        steps[0] = 1
    read_by, held_by = (_splits(sharding, len(steps)) for sharding in (rows, place))
    part = np.dtype(param.dtype).itemsize * math.prod(steps) // math.prod(read_by)
    whole = [at for at, size in enumerate(steps) if size > 1 and held_by[at] == 1]
    if whole and part > _PIECE:
        at, least = whole[0], read_by[whole[0]]
        steps[at] = max(least, steps[at] * _PIECE // part // least * least)
    return _grid(param.full_shape, steps)


@functools.cache
def _exchange(place: NamedSharding, dtype: np.dtype) -> tuple[Callable[..., jax.Array], ...]:
    """-> an empty parameter; a piece as it was read, moved into `place`; and written there."""

    def move(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jax.lax.with_sharding_constraint(bits, place), dtype)

    return (
        jax.jit(lambda shape: jnp.zeros(shape, dtype), static_argnums=0, out_shardings=place),
        jax.jit(move, out_shardings=place),
        jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=place),
    )


def _on_devices(
    param: Param,
    ranges: Ranges,
    devices: list[jax.Device],
    read: Callable[[Ranges], np.ndarray],
    axis: int,
) -> list[jax.Array]:
    sizes = [len(r) for r in ranges]
    pieces = list(_pieces(sizes, np.dtype(param.dtype).itemsize, axis))
    if len(pieces) == 1:
        part = read(ranges)
        return [jax.device_put(part, device) for device in devices]
    wholes = [jnp.zeros(sizes, param.dtype, device=device) for device in devices]
    for index in pieces:
        piece = read(tuple(r[at] for r, at in zip(ranges, index, strict=True)))
        starts = tuple(at.start for at in index)
        wholes = [
            _write(whole, jax.device_put(piece, device), starts)
            for whole, device in zip(wholes, devices, strict=True)
        ]
        jax.block_until_ready(wholes)  # or the next pieces pile up on the host
    return wholes


def _pieces(sizes: list[int], itemsize: int, axis: int) -> Iterator[Index]:
    """Index of every piece; of a layer's experts, where they are too many, some at a time."""
    steps, row = list(sizes), itemsize * int(np.prod(sizes)) // max(1, sizes[axis])
    steps[axis] = max(1, min(sizes[axis], _PIECE // max(1, row)))
    if len(sizes) == 4 and row > _PIECE:
        steps[1] = max(1, sizes[1] * _PIECE // row)
    return _grid(sizes, steps)


def _grid(sizes: Sequence[int], steps: Sequence[int]) -> Iterator[Index]:
    """Index of every box of `steps` in `sizes`, in order."""
    for starts in itertools.product(
        *(range(0, size, step) for size, step in zip(sizes, steps, strict=True))
    ):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(starts, steps, sizes, strict=True)
        )


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, piece: jax.Array, starts: tuple[int, ...]) -> jax.Array:
    """whole with the piece at `starts`, in the same memory."""
    return jax.lax.dynamic_update_slice(whole, piece, starts)
