"""Encoded conversations on disk: written once, memory-mapped ever after, checked by checksums.

n conversations:

tokens.npy          int32 [tokens]  all conversations, one after the other, truncated
turn_ids.npy        uint16 [tokens] 0, or the assistant turn within the conversation
offsets.npy         int64 [n + 1]   where each conversation begins
assistant.npy       int32 [n]       how many of its tokens the assistant wrote
content_hash.npy    uint64 [n]      hash of its messages
file_set.npy        int32 [n]       which part of the file specification it comes from
cut.npy             bool [n]        longer than max_target_length before it was truncated
report.json         what was read, what was left out and why; checksums of all this
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from MaxDraft.input_pipeline.file_spec import FileSet
from MaxDraft.input_pipeline.read_report import ReadReport

REPORT = "report.json"
COLUMNS = {
    "tokens": np.int32,
    "turn_ids": np.uint16,
    "offsets": np.int64,
    "assistant": np.int32,
    "content_hash": np.uint64,
    "file_set": np.int32,
    "cut": np.bool_,
}


class DamagedError(Exception):
    """A folder of encoded conversations that is not what was written."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Every usable conversation of some files, in a folder."""

    folder: Path
    file_sets: tuple[FileSet, ...]
    report: ReadReport
    left_out: dict[str, int]  # conversations that the policies leave out; no mistakes
    largest_token: int
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


def write_report(
    folder: Path, report: ReadReport, left_out: dict[str, int], largest_token: int, fingerprint: str
) -> None:
    """Writes report.json; the folder's columns are complete and stay as they are."""
    content = {
        "report": report.as_dict(),
        "left_out": left_out,
        "largest_token": largest_token,
        "fingerprint": fingerprint,
        "sha256": {name: hash_file(folder / f"{name}.npy") for name in COLUMNS},
    }
    whole = {"content": content, "sha256": _hash_json(content)}
    (folder / REPORT).write_text(json.dumps(whole, indent=2), encoding="utf-8")


def open_encoded(folder: Path, file_sets: Sequence[FileSet]) -> Encoded:
    """A folder that write_report completed; DamagedError: which of its files is damaged."""
    try:
        whole = json.loads((folder / REPORT).read_text("utf-8"))
        content = whole["content"]
        if _hash_json(content) != whole["sha256"]:
            raise DamagedError(f"{REPORT} does not match its checksum")
        for name, checksum in content["sha256"].items():
            if hash_file(folder / f"{name}.npy") != checksum:
                raise DamagedError(f"{name}.npy does not match its checksum")
        return Encoded(
            folder,
            tuple(file_sets),
            ReadReport.from_dict(content["report"]),
            content["left_out"],
            content["largest_token"],
            content["fingerprint"],
        )
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{REPORT} is not what was written") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Column:
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
        """Completes the file, which stays open."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()

    def _write_header(self) -> None:
        # numpy leaves space in the header for the first dimension to grow to 21 digits.
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
