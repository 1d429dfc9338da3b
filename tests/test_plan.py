"""The stack is cut after captured layers, and every repeated unit stands in the program once."""

import pytest

from MaxDraft.drafts.eagle3.dims import check_captured_layers, default_captured_layers
from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import Attention, Layer, Mlp, TargetError
from MaxDraft.targets.plan import runs

ROPE = Rope(theta=10000.0, rotary_dim=8)


def stack(kinds: str) -> tuple[Layer, ...]:
    """A layer for each letter; equal letters are equal layers."""
    return tuple(Layer(Attention(2, 2, 8, ROPE, window=ord(kind)), Mlp(16)) for kind in kinds)


def described(kinds: str, capture) -> list[tuple[str, int, int]]:
    names = {layer: kind for kind, layer in zip(kinds, stack(kinds), strict=True)}
    return [
        ("".join(names[layer] for layer in run.unit), run.first, run.repeats)
        for run in runs(stack(kinds), tuple(capture))
    ]


@pytest.mark.parametrize(
    ("kinds", "capture", "expected"),
    [
        ("AAAAAAAA", (1, 3, 6), [("A", 0, 2), ("A", 2, 2), ("A", 4, 3), ("A", 7, 1)]),
        ("AAA", (0, 1, 2), [("A", 0, 1), ("A", 1, 1), ("A", 2, 1)]),
        ("AAAAAAA", (1, 2, 3), [("A", 0, 2), ("A", 2, 1), ("A", 3, 1), ("A", 4, 3)]),
        ("DDDMMMMM", (1,), [("D", 0, 2), ("D", 2, 1), ("M", 3, 5)]),
        ("SFSFSFSF", (), [("SF", 0, 4)]),
        ("SFSFSFS", (), [("S", 0, 1), ("FS", 1, 3)]),
        ("SSSFSSSFSSSF", (3,), [("S", 0, 3), ("F", 3, 1), ("SSSF", 4, 2)]),
    ],
)
def test_the_layers_are_cut_into_the_fewest_units(kinds, capture, expected):
    assert sum(len(unit) for unit, _, _ in described(kinds, capture)) == sum(
        len(unit) for unit, _, _ in expected
    )
    assert described(kinds, capture) == expected


@pytest.mark.parametrize("kinds", ["AAAAAAAA", "SSSSSFSSSSSFSS", "DMDMDNDMDMDN", "ABCABD"])
@pytest.mark.parametrize("capture", [(), (1, 3, 4)])
def test_every_layer_stands_in_one_run_and_in_order(kinds, capture):
    found = {}
    for run in runs(stack(kinds), capture):
        for place, layer in enumerate(run.unit):
            found |= dict.fromkeys(run.numbers(place), layer)
    assert tuple(found[number] for number in sorted(found)) == stack(kinds)
    assert set(capture) <= {run.end - 1 for run in runs(stack(kinds), capture)}


def test_the_default_layers_are_those_of_eagle3():
    assert default_captured_layers(32) == (1, 15, 28)
    assert default_captured_layers(28) == (1, 13, 24)
    assert check_captured_layers((), 32) == (1, 15, 28)
    assert check_captured_layers([0, 2, 5], 6) == (0, 2, 5)


@pytest.mark.parametrize(
    ("capture", "layers", "named"),
    [
        ((), 4, "target_layer_ids"),  # [1, 1, 0]
        ((), 5, "target_layer_ids"),  # [1, 1, 1]
        ((), 6, "target_layer_ids"),  # [1, 2, 2]
        ((1, 1, 3), 8, "distinct"),
        ((3, 1, 5), 8, "ascending"),
        ((1, 3), 8, "three"),
        ((1, 3, 8), 8, "layer .*8.* does not exist"),
        ((-1, 3, 5), 8, "layer .*-1.* does not exist"),
    ],
)
def test_captured_layers_that_collide_or_do_not_exist_are_an_error(capture, layers, named):
    with pytest.raises(TargetError, match=named):
        check_captured_layers(capture, layers)
