"""How the stack of layers is cut into scans.

The stack is cut after every captured layer, so that the captured hidden states are what comes out
of a scan. Between two cuts the layers are groups of a repeated unit: [A A A A] is A four times,
[S S F S S F] is (S S F) twice. A group is one scan over its repetitions, so that the program holds
each unit once, however many layers there are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

from MaxDraft.targets.dims import Layer


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers first, first + 1, ...: the unit's layers in order, `repeats` times."""

    unit: tuple[Layer, ...]
    first: int
    repeats: int

    @property
    def end(self) -> int:
        """The layer after the last."""
        return self.first + len(self.unit) * self.repeats

    def numbers(self, place: int) -> range:
        """The layers at this place of the unit; their parameters are stacked together."""
        return range(self.first + place, self.end, len(self.unit))


@functools.cache
def layer_groups(
    layers: tuple[Layer, ...], captured_layers: tuple[int, ...]
) -> tuple[LayerGroup, ...]:
    """The stack as groups; every captured layer is the last of one."""
    cuts = [0, *(layer + 1 for layer in captured_layers), len(layers)]
    return tuple(group for a, b in itertools.pairwise(cuts) for group in _cut(layers[a:b], a))


def _cut(layers: tuple[Layer, ...], first: int) -> list[LayerGroup]:
    """Groups that together have as few layers in their units as possible, then as few groups.

    best[end] is that of layers[:end]: (layers in units, groups, start of the last group, its unit).
    """
    kinds = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    numbers = [kinds[layer] for layer in layers]
    count = len(layers)
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] + [(count + 1, 0, 0, 0)] * count
    for start in range(count):
        for length, size in enumerate(_unit_sizes(numbers[start:]), 1):
            candidate = (best[start][0] + size, best[start][1] + 1, start, size)
            if candidate[:2] < best[start + length][:2]:
                best[start + length] = candidate
    groups, end = [], count
    while end > 0:
        _, _, start, size = best[end]
        repeats = (end - start) // size
        groups.append(LayerGroup(layers[start : start + size], first + start, repeats))
        end = start
    return groups[::-1]


def _unit_sizes(numbers: Sequence[int]) -> list[int]:
    """Of every prefix the length of the shortest unit whose repetition it is.

    By the prefix function of Knuth, Morris and Pratt (1977): border[i] is the length of the longest
    proper prefix of numbers[: i + 1] that is also its suffix.
    """
    border = [0] * len(numbers)
    for i in range(1, len(numbers)):
        length = border[i - 1]
        while length and numbers[i] != numbers[length]:
            length = border[length - 1]
        border[i] = length + (numbers[i] == numbers[length])
    periods = [i + 1 - length for i, length in enumerate(border)]
    return [period if (i + 1) % period == 0 else i + 1 for i, period in enumerate(periods)]
