"""safetensors -> parameters, each device's part straight from the files.

    parameter[layer, in, out] = tensor_of_that_layer[out, in]      (Param.transposed)

Every device asks for its own index range, the range is turned round where the file holds [out, in],
and only those bytes are read. One parameter's parts are on the host at a time, never the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from MaxDraft.convert.safetensors_files import WEIGHT_DTYPES, CheckpointError, StoredTensor
from MaxDraft.layers.params import Param, Tree, flatten

_SHOWN = 20  # differences listed in one error


def tensor_names(param: Param) -> list[str]:
    """Checkpoint names behind one parameter, one per stacked layer."""
    if param.layers is None:
        return [param.tensor]
    return [param.tensor.replace("{layer}", str(layer)) for layer in param.layers]


def stored_shape(param: Param) -> tuple[int, ...]:
    """Shape of one layer's tensor in the file."""
    return param.shape[::-1] if param.transposed else param.shape


def differences(tensors: Mapping[str, StoredTensor], table: Tree) -> list[str]:
    """Every tensor of the table that the files lack, hold in another shape, or as no weight."""
    lines = []
    for _, param in flatten(table):
        expected = stored_shape(param)
        for name in tensor_names(param):
            if name not in tensors:
                lines.append(f"{name}: missing, expected {list(expected)}")
                continue
            found = tensors[name]
            if found.shape != expected:
                lines.append(f"{name}: expected {list(expected)}, found {list(found.shape)}")
            elif found.dtype not in WEIGHT_DTYPES:
                lines.append(
                    f"{name}: dtype {found.dtype} is not {', '.join(WEIGHT_DTYPES)}; take a "
                    f"checkpoint that is not quantised"
                )
    return lines


def listed(lines: list[str]) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in lines[:_SHOWN] + more)


def load_parameters(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
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


def _load(tensors: Mapping[str, StoredTensor], param: Param, place: Sharding) -> jax.Array:
    stored = [tensors[name] for name in tensor_names(param)]
    parts: dict[tuple, np.ndarray] = {}  # replicas on one host are read once

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = tuple(
            range(*at.indices(size)) for at, size in zip(index, param.full_shape, strict=True)
        )
        if ranges not in parts:
            parts[ranges] = read_part(ranges)
        return parts[ranges]

    def read_part(ranges: tuple[range, ...]) -> np.ndarray:
        out = np.empty([len(r) for r in ranges], param.dtype)
        within = ranges if param.layers is None else ranges[1:]
        index = tuple(slice(r.start, r.stop) for r in within)
        index = index[::-1] if param.transposed else index
        if param.layers is None:
            stored[0].copy_to(out, index, param.transposed)
        else:
            for row, layer in enumerate(ranges[0]):
                stored[layer].copy_to(out[row], index, param.transposed)
        return out

    return jax.make_array_from_callback(param.full_shape, place, part)
