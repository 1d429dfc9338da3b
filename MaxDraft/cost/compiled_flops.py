"""FLOPs of the matrix products that each device runs in a compiled program, 2 per multiply-add.

traced_flops.py counts what a program asks for; this reads what XLA made of it, after it has split
arrays over devices: work that several devices repeat counts for each. Of XLA's text on a CPU, where
every product is a `dot` or a `convolution`; loops count as often as XLA or, where the data decide,
the scope "runs_N_times" says.
"""

from __future__ import annotations

import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SCOPE = re.compile(r'op_name="[^"]*runs_([\d.]+)_times/while')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    shape: tuple[int, ...]  # of the result; () for a tuple of several
    kind: str
    rest: str  # operands and attributes


def count(text: str) -> float:
    """FLOPs of one device, of `jitted.lower(...).compile().as_text()`."""
    computations, entry = _parse(text)
    done: dict[str, float] = {}

    def of(name: str) -> float:
        if name not in done:
            instructions = computations[name]
            done[name] = sum(of_instruction(i, instructions) for i in instructions.values())
        return done[name]

    def of_instruction(i: _Instruction, instructions: dict[str, _Instruction]) -> float:
        match i.kind:
            case "dot":
                lhs = instructions[_operands(i.rest)[0]].shape
                contracted = (lhs[d] for d in _numbers(_CONTRACTED.search(i.rest)[1]))
                return 2 * math.prod(i.shape) * math.prod(contracted)
            case "convolution":
                raise ValueError("a convolution in a compiled program is not counted yet")
        if branches := _BRANCHES.search(i.rest):
            return max(of(name.strip().lstrip("%")) for name in branches[1].split(","))
        inner = sum(of(name) for name in _CALLED.findall(i.rest))
        if i.kind == "while" and inner:
            times = _TRIPS.search(i.rest) or _SCOPE.search(i.rest)
            if not times:
                raise ValueError("a product in a loop: how often it runs is not known")
            return float(times[1]) * inner
        return inner

    return of(entry)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, kind, rest = found.groups()
            dims = _SHAPE.match(shape)
            current[name] = _Instruction(_numbers(dims[1]) if dims else (), kind, rest)
    return computations, entry


def _operands(rest: str) -> list[str]:
    inside = rest.split(")")[0]
    return re.findall(r"%([\w.-]+)", inside) or [part.split()[-1] for part in inside.split(",")]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
