"""Storage: files and folders are whole or not there, here and in a bucket."""

import errno
import json
import multiprocessing
import os
import signal
import time

import fsspec
import pytest
from etils.epath import backend

from MaxDraft import storage


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path, monkeypatch):
    """A folder of each kind; the bucket is one in memory, behind the client epath would use."""
    if request.param == "local":
        return tmp_path / "runs"
    bucket = fsspec.filesystem("memory", use_listings_cache=False)
    bucket.store.clear()
    bucket.pseudo_dirs[:] = [""]
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
    return storage.as_path("gs://bucket/runs")


def leave_temporaries(folder):
    """Begins a folder and a file, says so, and waits to be killed."""
    with storage.fresh_folder(folder / "export") as fresh:
        (fresh / "half").write_text("half")
        storage._locked_temporary(folder / "config.yml", is_folder=False)
        (folder / "ready").touch()
        time.sleep(600)


def test_a_file_is_written_read_listed_and_removed(folder):
    storage.write_text(folder / "new" / "a.txt", "é")
    storage.write_json(folder / "new" / "b.json", {"a": 1})
    storage.write_json(folder / "new" / "b.json", {"a": 2})
    assert (folder / "new" / "a.txt").read_text() == "é"
    assert json.loads((folder / "new" / "b.json").read_text()) == {"a": 2}
    assert storage.names(folder / "new") == ["a.txt", "b.json"]
    assert storage.files(folder) == ["new/a.txt", "new/b.json"]
    storage.remove(folder / "new" / "a.txt")
    assert storage.names(folder / "new") == ["b.json"]
    storage.remove(folder / "new")
    storage.remove(folder / "new")
    assert storage.names(folder / "new") == []


def test_a_folder_takes_the_place_of_the_one_before(folder):
    for content in ("first", "second"):
        with storage.fresh_folder(folder / "export") as fresh:
            storage.write_text(fresh / content, content)
            storage.replace_folder(fresh, folder / "export")
    assert storage.names(folder / "export") == ["second"]
    assert storage.names(folder) == ["export"]


def test_a_folder_that_fails_leaves_the_one_before(folder):
    storage.write_text(folder / "export" / "old", "old")
    with pytest.raises(RuntimeError), storage.fresh_folder(folder / "export") as fresh:
        storage.write_text(fresh / "new", "new")
        raise RuntimeError
    assert storage.names(folder) == ["export"]
    assert storage.names(folder / "export") == ["old"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    storage.write_text(tmp_path / "a", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert storage.names(tmp_path) == ["a"]


def test_temporaries_of_a_killed_process_are_removed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=leave_temporaries, args=(tmp_path,)
    )
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    assert storage.remove_abandoned(tmp_path) == []  # its writer lives
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(storage.remove_abandoned(tmp_path)) == 2
    assert storage.names(tmp_path) == ["ready"]


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    assert storage.lock_until_exit(tmp_path / ".lock")
    assert not storage.lock_until_exit(tmp_path / ".lock")  # each open file locks for itself


def test_an_unknown_home_is_an_error_that_names_the_path():
    with pytest.raises(storage.StorageError, match="~nosuchuser/x"):
        storage.as_path("~nosuchuser/x")
