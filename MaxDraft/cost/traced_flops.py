"""FLOPs of the matrix products and convolutions of a traced program, 2 per multiply-add.

Unlike flops.py, which says what a method needs, this counts what a program does, before XLA sees
it: padding, recomputation and masked work included. What depends on the data counts at its most:
    scan        its length times the body
    cond        the most expensive branch; of lax.platform_dependent the platform's
    ragged_dot  every row once, with one group's matrix (so TPU has it; see layers/experts.py)
    shard_map   the body on every device
    while, pallas_call    as often as the innermost scope around it says, "runs_N_times"
                (attention: on average over a full row); without one nobody knows: an error where
                it multiplies
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# What runs its inner program once. Anything else that multiplies inside is an error.
ONCE = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")

TIMES = re.compile(r"runs_([\d.]+)_times\)*$")


def count(function: Callable, *args: Any, platform: str) -> int:
    """FLOPs of function(*args) on "tpu", "cuda" or "cpu"; args may be ShapeDtypeStructs."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return _of_program(jitted.trace(*args).jaxpr.jaxpr, platform)


def _of_program(program: Jaxpr, platform: str) -> int:
    return sum(_of_step(step, platform) for step in program.eqns)


def _of_step(step: JaxprEqn, platform: str) -> int:
    shapes, params = [v.aval.shape for v in step.invars], step.params
    match step.primitive.name:
        case "dot_general":
            return _product(*shapes, params["dimension_numbers"])
        case "ragged_dot_general":
            ragged = params["ragged_dot_dimension_numbers"]
            groups = tuple(ragged.rhs_group_dimensions)
            return _product(*shapes[:2], ragged.dot_dimension_numbers, groups)
        case "conv_general_dilated":
            outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            return 2 * math.prod(step.outvars[0].aval.shape) * math.prod(shapes[1]) // outputs
    inner = [_of_program(program, platform) for program in _inner(step)]
    if not any(inner):
        return 0
    match step.primitive.name:
        case "scan":
            return params["length"] * sum(inner)
        case "cond":
            return _of_branches(inner, params.get("branches_platforms"), platform)
        case "while" | "pallas_call" if times := TIMES.search(str(step.source_info.name_stack)):
            return round(float(times[1]) * sum(inner))
        case "shard_map":
            devices = [params["mesh"].shape[axis] for axis in params["newly_manual_axes"]]
            return math.prod(devices) * sum(inner)
        case name if name in ONCE:
            return sum(inner)
    raise ValueError(f"a product inside {step.primitive.name}: how often it runs is not known")


def _product(lhs, rhs, dimension_numbers, groups=()) -> int:
    """Every number of lhs meets the outputs of rhs: of its batch and, if ragged, of its group."""
    (_, contracted), (_, batch) = dimension_numbers
    inner = (*contracted, *batch, *groups)
    return 2 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in inner)


def _of_branches(branches, platforms, platform: str) -> int:
    if platforms is None:
        return max(branches)
    chosen = [named is None or platform in named for named in platforms].index(True)
    return branches[chosen]


def _inner(step: JaxprEqn) -> Iterator[Jaxpr]:
    for value in step.params.values():
        for program in value if isinstance(value, tuple | list) else (value,):
            if isinstance(program, ClosedJaxpr):
                yield program.jaxpr
            elif isinstance(program, Jaxpr):
                yield program
