"""The stack is cut after captured layers, and every repeated unit stands in the program once."""

import json

import pytest

from MaxDraft.drafts.eagle3.dims import check_captured_layers, default_captured_layers
from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import Attention, Layer, Mlp, TargetError
from MaxDraft.targets.plan import layer_groups

ROPE = Rope(theta=10000.0, rotary_dim=8)


def stack(kinds: str) -> tuple[Layer, ...]:
    """A layer for each letter; equal letters are equal layers."""
    return tuple(Layer(Attention(2, 2, 8, ROPE, window=ord(kind)), Mlp(16)) for kind in kinds)


def described(kinds: str, captured_layers) -> list[tuple[str, int, int]]:
    names = {layer: kind for kind, layer in zip(kinds, stack(kinds), strict=True)}
    return [
        ("".join(names[layer] for layer in group.unit), group.first, group.repeats)
        for group in layer_groups(stack(kinds), tuple(captured_layers))
    ]


@pytest.mark.parametrize(
    ("kinds", "captured_layers", "expected"),
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
def test_the_layers_are_cut_into_the_fewest_units(kinds, captured_layers, expected):
    assert sum(len(unit) for unit, _, _ in described(kinds, captured_layers)) == sum(
        len(unit) for unit, _, _ in expected
    )
    assert described(kinds, captured_layers) == expected


@pytest.mark.parametrize("kinds", ["AAAAAAAA", "SSSSSFSSSSSFSS", "DMDMDNDMDMDN", "ABCABD"])
@pytest.mark.parametrize("captured_layers", [(), (1, 3, 4)])
def test_every_layer_is_in_one_group_and_in_order(kinds, captured_layers):
    found = {}
    for group in layer_groups(stack(kinds), captured_layers):
        for place, layer in enumerate(group.unit):
            found |= dict.fromkeys(group.numbers(place), layer)
    assert tuple(found[number] for number in sorted(found)) == stack(kinds)
    assert set(captured_layers) <= {
        group.end - 1 for group in layer_groups(stack(kinds), captured_layers)
    }


def test_the_default_layers_are_those_of_eagle3():
    assert default_captured_layers(32) == (1, 15, 28)
    assert default_captured_layers(28) == (1, 13, 24)
    assert check_captured_layers((), 32) == (1, 15, 28)
    assert check_captured_layers([0, 2, 5], 6) == (0, 2, 5)


@pytest.mark.parametrize(
    ("captured_layers", "layers", "named"),
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
def test_captured_layers_that_cannot_be_are_an_error(captured_layers, layers, named):
    with pytest.raises(TargetError, match=named):
        check_captured_layers(captured_layers, layers)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("captured_layers", [(), (0, 1), (0, 1, 2)])
def test_a_target_of_fewer_than_three_layers_is_an_error(captured_layers, layers):
    with pytest.raises(TargetError, match="reads 3 layers of its target") as error:
        check_captured_layers(captured_layers, layers)
    assert "e.g." not in str(error.value)


@pytest.mark.parametrize("layers", range(3, 7))
def test_the_layers_that_an_error_suggests_are_accepted(layers):
    with pytest.raises(TargetError, match=r"e\.g\.") as error:
        check_captured_layers((1, 1, 1), layers)
    suggested = json.loads(str(error.value).split("e.g. ")[1])
    assert check_captured_layers(suggested, layers) == tuple(suggested)
