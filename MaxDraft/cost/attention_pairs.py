"""Pairs of query and key that blockwise attention computes, over those that are visible.

attention_xla.py computes whole blocks of queries and keys: a block in which a document begins or
ends costs more pairs than its mask lets see each other.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of attention: query i of row b sees the keys first[b, i] .. last[b, i]."""

    first: np.ndarray  # int [b, R]
    last: np.ndarray  # int [b, R]


def computed_over_visible(
    segment_ids: np.ndarray,
    supervised: np.ndarray,
    *,
    position_block: int,
    attention_block: int,
    devices: int,
    target_shards: int,
) -> dict[str, float]:
    """Pairs computed for each that is visible, of a batch [A, B, T].

    supervised: bool [A, B, T], positions that some step of the rollout supervises. The target
    attends with the packed rows of a micro-batch together, windows and chunks aside, in each of
    `target_shards` shares of it; the rollout with the supervised positions of a device, laid end to
    end, `position_block` of them at a time.

    -> {"target": ratio, "rollout": ratio}
    """
    T = segment_ids.shape[2]
    first = _document_starts(segment_ids.reshape(-1, T))
    target = _target_calls(first, segment_ids.shape[1] // target_shards)
    rollout = _rollout_calls(first, supervised, position_block, devices)
    return {
        "target": _ratio(target, min(attention_block, T), attention_block),
        "rollout": _ratio(rollout, min(attention_block, position_block), attention_block),
    }


def _document_starts(segment_ids: np.ndarray) -> np.ndarray:
    """[rows, T] -> where each token's document begins in its row."""
    begins = np.diff(segment_ids, prepend=-1) != 0
    return np.maximum.accumulate(np.where(begins, np.arange(segment_ids.shape[1]), 0), axis=1)


def _target_calls(first: np.ndarray, rows_per_call: int) -> list[_Call]:
    rows, T = first.shape
    last = np.tile(np.arange(T), (rows_per_call, 1))
    return [_Call(first[i : i + rows_per_call], last) for i in range(0, rows, rows_per_call)]


def _rollout_calls(
    first: np.ndarray, supervised: np.ndarray, position_block: int, devices: int
) -> list[_Call]:
    A, _, T = supervised.shape

    def by_device(x: np.ndarray) -> np.ndarray:
        return x.reshape(A, devices, -1, T).swapaxes(0, 1).reshape(devices, -1, T)

    calls = []
    for starts, mask in zip(by_device(first), by_device(supervised), strict=True):
        starts = (starts + T * np.arange(len(starts))[:, None]).ravel()
        positions = np.flatnonzero(mask)
        for i in range(0, len(positions), position_block):
            last = positions[None, i : i + position_block]
            calls.append(_Call(starts[last], last))
    return calls


def _ratio(calls: list[_Call], queries: int, keys: int) -> float:
    """queries, keys: in a block."""
    computed = visible = 0
    for call in calls:
        visible += (call.last - call.first + 1).sum()
        for i in range(0, call.last.shape[1], queries):
            block = np.s_[:, i : i + queries]
            key_blocks = call.last[block].max() // keys + 1 - call.first[block].min() // keys
            computed += len(call.last) * queries * keys * key_blocks
    return float(computed / visible)
