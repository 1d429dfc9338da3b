"""The run's folder: made, found to be this run's, and locked."""

from __future__ import annotations

import jax

from MaxDraft import pyconfig, storage
from MaxDraft.pyconfig import Config
from MaxDraft.resume import ResumeError, check_same_config


def make_run_directory(config: Config) -> None:
    """Makes <run>; ResumeError where it cannot be written or holds another run than this one."""
    folder = config.run_directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(folder / ".writable", "")
        storage.remove(folder / ".writable")
        config.export_directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResumeError(
            f"the run's folder {folder} or export_path cannot be written ({error.strerror}: "
            f"{error.filename}); give another base_output_directory or export_path"
        ) from error
    begun = any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
    if begun and (folder / pyconfig.SAVED_NAME).is_file():
        check_same_config(pyconfig.read_saved(folder), config)


def lock_run_directory(config: Config) -> None:
    """ResumeError where another process trains this run; held until this process ends."""
    if jax.process_index() > 0:
        return  # the processes of one run share its folder
    if not storage.lock_until_exit(config.run_directory / ".lock"):
        raise ResumeError(
            f"{config.run_directory} is being trained by another process; wait for it, stop it, or "
            f"give another run_name"
        )
