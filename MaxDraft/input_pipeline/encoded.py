"""Files of conversations -> tokens on disk, encoded once, memory-mapped ever after.

A folder's name is a hash of all that decides its contents: the files' bytes, the tokenizer, the
template, the keys. It is written under another name and renamed when complete, so that a folder
that exists is whole, and several processes may prepare the same data at once.

    tokens.npy      int32 [N]       all conversations, one after the other, truncated
    turn_ids.npy    uint16 [N]      0, or the assistant turn within the conversation
    offsets.npy     int64 [C + 1]   where each conversation begins
    assistant.npy   int32 [C]       how many of its tokens the assistant wrote
    words.npy       uint64 [C]      hash of its messages
    groups.npy      int32 [C]       which part of the file specification it comes from
    cut.npy         bool [C]        longer than max_target_length before it was truncated
    report.json     what was read, what was left out and why
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from MaxDraft import storage
from MaxDraft.input_pipeline.chat_template import ChatEncoder, EncodedConversation
from MaxDraft.input_pipeline.conversations import (
    Conversation,
    FileSet,
    ReadReport,
    read_conversations,
)
from MaxDraft.input_pipeline.errors import DataError

FORMAT = 1  # of the folder; raise it when what is written changes
TRUNCATION_POLICIES = ("truncate", "drop")
TOO_LONG = "longer than max_target_length, and truncation_policy=drop"
CUT_AWAY = "no assistant token among the first max_target_length"
PROGRESS = 15.0  # seconds between lines while encoding
CHUNK = 256  # conversations tokenized at a time
MOST_TURNS = np.iinfo(np.uint16).max
COLUMNS = {
    "tokens": np.int32,
    "turn_ids": np.uint16,
    "offsets": np.int64,
    "assistant": np.int32,
    "words": np.uint64,
    "groups": np.int32,
    "cut": np.bool_,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Every usable conversation of some files, in a folder."""

    folder: Path
    groups: tuple[FileSet, ...]
    report: ReadReport
    left_out: dict[str, int]  # conversations that the policies leave out; no mistakes
    fingerprint: str  # hash of tokens and turn ids: equal data on every host, in every version

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name, memory-mapped, read-only."""
        return {n: np.load(self.folder / f"{n}.npy", mmap_mode="r") for n in COLUMNS}

    def __len__(self) -> int:
        return len(self.columns["offsets"]) - 1

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be sent to a worker process as a copy of the whole data.
        return {k: v for k, v in self.__dict__.items() if k != "columns"}


def encode_files(
    groups: Sequence[FileSet],
    encoder: ChatEncoder,
    max_target_length: int,
    truncation_policy: str,
    cache_dir: Path,
    log: Callable[[str], None] = print,
) -> Encoded:
    """Every usable conversation of the files in tokens; from the cache where it is there.

    What cannot be used is in the report; it is the caller who decides how much is too much.
    """
    if truncation_policy not in TRUNCATION_POLICIES:
        raise DataError(
            f"truncation_policy is {truncation_policy!r}; choose one of "
            f"{', '.join(TRUNCATION_POLICIES)}"
        )
    cache_dir = Path(cache_dir).expanduser()
    key = _cache_key(groups, encoder, max_target_length, truncation_policy)
    folder = cache_dir / key[:32]
    found = _open(folder, groups)
    if found is not None:
        log(f"data: {len(found)} conversations encoded before, taken from {folder}")
        return found
    log(f"data: encoding {sum(len(g.paths) for g in groups)} files into {folder}")
    try:
        storage.remove_abandoned(cache_dir)
        with storage.fresh_folder(folder) as fresh:
            _write(fresh, groups, encoder, max_target_length, truncation_policy, log)
            storage.flush_folder(fresh)
            try:
                fresh.rename(folder)
            except OSError:
                # Another process was faster, or what has the name was damaged after it was written.
                if _open(folder, groups) is None:
                    storage.replace_folder(fresh, folder)
    except OSError as error:
        raise DataError(
            f"the encoded data cannot be written to {cache_dir}: {error.strerror or error}"
        ) from error
    written = _open(folder, groups)
    if written is None:
        raise DataError(f"the encoded data in {folder} is damaged; delete that folder")
    return written


# ------------------------------------------------------------------------------- encoding
def _write(
    folder: Path,
    groups: Sequence[FileSet],
    encoder: ChatEncoder,
    T: int,
    policy: str,
    log: Callable[[str], None],
) -> None:
    report, left_out = ReadReport(), dict.fromkeys((TOO_LONG, CUT_AWAY), 0)
    hasher = hashlib.sha256()
    files = {name: (folder / f"{name}.npy").open("wb") for name in COLUMNS}
    try:
        columns = {name: _Column(files[name], dtype) for name, dtype in COLUMNS.items()}
        columns["offsets"].append([0])
        said = time.monotonic()
        for group, conversation, encoded in _encoded(groups, encoder, report):
            length = len(encoded.tokens)
            if length > T and policy == "drop":
                left_out[TOO_LONG] += 1
                continue
            tokens, turn_ids = encoded.tokens[:T], encoded.turn_ids[:T]
            if not turn_ids.any():
                left_out[CUT_AWAY] += 1
                continue
            hasher.update(tokens.tobytes() + turn_ids.tobytes())
            columns["tokens"].append(tokens)
            columns["turn_ids"].append(turn_ids)
            columns["offsets"].append([columns["tokens"].length])
            columns["assistant"].append([np.count_nonzero(turn_ids)])
            columns["words"].append([_hash_words(conversation)])
            columns["groups"].append([group])
            columns["cut"].append([length > T])
            if time.monotonic() - said > PROGRESS:
                said = time.monotonic()
                log(f"data: {columns['cut'].length} conversations encoded, {report.records} read")
        for column in columns.values():
            column.finish()
    finally:
        for file in files.values():
            file.close()
    about = {
        "report": report.as_dict(),
        "left_out": {reason: count for reason, count in left_out.items() if count},
        "lengths": {name: column.length for name, column in columns.items()},
        "fingerprint": hasher.hexdigest(),
    }
    with (folder / "report.json").open("w", encoding="utf-8") as file:
        json.dump(about, file, indent=2)


def _encoded(
    groups: Sequence[FileSet], encoder: ChatEncoder, report: ReadReport
) -> Iterator[tuple[int, Conversation, EncodedConversation]]:
    """Group number, conversation and its tokens, in the order of the files."""
    everything = (
        (number, conversation)
        for number, group in enumerate(groups)
        for path in group.paths
        for conversation in read_conversations(path, report)
    )
    while chunk := list(itertools.islice(everything, CHUNK)):
        results = encoder.encode_batch([conversation.messages for _, conversation in chunk])
        for (number, conversation), result in zip(chunk, results, strict=True):
            if not isinstance(result, EncodedConversation):
                report.skip(str(result), conversation.file, conversation.line)
            elif not result.turn_ids.any():
                report.skip("no assistant token", conversation.file, conversation.line)
            elif result.turn_ids.max() > MOST_TURNS:
                reason = f"more than {MOST_TURNS} assistant turns"
                report.skip(reason, conversation.file, conversation.line)
            else:
                yield number, conversation, result


class _Column:
    """A one-dimensional .npy file that grows: its header is written again at the end."""

    def __init__(self, file: BinaryIO, dtype: Any) -> None:
        self._file, self._dtype = file, np.dtype(dtype)
        self.length = 0
        self._write_header()

    def append(self, values: np.ndarray | Sequence[Any]) -> None:
        values = np.asarray(values).astype(self._dtype)
        self._file.write(values.tobytes())
        self.length += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in the header for the first dimension to grow to 21 digits.
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _open(folder: Path, groups: Sequence[FileSet]) -> Encoded | None:
    """A folder that is whole, else None."""
    try:
        about = json.loads((folder / "report.json").read_text("utf-8"))
        encoded = Encoded(
            folder,
            tuple(groups),
            ReadReport.from_dict(about["report"]),
            about["left_out"],
            about["fingerprint"],
        )
        lengths = {name: len(column) for name, column in encoded.columns.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return encoded if lengths == about["lengths"] else None


# ------------------------------------------------------------------------------- keys
def _cache_key(groups: Sequence[FileSet], encoder: ChatEncoder, T: int, policy: str) -> str:
    """Bytes rather than names and dates: a copy of the data on another host is the same data."""
    files = [[_hash_file(path) for path in group.paths] for group in groups]
    parts = [FORMAT, files, encoder.fingerprint, T, policy]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _hash_words(conversation: Conversation) -> int:
    words = json.dumps([[m.role, m.content] for m in conversation.messages])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
