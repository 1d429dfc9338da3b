"""Documents -> rows of T positions: shuffled, packed, never split, the same on every machine.

Each epoch draws its copies (a weight of 2 is two, 0.5 another random half each epoch), shuffles
them and cuts them into windows. Within a window best-fit decreasing packs: the longest first, each
into the fullest row it still fits. The rows of all windows are shuffled once more. Packing windows
rather than the epoch keeps the choice of who shares a row random at little cost in filling.

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

    documents: np.ndarray  # int64 [N]
    offsets: np.ndarray  # int64 [R + 1]
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
    weights: np.ndarray,  # float [n], copies of each document per epoch
    max_target_length: int,
    seed: int,
    num_epoch: int,
    min_rows: int = 0,
) -> Rows:
    """The rows of a whole run: num_epoch epochs one after the other, more until min_rows are full.

    An epoch depends on nothing but its number, so a longer run begins with a shorter run's rows.
    DataError: a weight that leaves an epoch empty.
    """
    parts: list[Rows] = []
    ends: list[int] = []
    while len(parts) < num_epoch or ends[-1] < min_rows:
        epoch = len(parts)
        chosen = _draw_copies(np.asarray(weights, np.float64), seed, epoch)
        if not len(chosen):
            raise DataError(
                f"the weights of the data files leave no conversation in epoch {epoch + 1}; raise "
                f"them: 1 is every conversation once per epoch"
            )
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
    """Each document goes into the row with the least room that is enough, else into a new row."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of with_room, ascending
    for document, length in zip(documents, lengths, strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), T
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(document)
        left = room - length
        if left:
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(row)
    return rows


def _draw_copies(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Document numbers, each floor(weight) times, the fraction by lot: round(fraction * n) of the
    n documents of one weight."""
    parts = [np.repeat(np.arange(len(weights)), np.floor(weights).astype(np.int64))]
    for weight in np.unique(weights[weights % 1 > 0]):
        candidates = np.flatnonzero(weights == weight)
        lots = _shuffled(len(candidates), seed, epoch, 3)
        parts.append(candidates[lots[: round(weight % 1 * len(candidates))]])
    return np.concatenate(parts)


def _shuffled(n: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A permutation of n, int64."""
    bits = np.random.Philox(key=[seed, (epoch << 8) + purpose]).random_raw(n)
    return np.argsort(bits, kind="stable")
