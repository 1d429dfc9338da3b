"""Device mesh, and the rules that map logical axes to mesh axes.

Parameters and activations name their dimensions ("draft_batch", "target_heads"); which devices hold
which part is data: `logical_axis_rules` of the config. Inside `with axis_rules(mesh, rules):` the
layers' `constrain(x, "draft_batch", None, None)` pins an activation; outside it does nothing, so
every layer also runs alone on one device.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft.errors import UserError

Rules = Sequence[tuple[str, Sequence[str]]]

_active: contextvars.ContextVar[tuple[Mesh, dict[str, tuple[str, ...]]] | None] = (
    contextvars.ContextVar("axis_rules", default=None)
)


class ShardingError(UserError):
    """A mesh that the devices cannot form, or a dimension that a mesh axis does not divide."""


def fill_parallelism(sizes: Sequence[int], available: int, kind: str) -> tuple[int, ...]:
    """Replaces the one -1 among `sizes` so that their product is `available`."""
    sizes = list(sizes)
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and available % known == 0:
        sizes[sizes.index(-1)] = available // known
    if int(np.prod(sizes)) != available:
        raise ShardingError(
            f"{kind}_*_parallelism {tuple(sizes)} does not multiply to the {available} "
            f"{'devices of a slice' if kind == 'ici' else 'slices'} there are; "
            f"set one of them to -1 to take what remains"
        )
    return tuple(sizes)


def make_mesh(
    axis_names: Sequence[str],
    ici: Sequence[int],
    dcn: Sequence[int],
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh over all devices: `ici` sizes inside a slice, `dcn` sizes across slices.

    devices: of a machine that is not there, to compile for it.
    """
    devices = jax.devices() if devices is None else devices
    num_slices = 1 + max(getattr(device, "slice_index", None) or 0 for device in devices)
    dcn = fill_parallelism(dcn, num_slices, "dcn")
    ici = fill_parallelism(ici, len(devices) // num_slices, "ici")
    if num_slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(ici, dcn, devices)
    else:
        grid = mesh_utils.create_device_mesh(ici, devices)
    return Mesh(grid, tuple(axis_names))


@contextlib.contextmanager
def axis_rules(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes `constrain` and `partition_spec` use these rules while a function is traced."""
    token = _active.set((mesh, {axis: tuple(mesh_axes) for axis, mesh_axes in rules}))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def on_each_device() -> Iterator[None]:
    """Makes `constrain` the identity, for what is traced inside a shard_map."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def scatter_sum(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Inside a shard_map over all of `mesh`: this device's part, by `spec`, of the sum of all x."""
    left = list(mesh.axis_names)
    for dim, part in enumerate(spec):
        axes = _mesh_axes(part)
        if axes:
            x = jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
            left = [axis for axis in left if axis not in axes]
    return jax.lax.psum(x, tuple(left)) if left else x


def active_rules() -> tuple[Mesh, dict[str, tuple[str, ...]]] | None:
    """The mesh and {logical axis: mesh axes} of the innermost `axis_rules`; None outside."""
    return _active.get()


def _mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one dimension of a PartitionSpec names."""
    return (part,) if isinstance(part, str) else (part or ())


def num_shards(axis: str) -> int:
    """How many devices share a logical axis under the active rules; 1 outside."""
    if _active.get() is None:
        return 1
    mesh, rules = _active.get()
    return int(np.prod([mesh.shape[name] for name in rules.get(axis, ())]))


def partition_spec(axes: Sequence[str | None], rules: dict[str, tuple[str, ...]]) -> PartitionSpec:
    """Logical axes of one array -> PartitionSpec; a mesh axis may serve one dimension only."""
    parts, used = [], set()
    for axis in axes:
        mesh_axes = rules.get(axis, ()) if axis is not None else ()
        twice = used.intersection(mesh_axes)
        if twice:
            raise ShardingError(
                f"logical_axis_rules put mesh axis {sorted(twice)} on two dimensions of {axes}"
            )
        used.update(mesh_axes)
        parts.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    return PartitionSpec(*parts)


def named_sharding(mesh: Mesh, rules: Rules, axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of an array with these logical axes."""
    table = {axis: tuple(mesh_axes) for axis, mesh_axes in rules}
    return NamedSharding(mesh, partition_spec(axes, table))


def check_divisible(name: str, shape: Sequence[int], sharding: NamedSharding) -> None:
    """Raises ShardingError where a dimension is not a multiple of the devices that share it."""
    for dim, part in zip(shape, sharding.spec, strict=False):
        mesh_axes = _mesh_axes(part)
        devices = int(np.prod([sharding.mesh.shape[axis] for axis in mesh_axes]))
        if dim % devices:
            raise ShardingError(
                f"{name} has shape {tuple(shape)}: {dim} cannot be split over {devices} devices "
                f"(mesh axes {'+'.join(mesh_axes)}); lower that axis' ici_*_parallelism"
            )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins `x` to the sharding of its logical axes; the identity when no rules are active."""
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, rules)))
