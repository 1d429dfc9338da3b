"""The draft vocabulary: the D of V target tokens that a draft head can write.

    target id = draft id + d2t[draft id]        t2d[target id] = is it among the D?

The D tokens that the assistant wrote most often are taken, and always the special tokens of its
turns: a head that cannot write the end of a turn can never end a draft.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from MaxDraft import storage
from MaxDraft.errors import UserError


class VocabularyError(UserError):
    """Something that is no draft vocabulary, or from which none can be made."""


@dataclasses.dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """draft_to_target: int32 [D], target ids, strictly ascending, each below target_vocab_size V.

    VocabularyError where they are not.
    """

    draft_to_target: np.ndarray
    target_vocab_size: int

    def __post_init__(self) -> None:
        ids, V = np.asarray(self.draft_to_target), self.target_vocab_size
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise VocabularyError(
                f"a draft vocabulary is a list of target ids, not {ids.dtype} {list(ids.shape)}"
            )
        if ids.min() < 0 or ids.max() >= V:
            raise VocabularyError(
                f"the draft vocabulary has target ids from {ids.min()} to {ids.max()}; the target "
                f"knows 0 to {V - 1}"
            )
        falls = np.flatnonzero(np.diff(ids.astype(np.int64)) <= 0)
        if len(falls):
            at = int(falls[0])
            raise VocabularyError(
                f"the target ids of a draft vocabulary ascend; draft token {at} is {ids[at]}, "
                f"draft token {at + 1} is {ids[at + 1]}"
            )
        object.__setattr__(self, "draft_to_target", ids.astype(np.int32))

    @property
    def size(self) -> int:
        """D."""
        return len(self.draft_to_target)

    @property
    def d2t(self) -> np.ndarray:
        """int64 [D]: the offset, target id minus draft id."""
        return self.draft_to_target.astype(np.int64) - np.arange(self.size)

    @property
    def t2d(self) -> np.ndarray:
        """bool [V]: whether a target id is in the draft vocabulary."""
        mask = np.zeros(self.target_vocab_size, bool)
        mask[self.draft_to_target] = True
        return mask

    def coverage(self, counts: np.ndarray) -> float:
        """Share of the counted tokens that the draft vocabulary holds. counts: int64 [V]."""
        total = int(counts.sum())
        if not total:
            raise VocabularyError("no tokens are counted: there is nothing to cover")
        return int(counts[self.draft_to_target].sum()) / total

    def save(self, path: Path) -> None:
        """Writes JSON; the file is complete or, if the process dies meanwhile, the one before."""
        content = {
            "target_vocab_size": self.target_vocab_size,
            "draft_to_target": self.draft_to_target.tolist(),
        }
        storage.write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: Path) -> DraftVocabulary:
        """What save wrote; VocabularyError names a file that is missing or holds something else."""
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            return cls(np.array(content["draft_to_target"]), int(content["target_vocab_size"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VocabularyError(
                f"{path} is no draft vocabulary ({error}); delete it, and it is made again"
            ) from error

    @classmethod
    def from_offsets(
        cls, d2t: np.ndarray, target_vocab_size: int, t2d: np.ndarray | None = None
    ) -> DraftVocabulary:
        """From a head's tensors: d2t int64 [D], t2d bool [V] if there is one.

        Some trainers store absolute ids in d2t. Absolute ids strictly increase; offsets repeat
        where consecutive ids are both in. t2d decides; without it, strictly increasing numbers are
        taken for absolute ids. VocabularyError: absolute ids, offsets that lead nowhere, a t2d that
        contradicts them.
        """
        d2t = np.asarray(d2t).astype(np.int64)
        ids = np.arange(len(d2t)) + d2t
        marked = None if t2d is None else np.flatnonzero(t2d)  # the target ids that t2d names
        ascending = len(d2t) > 1 and bool((np.diff(d2t) > 0).all())
        inside = ascending and d2t[0] >= 0 and d2t[-1] < target_vocab_size
        if inside and (
            marked is None or (np.array_equal(marked, d2t) and not np.array_equal(marked, ids))
        ):
            raise VocabularyError(
                "d2t holds absolute target ids, not offsets: subtract the draft id from each, "
                "d2t - arange(len(d2t))"
            )
        try:
            vocabulary = cls(ids, target_vocab_size)
        except VocabularyError as error:
            raise VocabularyError(f"the offsets in d2t lead to no vocabulary: {error}") from error
        if marked is not None and not np.array_equal(marked, vocabulary.draft_to_target):
            raise VocabularyError("t2d marks other tokens than d2t leads to")
        return vocabulary


def select(
    counts: np.ndarray,  # int64 [V], how often the assistant wrote each token
    required_ids: Iterable[int],
    draft_vocab_size: int,
) -> DraftVocabulary:
    """The required tokens and the most frequent others, D in all; ties go to the lower id.

    D at or above V is the whole vocabulary. VocabularyError: a required id outside the target's
    vocabulary, more required ids than D, no counted token.
    """
    V, D = len(counts), min(draft_vocab_size, len(counts))
    required = np.unique(np.fromiter(required_ids, np.int64))
    if len(required) and not 0 <= required[0] <= required[-1] < V:
        raise VocabularyError(
            f"the special tokens {required.tolist()} are not all in the target's vocabulary of "
            f"{V}: the tokenizer belongs to another target"
        )
    if len(required) > D:
        raise VocabularyError(
            f"draft_vocab_size={draft_vocab_size} is smaller than the number of special tokens "
            f"of the assistant's turns, {len(required)}; raise it"
        )
    if not counts.any():
        raise VocabularyError("no assistant token is counted: nothing to choose by")
    preference = np.array(counts, np.int64)
    preference[required] = np.iinfo(np.int64).max
    chosen = np.argsort(-preference, kind="stable")[:D]
    return DraftVocabulary(np.sort(chosen).astype(np.int32), V)
