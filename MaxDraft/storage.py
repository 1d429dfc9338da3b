"""Files that are whole or not there, in local folders and in buckets (gs://) alike.

A reader must never meet half a file, whatever happened to the process that wrote it. On a local
disk a file is therefore written under a temporary name, flushed, and renamed, which replaces the
old content in one step; a folder likewise. A bucket shows an object only when its upload has ended,
so there the object is written directly.

The process that writes holds a lock (flock) on its temporary file or folder. The kernel releases
the lock when the process dies, so a temporary that can be locked belongs to nobody and
`remove_abandoned` deletes it. A process number in the name would not do: containers that share a
folder count their processes separately, and numbers are used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, Union

from MaxDraft.errors import UserError

if TYPE_CHECKING:
    from etils import epath

# A path in a local file system, or one in a bucket.
StoragePath = Union[pathlib.Path, "epath.Path"]

TEMPORARY = ".tmp-"  # between a hidden name and the random part of a temporary's name
_process_locks: list[IO[str]] = []  # files whose lock this process holds until it ends


class StorageError(UserError):
    """A path that leads nowhere."""


def as_path(location: str | os.PathLike[str]) -> StoragePath:
    """A pathlib.Path, absolute and with ~ expanded; for an address such as gs://, an epath.Path.

    Reading a bucket takes gcsfs (`pip install etils[epath-gcs]`) or TensorFlow. StorageError where
    the path begins with the home of a user who does not exist.
    """
    text = os.fspath(location)
    if "://" in text:
        # Only here: the benchmark runs where nothing but jax, optax and pyyaml is installed.
        from etils import epath

        return epath.Path(text)
    try:
        return pathlib.Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise StorageError(f"{text}: there is no such user; write the full path") from error


def is_local(path: StoragePath) -> bool:
    """Whether the path lies in a file system of this machine, and not in a bucket."""
    return isinstance(path, pathlib.Path)


def write_bytes(location: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all, making its folder where needed; OSError if it cannot."""
    path = as_path(location)
    if not is_local(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, handle = _locked_temporary(path, is_folder=False)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def write_text(location: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file whole or not at all."""
    write_bytes(location, text.encode("utf-8"))


def write_json(location: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(location, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def fresh_folder(location: str | os.PathLike[str]) -> Iterator[StoragePath]:
    """A new empty folder beside the one to be made; what is left of it goes when the block ends.

    with storage.fresh_folder(folder) as fresh:
        ...                                     # write into fresh
        storage.replace_folder(fresh, folder)
    """
    path = as_path(location)
    if not is_local(path):
        fresh = _temporary_name(path)
        fresh.mkdir(parents=True, exist_ok=True)
        try:
            yield fresh
        finally:
            remove(fresh)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, handle = _locked_temporary(path, is_folder=True)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(handle)


def replace_folder(fresh: StoragePath, folder: StoragePath) -> None:
    """Gives `fresh` the name of `folder`; what had the name before is removed.

    Everything in `fresh` is on the disk before its name changes. On a local disk the old folder is
    whole until then and comes back if the new one cannot be named. A bucket has no folders to
    rename: its objects are moved one by one, and a reader may meet some of the new ones.
    """
    fresh, folder = as_path(fresh), as_path(folder)
    if not is_local(folder):
        remove(folder)
        fresh.rename(folder)
        return
    flush_folder(fresh)
    old = _temporary_name(folder)
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    remove(old)
    _flush(folder.parent)


def flush_folder(folder: pathlib.Path) -> None:
    """Returns when a local folder's files have reached the disk."""
    for path in sorted(folder.rglob("*")):
        _flush(path)
    _flush(folder)


def remove(location: str | os.PathLike[str]) -> None:
    """Removes a file, or a folder with all that is in it; nothing happens where there is none."""
    path = as_path(location)
    if path.is_dir() and not (is_local(path) and path.is_symlink()):
        shutil.rmtree(path) if is_local(path) else path.rmtree()
    else:
        path.unlink(missing_ok=True)


def names(location: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder."""
    path = as_path(location)
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def files(location: str | os.PathLike[str]) -> list[str]:
    """The files below a folder, relative to it, with / between folders, sorted."""
    relative = []
    for entry in as_path(location).iterdir():
        if entry.is_dir():
            relative += [f"{entry.name}/{file}" for file in files(entry)]
        else:
            relative.append(entry.name)
    return sorted(relative)


def remove_abandoned(location: str | os.PathLike[str]) -> list[str]:
    """Removes the temporaries that dead processes left in a local folder -> their names.

    A temporary whose process lives, on this machine, is locked and stays. In a bucket nothing tells
    whether the writer lives, so nothing is removed there.
    """
    folder = as_path(location)
    removed = []
    if not is_local(folder) or not folder.is_dir():
        return removed
    for path in sorted(folder.glob(f".*{TEMPORARY}*")):
        with contextlib.suppress(OSError):  # somebody else was faster, or it is still written to
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
                removed.append(path.name)
            finally:
                os.close(handle)
    return removed


def lock_until_exit(location: str | os.PathLike[str]) -> bool:
    """Takes the lock of a file until this process ends -> False where another process has it.

    A bucket offers no lock through epath: there the answer is always True.
    """
    path = as_path(location)
    if not is_local(path):
        return True
    file = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _process_locks.append(file)
    return True


def _locked_temporary(path: pathlib.Path, is_folder: bool) -> tuple[pathlib.Path, int]:
    """A new temporary beside `path`, and the open handle that holds its lock."""
    while True:
        temporary = _temporary_name(path)
        if is_folder:
            temporary.mkdir()
        else:
            temporary.touch()
        # Until it is locked another process may take it for abandoned and remove it.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(temporary, os.O_RDONLY if is_folder else os.O_WRONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, handle
            os.close(handle)


def _temporary_name(path: StoragePath) -> StoragePath:
    return path.with_name(f".{path.name}{TEMPORARY}{uuid.uuid4().hex[:12]}")


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
