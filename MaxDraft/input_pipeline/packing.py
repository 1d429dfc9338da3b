"""Documents -> rows of T positions: shuffled, packed, never split, the same on every machine.

Each epoch draws its documents (a weight of 1 is every epoch, 0.5 another random half of such
documents each epoch), shuffles them and cuts them into windows. Within a window best-fit decreasing
packs: the longest first, each into the fullest row it still fits. The rows of all windows are
shuffled once more. Packing windows rather than the epoch keeps the choice of who shares a row
random at little cost in filling.

Cost: O(n log n) for n documents. Randomness comes from the raw bits of Philox, which numpy keeps
stable over versions (it promises that for bit generators, not for `Generator.shuffle`).
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from MaxDraft.input_pipeline.errors import DataError

WINDOW = 4096  # documents


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which documents stand in which row: row r holds documents[offsets[r] : offsets[r + 1]]."""

    documents: np.ndarray  # int64 [documents]
    offsets: np.ndarray  # int64 [rows + 1]
    epoch_ends: tuple[int, ...] = ()  # number of rows when each epoch has ended

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.offsets[row] : self.offsets[row + 1]]


def pack_rows(lengths: np.ndarray, max_target_length: int, seed: int, epoch: int = 0) -> Rows:
    """Packs every document once. lengths: int [n], each 1..max_target_length tokens."""
    return _pack(np.asarray(lengths), np.arange(len(lengths)), max_target_length, seed, epoch)


def pack_epochs(
    lengths: np.ndarray,  # int [n], tokens of each document
    weights: np.ndarray,  # float [n], share of the epochs that a document is in, above 0 to 1
    max_target_length: int,
    seed: int,
    num_epoch: int,
    min_rows: int = 0,
) -> Rows:
    """The rows of a whole run: num_epoch epochs one after the other, more until min_rows are full.

    An epoch depends on nothing but its number, so a longer run begins with a shorter run's rows.
    DataError: weights that leave an epoch empty.
    """
    parts: list[Rows] = []
    ends: list[int] = []
    while len(parts) < num_epoch or ends[-1] < min_rows:
        epoch = len(parts)
        chosen = _draw_documents(np.asarray(weights, np.float64), seed, epoch)
        if not len(chosen):
            raise DataError(f"the weights leave no conversation in epoch {epoch + 1}")
        part = _pack(np.asarray(lengths), chosen, max_target_length, seed, epoch)
        parts.append(part)
        ends.append(len(part) + (ends[-1] if ends else 0))
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    documents = np.concatenate([part.documents for part in parts])
    return Rows(documents, np.concatenate([[0], np.cumsum(counts)]), tuple(ends))


def _pack(lengths: np.ndarray, chosen: np.ndarray, T: int, seed: int, epoch: int) -> Rows:
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= T:
        raise DataError(
            f"documents of {lengths.min()} to {lengths.max()} tokens do not fit rows of {T}"
        )
    chosen = chosen[_shuffled(len(chosen), seed, epoch, 1)]
    rows: list[list[int]] = []
    for start in range(0, len(chosen), WINDOW):
        window = chosen[start : start + WINDOW]
        # Stable: equal lengths stay in their random order.
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        rows += _best_fit(longest_first.tolist(), lengths[longest_first].tolist(), T)
    rows = [rows[i] for i in _shuffled(len(rows), seed, epoch, 2)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return Rows(np.array([d for row in rows for d in row], np.int64), offsets.astype(np.int64))


def _best_fit(documents: list[int], lengths: list[int], T: int) -> list[list[int]]:
    """Each document goes into the row with the least free space that is enough, or a new row."""
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}  # free positions -> numbers of rows
    spaces: list[int] = []  # the keys of rows_by_space, ascending
    for document, length in zip(documents, lengths, strict=True):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), T
            rows.append([])
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[at]
        rows[row].append(document)
        left = space - length
        if left:
            if left not in rows_by_space:
                bisect.insort(spaces, left)
                rows_by_space[left] = []
            rows_by_space[left].append(row)
    return rows


def _draw_documents(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Document numbers: those of weight 1, and at random round(weight * n) of the n documents that
    share a lower weight."""
    parts = [np.flatnonzero(weights == 1)]
    for weight in np.unique(weights[weights < 1]):
        candidates = np.flatnonzero(weights == weight)
        draw = _shuffled(len(candidates), seed, epoch, 3)
        parts.append(candidates[draw[: round(weight * len(candidates))]])
    return np.concatenate(parts)


def _shuffled(n: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A permutation of n, int64."""
    bits = np.random.Philox(key=[seed, (epoch << 8) + purpose]).random_raw(n)
    return np.argsort(bits, kind="stable")
