"""FLOPs of the matrix products that each device runs in a compiled program, 2 per multiply-add.

traced_flops.py counts what a program asks for; this reads what XLA made of it after it has
partitioned the arrays: work that several devices repeat counts once for each of them. It reads
XLA's text for a CPU, in which every product is a `dot`. Loops count as often as XLA says, or, where
the data decide, as the trip-count tag of their scope says (layers/loops.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from MaxDraft.layers.loops import expected_trips_of

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    shape: tuple[int, ...]  # of the result; () for a tuple of several
    opcode: str
    rest: str  # operands and attributes


_Computation = dict[str, _Instruction]


def count(text: str) -> float:
    """FLOPs of one device.

    Args:
      text: `jitted.lower(...).compile().as_text()` of a program compiled for a CPU.

    Raises:
      ValueError: a convolution, or a product in a loop whose number of trips is not known.
    """
    computations, entry = _parse(text)

    @functools.cache
    def computation_flops(name: str) -> float:
        instructions = computations[name]
        return sum(instruction_flops(i, instructions) for i in instructions.values())

    def instruction_flops(instruction: _Instruction, operands: _Computation) -> float:
        match instruction.opcode:
            case "dot":
                return _dot_flops(instruction, operands)
            case "convolution":
                raise ValueError("a convolution in a compiled program is not counted yet")
        if branches := _BRANCHES.search(instruction.rest):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            return max(computation_flops(name) for name in names)
        inner = sum(computation_flops(name) for name in _CALLED.findall(instruction.rest))
        if instruction.opcode == "while" and inner:
            return _trips(instruction) * inner
        return inner

    return computation_flops(entry)


def _dot_flops(instruction: _Instruction, operands: _Computation) -> float:
    lhs = operands[_operand_names(instruction.rest)[0]].shape
    contracted = (lhs[d] for d in _numbers(_CONTRACTED.search(instruction.rest)[1]))
    return 2 * math.prod(instruction.shape) * math.prod(contracted)


def _trips(loop: _Instruction) -> float:
    if known := _TRIPS.search(loop.rest):
        return float(known[1])
    name = _OP_NAME.search(loop.rest)
    trips = expected_trips_of(name[1]) if name else None
    if trips is None:
        raise ValueError(
            "a product in a loop: how often it runs is not known; write the loop with counted_loop "
            "of layers/loops.py"
        )
    return trips


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """-> the program's computations by name, and the name of the entry computation."""
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            name, shape, opcode, rest = instruction.groups()
            dims = _SHAPE.match(shape)
            current[name] = _Instruction(_numbers(dims[1]) if dims else (), opcode, rest)
    return computations, entry


def _operand_names(rest: str) -> list[str]:
    inside = rest.split(")")[0]
    return re.findall(r"%([\w.-]+)", inside) or [part.split()[-1] for part in inside.split(",")]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
