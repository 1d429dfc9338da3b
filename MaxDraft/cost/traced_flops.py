"""FLOPs of the matrix products and convolutions of a traced program, 2 per multiply-add.

flops.py says what the method needs; this counts what a program asks for, before XLA has seen it:
padding, recomputation and masked work included. Where the data decide how much is done, the most
that can be done counts:

    scan          its length times the body
    cond          the most expensive branch; of lax.platform_dependent the branch of the platform
    ragged_dot    every row once, with the matrix of one group, as a TPU computes it
    shard_map     the body once on every device
    while         as often as the trip-count tag of the scope around it says (layers/loops.py)
    pallas_call   likewise; the kernel's body is one step of its grid

A loop without a tag is an error if anything is multiplied in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from MaxDraft.layers.loops import expected_trips_of

# Primitives that run their inner program once.
RUN_ONCE = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")


def count(function: Callable, *args: Any, platform: str) -> int:
    """FLOPs of function(*args).

    Args:
      function: a function of arrays, jitted or not.
      args: its arguments; jax.ShapeDtypeStruct stands for an array.
      platform: "tpu", "cuda" or "cpu": whose branch of lax.platform_dependent counts.

    Raises:
      ValueError: a product stands where the number of its executions is not known.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return _program_flops(jitted.trace(*args).jaxpr.jaxpr, platform)


def _program_flops(program: Jaxpr, platform: str) -> int:
    return sum(_equation_flops(equation, platform) for equation in program.eqns)


def _equation_flops(equation: JaxprEqn, platform: str) -> int:
    shapes, params = [v.aval.shape for v in equation.invars], equation.params
    match equation.primitive.name:
        case "dot_general":
            return _product_flops(*shapes, params["dimension_numbers"])
        case "ragged_dot_general":
            ragged = params["ragged_dot_dimension_numbers"]
            groups = tuple(ragged.rhs_group_dimensions)
            return _product_flops(*shapes[:2], ragged.dot_dimension_numbers, groups)
        case "conv_general_dilated":
            outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1]) // outputs
    inner = [_program_flops(program, platform) for program in _inner_programs(equation)]
    if not any(inner):
        return 0
    match equation.primitive.name:
        case "scan":
            return params["length"] * sum(inner)
        case "cond":
            return _branch_flops(inner, params.get("branches_platforms"), platform)
        case "while" | "pallas_call":
            trips = expected_trips_of(str(equation.source_info.name_stack))
            if trips is not None:
                return round(trips * sum(inner))
        case "shard_map":
            devices = [params["mesh"].shape[axis] for axis in params["newly_manual_axes"]]
            return math.prod(devices) * sum(inner)
        case name if name in RUN_ONCE:
            return sum(inner)
    raise ValueError(
        f"a product inside {equation.primitive.name}: how often it runs is not known; write the "
        f"loop with counted_loop of layers/loops.py"
    )


def _product_flops(
    lhs: Sequence[int], rhs: Sequence[int], dimension_numbers: Any, groups: Sequence[int] = ()
) -> int:
    """2 per element of lhs and output column of rhs in its batch entry and, if ragged, its group.

    lhs, rhs: shapes; groups: the dimensions of rhs that number its groups.
    """
    (_, contracted), (_, batch) = dimension_numbers
    shared = (*contracted, *batch, *groups)
    return 2 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in shared)


def _branch_flops(
    branches: Sequence[int], platforms: Sequence[Sequence[str] | None] | None, platform: str
) -> int:
    """The most expensive branch, or that of the platform where branches are of platforms."""
    if platforms is None:
        return max(branches)
    takes = [names is None or platform in names for names in platforms]
    return branches[takes.index(True)]


def _inner_programs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for program in value if isinstance(value, tuple | list) else (value,):
            if isinstance(program, ClosedJaxpr):
                yield program.jaxpr
            elif isinstance(program, Jaxpr):
                yield program
