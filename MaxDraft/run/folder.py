"""The run's folder: made, found to be this run's, and locked; and the folder of its export."""

from __future__ import annotations

from pathlib import Path

import jax

from MaxDraft import pyconfig, storage
from MaxDraft.convert.heads.export import check_replaceable
from MaxDraft.pyconfig import Config
from MaxDraft.resume import ResumeError, check_same_config


def make_run_directory(config: Config) -> None:
    """Makes <run>; ResumeError where it cannot be written or holds another run than this one."""
    folder = config.run_directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_to_write(folder)
    except OSError as error:
        raise ResumeError(
            f"the run's folder {folder} cannot be written ({error.strerror}: {error.filename}); "
            f"give another base_output_directory"
        ) from error
    if has_begun(config):
        check_same_config(pyconfig.read_saved(folder), config)


def has_begun(config: Config) -> bool:
    """Whether the run's folder holds a checkpoint, and the configuration it was made with."""
    folder = config.run_directory
    has_checkpoint = any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
    return has_checkpoint and (folder / pyconfig.SAVED_NAME).is_file()


def check_export_directory(config: Config) -> None:
    """Raises now what would keep the head from being written there after hours of training.

    ResumeError where the folder cannot be made, CheckpointError where it holds something that no
    export wrote. Removes temporary files of killed exports.
    """
    folder = config.export_directory
    check_replaceable(folder)
    try:
        _try_to_write(folder.parent)
    except OSError as error:
        raise ResumeError(
            f"the head cannot be written to {folder} ({error.strerror}: {error.filename}); give "
            f"another export_path"
        ) from error
    storage.remove_abandoned(folder.parent)


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / ".writable", "")
    storage.remove(folder / ".writable")


def lock_run_directory(config: Config) -> None:
    """ResumeError where another process trains this run; held until this process ends."""
    if jax.process_index() > 0:
        return  # the processes of one run share its folder
    if not storage.lock_until_exit(config.run_directory / ".lock"):
        raise ResumeError(
            f"{config.run_directory} is being trained by another process; wait for it, stop it, or "
            f"give another run_name"
        )
    storage.remove_abandoned(config.run_directory)
