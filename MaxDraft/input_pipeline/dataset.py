"""All conversations of a run: those it learns from, and those held out to measure it.

held out = hash of the messages and the seed, below eval_fraction: duplicates stay together
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from MaxDraft.input_pipeline.chat_template import ChatEncoder
from MaxDraft.input_pipeline.encode_files import encode_files
from MaxDraft.input_pipeline.encoded import Encoded
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.file_spec import FileSet, parse_file_spec


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Some conversations of an `Encoded`: those trained on, or those held out.

    documents[i] -> (tokens int32 [n], turn_ids int32 [n]), n at most max_target_length.
    """

    encoded: Encoded
    ids: np.ndarray  # int64 [conversations], ascending
    weights: np.ndarray  # float64 [conversations], copies per epoch

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        columns = self.encoded.columns
        start, end = (int(x) for x in columns["offsets"][self.ids[i] : self.ids[i] + 2])
        return (
            np.asarray(columns["tokens"][start:end]),
            columns["turn_ids"][start:end].astype(np.int32),
        )

    @property
    def lengths(self) -> np.ndarray:
        """int64 [conversations], tokens of each."""
        return np.diff(self.encoded.columns["offsets"])[self.ids]

    @property
    def assistant_lengths(self) -> np.ndarray:
        """int64 [conversations], tokens the assistant wrote."""
        return self.encoded.columns["assistant"][self.ids].astype(np.int64)

    @property
    def num_cut(self) -> int:
        """Conversations of which the end is missing."""
        return int(self.encoded.columns["cut"][self.ids].sum())

    def prompt(self, i: int) -> np.ndarray:
        """int32 [p]: the tokens before the first assistant turn that is learnt."""
        tokens, turn_ids = self[i]
        return tokens[: int(np.argmax(turn_ids > 0))]

    def assistant_token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [V]: how often the assistant wrote each token, every conversation counted once."""
        counts = np.zeros(vocab_size, np.int64)
        for i in range(len(self)):
            tokens, turn_ids = self[i]
            np.add.at(counts, tokens[turn_ids > 0], 1)
        return counts


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """What a run learns from, and what it is measured on."""

    train: Documents
    held_out: Documents
    also_held_out: int  # conversations of the training files left out: they stand in the eval files

    @property
    def fingerprint(self) -> str:
        """Hash of the encoded data and the split; differs wherever training would."""
        hasher = hashlib.sha256()
        for documents in (self.train, self.held_out):
            hasher.update(documents.encoded.fingerprint.encode())
            hasher.update(documents.ids.tobytes() + documents.weights.tobytes())
        return hasher.hexdigest()

    @property
    def encoded(self) -> tuple[Encoded, ...]:
        """The folders both sides come from: one, or two where eval files were given."""
        same = self.train.encoded is self.held_out.encoded
        return (self.train.encoded,) if same else (self.train.encoded, self.held_out.encoded)


def prepare_dataset(
    *,
    train_files: str,
    eval_files: str,
    eval_fraction: float,
    encoder: ChatEncoder,
    max_target_length: int,
    truncation_policy: str,
    max_skipped_fraction: float,
    seed: int,
    cache_dir: Path,
    vocab_size: int,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Encodes the files, or takes what an earlier run encoded, and splits them.

    train_files, eval_files: see parse_file_spec; only the first takes weights. Without eval_files a
    share of eval_fraction of the training files' conversations is held out, at least one.
    vocab_size: of the target, which must know every token. DataError: see the functions below.
    """

    def encode(spec: str, file_sets: list[FileSet]) -> Encoded:
        encoded = encode_files(
            file_sets, encoder, max_target_length, truncation_policy, cache_dir, log
        )
        encoded.report.check_share(max_skipped_fraction, spec)
        _check_replies(encoded, spec, max_target_length)
        _check_tokens(encoded, vocab_size)
        return encoded

    train_sets = parse_file_spec(train_files)
    eval_sets = parse_file_spec(eval_files) if eval_files else []
    if any(file_set.weight is not None for file_set in eval_sets):
        raise DataError(
            f"grain_eval_files={eval_files!r} has weights, which have no effect there: every "
            f"held-out conversation counts once; leave the weights out"
        )
    train = encode(train_files, train_sets)
    hashes = train.columns["content_hash"]
    if not eval_files:
        out = held_out_mask(hashes, eval_fraction, seed)
        return Dataset(_train_documents(train, ~out), _held_out_documents(train, out), 0)
    held_out = encode(eval_files, eval_sets)
    leaked = np.isin(hashes, held_out.columns["content_hash"])
    if leaked.all():
        raise DataError(
            f"every conversation of {train_files} is also in {eval_files}: nothing is left to "
            f"train on; set grain_eval_files to other files, or leave it empty for eval_fraction"
        )
    everything = np.ones(len(held_out), bool)
    return Dataset(
        _train_documents(train, ~leaked),
        _held_out_documents(held_out, everything),
        int(leaked.sum()),
    )


def mixture_weights(
    file_sets: Sequence[FileSet],
    counts: np.ndarray,  # int [n], training conversations of each file set
) -> np.ndarray:
    """float64 [n]: copies of each conversation of a file set in an epoch, at most 1.

    Without weights every conversation is read once per epoch. Weights are shares p of a mixture,
    and an epoch ends, as Grain's and MaxText's mixtures do, where the first file set has been read
    once: it holds min(count / p) conversations, of the other file sets another random part in each
    epoch. DataError: a file set with a share and without conversations.
    """
    if all(file_set.weight is None for file_set in file_sets):
        return np.ones(len(file_sets))
    if not counts.all():
        pattern = file_sets[int(np.argmin(counts))].pattern
        raise DataError(
            f"{pattern!r} has a share of the training data and no conversation that can be "
            f"trained on; leave it out of grain_train_files"
        )
    shares = np.array([file_set.weight for file_set in file_sets], np.float64)
    rates = shares / counts
    return rates / rates.max()


def held_out_mask(hashes: np.ndarray, eval_fraction: float, seed: int) -> np.ndarray:
    """bool [conversations]: which of them are held out, by the hash of their messages.

    hashes: uint64 [conversations].

    Equal conversations fall on the same side, adding files moves no conversation from one side to
    the other, and neither side is empty. DataError: fewer than two different conversations.
    """
    different, which = np.unique(hashes, return_inverse=True)
    if len(different) < 2:
        raise DataError(
            "all usable conversations are the same one: nothing can be held out of it; add data, "
            "or give grain_eval_files"
        )
    draws = _random_draws(different, seed)
    out = draws < eval_fraction * 2.0**64
    if not out.any():
        out[np.argmin(draws)] = True
    if out.all():
        out[np.argmax(draws)] = False
    return out[which]


def _random_draws(hashes: np.ndarray, seed: int) -> np.ndarray:
    """uint64 hashes -> other uint64 hashes that depend on the seed."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = (hashlib.sha256(salt + int(h).to_bytes(8, "little")).digest() for h in hashes)
    return np.array([int.from_bytes(d[:8], "little") for d in digests], np.uint64)


def _train_documents(encoded: Encoded, mask: np.ndarray) -> Documents:
    ids = np.flatnonzero(mask)
    file_set = encoded.columns["file_set"][ids]
    counts = np.bincount(file_set, minlength=len(encoded.file_sets))
    return Documents(encoded, ids, mixture_weights(encoded.file_sets, counts)[file_set])


def _held_out_documents(encoded: Encoded, mask: np.ndarray) -> Documents:
    ids = np.flatnonzero(mask)
    return Documents(encoded, ids, np.ones(len(ids)))


def _check_tokens(encoded: Encoded, vocab_size: int) -> None:
    if encoded.largest_token >= vocab_size:
        raise DataError(
            f"the data holds token {encoded.largest_token}, and the target's vocab_size is "
            f"{vocab_size}: tokenizer and target do not belong together; check "
            f"tokenizer_path and target_path"
        )


def _check_replies(encoded: Encoded, files: str, T: int) -> None:
    if len(encoded):
        return
    reasons = [f"{count} x {reason}" for reason, count in encoded.left_out.items()]
    raise DataError(
        f"{files}: no assistant token in the whole set, nothing can be learnt:\n  "
        + "\n  ".join([*encoded.report.skip_lines(), *reasons])
        + f"\nCheck the files and the chat template, or raise max_target_length={T}"
    )
