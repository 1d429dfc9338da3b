"""Checksums of a folder's files: a bit that flips on a disk is noticed before it is trained on.

Orbax and tensorstore store arrays without checksums, so a flipped bit of a weight would be restored
without a word. checksums.json stands in the folder and holds the SHA-256 of every file in its
subfolders, as `sha256sum` prints it:

    {"params/d/1ffa31e4": "9f86d081884c7d65...", ...}

One core hashes about 1 GB per second. The files of a checkpoint are hashed side by side, by the
thread that writes it while training goes on.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Collection

from MaxDraft import storage
from MaxDraft.storage import StoragePath
from MaxDraft.strict_json import JsonError, parse_json

NAME = "checksums.json"
THREADS = 4  # hashing lets go of Python's global lock


def write_checksums(folder: StoragePath) -> None:
    """Writes the checksums of the files in the subfolders of `folder`; OSError if it cannot."""
    files = storage.files(folder)
    files = [file for file in files if "/" in file]
    storage.write_json(folder / NAME, dict(zip(files, _hash(folder, files), strict=True)))


def has_checksums(folder: StoragePath) -> bool:
    """Whether the folder was written with checksums."""
    return (folder / NAME).exists()


def find_damage(folder: StoragePath, subfolders: Collection[str]) -> str | None:
    """What is wrong with the files in some of the subfolders; None where all are as written."""
    try:
        written = parse_json((folder / NAME).read_bytes())
    except (OSError, JsonError) as error:
        return f"{NAME}: {error}"
    if not isinstance(written, dict):
        return f"{NAME} is not an object"
    files = [file for file in written if file.split("/")[0] in subfolders]
    try:
        present = _hash(folder, files)
    except OSError as error:
        return str(error)
    for file, checksum in zip(files, present, strict=True):
        if checksum != written[file]:
            return f"{file} does not hold what was written"
    return None


def _hash(folder: StoragePath, files: list[str]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: _hash_file(folder / file), files))


def _hash_file(path: StoragePath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
