"""Pairs of row and key that attention_xla.py computes, by those that a mask lets see each other.

Blocks are computed whole: one that a document begins or ends in costs more than it gives.
"""

from __future__ import annotations

import numpy as np


def computed_by_seen(
    segments: np.ndarray,
    judged: np.ndarray,
    *,
    rollout_block: int,
    attention_block: int,
    devices: int,
    target_shares: int,
) -> dict[str, float]:
    """-> target_pairs, rollout_pairs: pairs computed for each that is seen.

    segments, judged [A, B, T]. The target walks over its packed rows of a micro-batch together,
    windows and chunks aside; the rollout over the judged rows of a device, laid end to end.
    """
    A, B, T = segments.shape
    packed = segments.reshape(-1, T)
    begins = np.diff(packed, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
    together = B // target_shares
    target = [
        (np.tile(np.arange(T), (together, 1)), first[i : i + together])
        for i in range(0, len(first), together)
    ]

    def of_devices(x: np.ndarray) -> np.ndarray:
        return x.reshape(A, devices, -1, T).swapaxes(0, 1).reshape(devices, -1, T)

    R, rollout = rollout_block, []
    for begins_at, judged_here in zip(of_devices(first), of_devices(judged), strict=True):
        starts = (begins_at + T * np.arange(len(begins_at))[:, None]).ravel()
        rows = np.flatnonzero(judged_here)
        calls = (rows[None, i : i + R] for i in range(0, len(rows), R))
        rollout += [(call, starts[call]) for call in calls]
    size = attention_block
    return {
        "target_pairs": _ratio(target, size, min(size, T)),
        "rollout_pairs": _ratio(rollout, size, min(size, R)),
    }


def _ratio(calls: list[tuple[np.ndarray, np.ndarray]], keys: int, rows: int) -> float:
    """calls: the rows [b, R] that one call attends with, and the keys from which on they see them
    all up to their own; keys, rows: in a block."""
    computed = seen = 0
    for at, first in calls:
        seen += (at - first + 1).sum()
        for i in range(0, at.shape[1], rows):
            here = np.s_[:, i : i + rows]
            blocks = at[here].max() // keys + 1 - first[here].min() // keys
            computed += len(at) * rows * keys * blocks
    return float(computed / seen)
