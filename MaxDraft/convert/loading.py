"""safetensors -> parameters, each device's part straight from the files.

    parameter[layer, in, out] = tensor_of_that_layer[out, in]      (Stored.transposed)

Every device asks for its own index range, the range is turned round where the file holds [out, in],
and only those numbers are copied; quantised numbers are dequantised on the way. A part goes to its
device one layer at a time, into a buffer that stands there already: the host holds one layer's
part of one parameter, and nothing else twice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from MaxDraft.convert.quantization import (
    Fp8Tensor,
    Index,
    Mxfp4Tensor,
    Reader,
    ScaleTensor,
    WeightTensor,
    oriented,
)
from MaxDraft.convert.safetensors_files import CheckpointError, StoredTensor
from MaxDraft.layers.params import Param, Stored, Tree, flatten

WEIGHT_DTYPES = ("BF16", "F16", "F32")
_SHOWN = 20  # differences listed in one error
# A transposed or dequantised copy walks the file's rows in strips, so that both sides, and what is
# computed between them, stay in the CPU's cache.
_STRIP = 32
# Bytes that go to a device at once; or a layer's matrix, or an expert's, where that is more.
_PIECE = 16 << 20

Ranges = tuple[range, ...]


# ---------------------------------------------------------------------------------- names, shapes
def tensor_name(way: Stored, layer: int | None, expert: int | None = None) -> str:
    """The checkpoint's name for one layer's parameter, or one expert's."""
    return way.name.replace("{layer}", str(layer)).replace("{expert}", str(expert))


def tensor_names(param: Param, way: Stored) -> list[str]:
    """All names behind a parameter: of its layers, and of their experts."""
    layers = [None] if param.layers is None else param.layers
    experts = range(param.shape[0]) if per_expert(way) else [None]
    return [tensor_name(way, layer, expert) for layer in layers for expert in experts]


def per_expert(way: Stored) -> bool:
    """Whether every expert has a tensor of its own."""
    return "{expert}" in way.name


def find_way(tensors: Mapping[str, WeightTensor], param: Param) -> Stored:
    """The first way whose tensors are all there; the usual one where there is none."""
    for way in param.ways:
        if all(name in tensors for name in tensor_names(param, way)):
            return way
    return param.ways[0]


def stored_shape(param: Param, way: Stored | None = None) -> tuple[int, ...]:
    """Shape of one tensor in the file; way None: the usual one."""
    way = way or param.ways[0]
    return _as_stored(_piece_shape(param, way), way)


def _as_stored(shape: tuple[int, ...], way: Stored) -> tuple[int, ...]:
    *lead, last = shape
    shape = (*lead, way.part.total if way.part else last)
    return (*shape[:-2], shape[-1], shape[-2]) if way.transposed else shape


def _piece_shape(param: Param, way: Stored) -> tuple[int, ...]:
    """What one tensor holds of the parameter."""
    return param.shape[1:] if per_expert(way) else param.shape


def differences(tensors: Mapping[str, WeightTensor], table: Tree) -> list[str]:
    """Every tensor of the table that the files lack, hold in another shape, or as no weight."""
    lines = []
    for _, param in flatten(table):
        way = find_way(tensors, param)
        expected = stored_shape(param, way)
        for name in tensor_names(param, way):
            if name not in tensors:
                lines.append(f"{name}: missing, expected {list(expected)}")
            else:
                problem = _problem(tensors[name], param, way, expected)
                lines += [problem] if problem else []
    return lines


def _problem(
    tensor: WeightTensor, param: Param, way: Stored, expected: tuple[int, ...]
) -> str | None:
    if isinstance(tensor, ScaleTensor):
        return tensor.of.problem(way.transposed)
    if _without_ones(tensor.shape) != _without_ones(expected):
        return f"{tensor.name}: expected {list(expected)}, found {list(tensor.shape)}"
    if isinstance(tensor, Fp8Tensor | Mxfp4Tensor):
        return tensor.problem(way.transposed)
    kept = tensor.dtype == "U8" and param.dtype == np.uint8
    if tensor.dtype in WEIGHT_DTYPES or kept:
        return None
    return (
        f"{tensor.name}: dtype {tensor.dtype} is not {', '.join(WEIGHT_DTYPES)}; take a "
        f"checkpoint that is not quantised"
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
    way: Stored
    shape: tuple[int, ...]
    raw: bool  # quantised numbers stay as they are, as bytes

    def copy_to(self, out: np.ndarray, ranges: Ranges) -> None:
        """out[...] = parameter[ranges], converted to out's dtype."""
        read, tensor = self._reader(), self.tensor
        index = tuple(slice(r.start, r.stop) for r in ranges)
        computed = isinstance(tensor, Fp8Tensor | Mxfp4Tensor) and not self.raw
        if len(index) < 2 or not (computed or self.way.transposed):
            out[...] = read(index)
            return
        # Strips of the file's rows, which are the parameter's last dimension where it is turned.
        axis = -1 if self.way.transposed or isinstance(tensor, Mxfp4Tensor) else -2

        def copy_strip(strip: tuple[Index, Index]) -> None:
            there, here = strip
            out[here] = read(there)

        for _ in _threads().map(copy_strip, _strips(index, axis)):
            pass  # or what a thread raised would be lost

    def _reader(self) -> Reader:
        tensor = self.tensor
        if isinstance(tensor, Fp8Tensor) and self.raw:
            tensor = dataclasses.replace(tensor.values, dtype="U8")
        if isinstance(tensor, StoredTensor):
            array = tensor.map().reshape(_as_stored(self.shape, self.way))
            array = oriented(array, self.way, self.shape)
            return lambda index: array[index]
        return tensor.reader(self.way, self.shape)


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
    way = find_way(tensors, param)
    shape = _piece_shape(param, way)
    raw = np.dtype(param.dtype) == np.uint8

    def copy_layer(out: np.ndarray, layer: int | None, ranges: Ranges) -> None:
        if not per_expert(way):
            Source(tensors[tensor_name(way, layer)], way, shape, raw).copy_to(out, ranges)
            return
        for row, expert in enumerate(ranges[0]):
            tensor = tensors[tensor_name(way, layer, expert)]
            Source(tensor, way, shape, raw).copy_to(out[row], ranges[1:])

    def read(ranges: Ranges) -> np.ndarray:
        out = np.empty([len(r) for r in ranges], param.dtype)
        if param.layers is None:
            copy_layer(out, None, ranges)
        else:
            for row, layer in enumerate(ranges[0]):
                copy_layer(out[row], param.layers[layer], ranges[1:])
        return out

    # Pieces are whole rows of the file.
    axis = len(param.full_shape) - 1 if param.layers is None and way.transposed else 0
    return _place(param, place, read, axis)


# --------------------------------------------------------------------------------- onto the devices
def _place(
    param: Param, place: Sharding, read: Callable[[Ranges], np.ndarray], axis: int
) -> jax.Array:
    """Reads every part that this process holds, once, and puts it on its devices in pieces."""
    shape = param.full_shape
    devices: dict[Ranges, list[jax.Device]] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        ranges = tuple(range(*at.indices(size)) for at, size in zip(index, shape, strict=True))
        devices.setdefault(ranges, []).append(device)
    parts = {}
    for ranges, holders in devices.items():
        parts |= dict(zip(holders, _on_devices(param, ranges, holders, read, axis), strict=True))
    order = [parts[device] for device in place.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, place, order)


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
