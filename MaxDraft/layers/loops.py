"""Loops whose number of trips only the data decide, and how often they are expected to run.

A loop over the supervised positions of a batch, or over the blocks of keys that a block of queries
sees, has bounds that are computed on the device. XLA does not know how often such a loop runs, so
neither a count of FLOPs nor a profile would. Each of these loops therefore stands in two named
scopes: the name of what it goes over ("rollout_blocks"), which is what a profile shows, and inside
it a tag with the expected number of trips. This file alone knows how that tag is written: the
counters of cost/ ask `expected_trips_of`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

_TAG = "expected_trips_"
# At the end of a traced program's name stack, where transformations (jvp, transpose) close their
# parentheses, or right before the "while" that XLA's metadata ends a loop's name with.
_TAGGED = re.compile(_TAG + r"(\d+(?:\.\d+)?)\)*(?:/while)?$")


@contextlib.contextmanager
def trip_count_scope(name: str, expected_trips: float) -> Iterator[None]:
    """Named scopes that say of the loop or kernel right inside them how often its body runs.

    Args:
      name: what the loop goes over, in the plural, such as "attention_key_blocks".
      expected_trips: trips on average over all entries of the loop, for a batch whose rows are one
        document each and supervised everywhere: the most that the shapes allow.
    """
    # Ten decimals, as a scientific notation would not be a number in the tag's form.
    number = f"{expected_trips:.10f}".rstrip("0").rstrip(".")
    with jax.named_scope(name), jax.named_scope(f"{_TAG}{number}"):
        yield


def counted_loop(
    name: str,
    lower: jax.Array | int,
    upper: jax.Array | int,
    body: Callable[[jax.Array, Any], Any],
    init: Any,
    expected_trips: float,
) -> Any:
    """init = body(i, init) for i in lower .. upper - 1, as jax.lax.fori_loop has it.

    name, expected_trips: see `trip_count_scope`.
    """
    with trip_count_scope(name, expected_trips):
        return jax.lax.fori_loop(lower, upper, body, init)


def expected_trips_of(scope: str) -> float | None:
    """The expected trips of a loop by its name stack or by XLA's op_name; None if it has no tag."""
    tag = _TAGGED.search(scope)
    return float(tag[1]) if tag else None
