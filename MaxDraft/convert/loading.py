"""safetensors -> parameters, each device's part straight from the files.

    parameter[layer, in, out] = tensor_of_that_layer[out, in]      (TensorLayout.transposed)

Every device reads only its own range of a parameter, transposed and dequantized on the way
(read_tensor.py). A part goes to its device one layer at a time, into a buffer that was allocated
there before: the host holds one layer's part of one parameter, and nothing else twice.

Reading a part of every row would touch every page of the file. Where a parameter is split along its
rows, the devices therefore read whole rows, and exchange them among each other:

    file [out, in], placed (in: fsdp, out: tensor)  ->  read as (out: tensor and fsdp), all-to-all
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from MaxDraft.convert.differences import differences, listed
from MaxDraft.convert.read_tensor import Ranges, Source
from MaxDraft.convert.stored_tensor import CheckpointError, Index
from MaxDraft.convert.target.mxfp4 import Mxfp4Tensor
from MaxDraft.convert.target.quantization import WeightTensor
from MaxDraft.convert.tensor_layout import (
    find_layout,
    per_expert,
    piece_shape,
    tensor_name,
    tensor_names,
)
from MaxDraft.layers.params import Param, TensorLayout, Tree

# Bytes that go to a device at once; a single matrix of a layer, or of an expert, may be more.
_PIECE = 16 << 20


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
    shape, raw = piece_shape(param, layout), np.dtype(param.dtype) == np.uint8
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
    """A sharding that reads whole rows of the file; None if `place` does, or no sharding can.

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
    # XLA exchanges bfloat16 as float32 on a CPU; integers of the same width it moves unchanged.
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
        jax.block_until_ready(whole)  # without this the next pieces would pile up on the host
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
    """Programs: allocate a parameter; move a piece into `place`; write it into the parameter."""

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
        jax.block_until_ready(wholes)  # without this the next pieces would pile up on the host
    return wholes


def _pieces(sizes: list[int], itemsize: int, axis: int) -> Iterator[Index]:
    """Index of every piece; a layer whose experts exceed a piece is cut along its experts."""
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
