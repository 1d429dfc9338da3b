"""Which layers are captured, and how the stack is cut into scans.

The stack is cut after every captured layer. Between two cuts the layers are runs of a repeated
unit: [A A A A] is A four times, [S S F S S F] is (S S F) twice. A run is one scan over its
repetitions, so a program holds each unit once, however many layers there are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from MaxDraft.targets.dims import Layer


@dataclasses.dataclass(frozen=True)
class Run:
    """Layers first, first + 1, ...: the unit's layers in order, `repeats` times."""

    unit: tuple[Layer, ...]
    first: int
    repeats: int

    @property
    def end(self) -> int:
        """The layer after the last."""
        return self.first + len(self.unit) * self.repeats

    def numbers(self, place: int) -> range:
        """The layers that stand at this place of the unit; they are stacked together."""
        return range(self.first + place, self.end, len(self.unit))


@functools.cache
def runs(layers: tuple[Layer, ...], capture: tuple[int, ...]) -> tuple[Run, ...]:
    """The stack as runs; every captured layer is the last of one."""
    cuts = [0, *(layer + 1 for layer in capture), len(layers)]
    return tuple(run for a, b in itertools.pairwise(cuts) for run in _fewest(layers[a:b], a))


def _fewest(layers: tuple[Layer, ...], first: int) -> list[Run]:
    """Cuts layers into runs that together hold as few unit layers as possible, then few runs."""
    best: list[tuple[int, list[Run]]] = [(0, [])]
    for end in range(1, len(layers) + 1):
        ways = []
        for start in range(end):
            size = _period(layers[start:end])
            run = Run(layers[start : start + size], first + start, (end - start) // size)
            ways.append((best[start][0] + size, [*best[start][1], run]))
        best.append(min(ways, key=lambda way: (way[0], len(way[1]))))
    return best[-1][1]


def _period(layers: tuple[Layer, ...]) -> int:
    """Length of the shortest unit whose repetition the layers are."""
    count = len(layers)
    return next(
        size
        for size in range(1, count + 1)
        if count % size == 0 and layers == layers[:size] * (count // size)
    )
