"""What is wrong with a mesh, its rules or the processes, before any device is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator

from MaxDraft.config_layers import Values
from MaxDraft.config_renames import explain_value
from MaxDraft.config_yaml import nearest

# The names of dimensions in the parameter tables and in `constrain`.
LOGICAL_AXES = (
    "target_experts",
    "target_expert_embed",
    "target_expert_mlp",
    *(f"target_{name}" for name in ("batch", "embed", "heads", "kv_heads", "mlp", "vocab")),
    *(f"draft_{name}" for name in ("batch", "embed", "heads", "kv_heads", "mlp", "vocab")),
)


def problems(values: Values) -> Iterator[str]:
    """What is wrong with the mesh, the rules and the processes of a configuration."""
    yield from _mesh(values)
    yield from _rules(values)
    yield from _distributed(values)


def _mesh(values: Values) -> Iterator[str]:
    axes = _axes(values)
    if sorted(values["mesh_axes"]) != sorted(axes):
        yield (
            f"mesh_axes must name each of {', '.join(axes)} once, the axes that have an "
            f"ici_ and a dcn_ key; not {values['mesh_axes']}"
        )
    for kind, things in (("ici", "devices"), ("dcn", "slices")):
        sizes = {
            f"{kind}_{axis}_parallelism": values[f"{kind}_{axis}_parallelism"] for axis in axes
        }
        rest = [key for key, size in sizes.items() if size == -1]
        if len(rest) > 1:
            yield f"{' and '.join(rest)} are both -1; only one can take the {things} that remain"


def _axes(values: Values) -> list[str]:
    return [key[len("ici_") : -len("_parallelism")] for key in values if key.startswith("ici_")]


def _rules(values: Values) -> Iterator[str]:
    seen = set()
    draft_batch = dict(values["logical_axis_rules"]).get("draft_batch", ())
    if sorted(draft_batch) != sorted(_axes(values)):
        yield (
            f"logical_axis_rules: draft_batch must be split over every mesh axis, "
            f"{', '.join(_axes(values))}; not {list(draft_batch)}"
        )
    for logical, mesh_axes in values["logical_axis_rules"]:
        if logical in seen:
            yield f"logical_axis_rules: {logical} has two rules; keep one"
        seen.add(logical)
        if logical not in LOGICAL_AXES:
            yield (
                f"logical_axis_rules: no parameter or activation has the axis {logical!r}"
                f"{nearest(logical, LOGICAL_AXES)}"
            )
        for axis in dict.fromkeys(mesh_axes):
            if axis not in _axes(values):
                yield (
                    f"logical_axis_rules: {logical} names {axis!r}, which is no mesh axis"
                    f"{nearest(axis, _axes(values))}"
                )
            if mesh_axes.count(axis) > 1:
                yield f"logical_axis_rules: {logical} names mesh axis {axis!r} twice"


def _distributed(values: Values) -> Iterator[str]:
    address = values["distributed_coordinator"]
    count, index = values["distributed_num_processes"], values["distributed_process_id"]
    if not address:
        if (count, index) != (1, 0):
            yield (
                f"distributed_num_processes={count} and distributed_process_id={index} need "
                f"distributed_coordinator=host:port of process 0"
            )
        return
    if not re.fullmatch(r"\S+:[0-9]{1,5}", address):
        hint = explain_value("distributed_coordinator", address, ())
        yield f"distributed_coordinator must be host:port or empty, not {address!r}{hint}"
        return
    if count < 2:
        yield (
            f"distributed_coordinator={address} is for several processes; give "
            f"distributed_num_processes, the same for all, and each its distributed_process_id"
        )
    elif index >= count:
        yield (
            f"distributed_process_id={index} must be below distributed_num_processes={count}: "
            f"the processes count from 0"
        )
