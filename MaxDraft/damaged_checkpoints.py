"""Checkpoints whose files are not what was written: how they are found, and set aside.

All processes of a run must come to the same answer, or they would wait for each other in the
restoration of different checkpoints. So the main process looks, and the others are told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from MaxDraft import checksums, distributed, storage
from MaxDraft.resume import ResumeError
from MaxDraft.storage import StoragePath
from MaxDraft.strict_json import JsonError, parse_json

Log = Callable[[str], None]


def find_damage(checkpoint: StoragePath, items: Collection[str]) -> str | None:
    """What is wrong with the files of some items of a checkpoint; None: nothing that is known."""
    problem = None
    if distributed.is_main_process() and checksums.has_checksums(checkpoint):
        problem = checksums.find_damage(checkpoint, items)
    damaged = distributed.any_process(problem is not None)
    return (problem or "the log of process 0 says where") if damaged else None


def set_aside(checkpoint: StoragePath, log: Log) -> None:
    """Moves <run>/checkpoints/N to <run>/damaged-checkpoint-N, and logs it."""
    if distributed.is_main_process():
        aside = _aside(checkpoint)
        checkpoint.rename(aside)
        log(f"checkpoint {checkpoint.name} was moved to {aside}")
    distributed.sync(f"set aside checkpoint {checkpoint.name}")


def set_aside_broken_metrics(checkpoints: StoragePath, read_only: bool, log: Log) -> None:
    """Sets each checkpoint aside whose held-out metrics cannot be read.

    Orbax reads the metrics of every checkpoint when it opens their folder, and would not open it.
    read_only: ResumeError instead.
    """
    if distributed.is_main_process():
        for step in filter(str.isdigit, storage.names(checkpoints)):
            problem = _metrics_problem(checkpoints / step)
            if problem is None:
                continue
            if read_only:
                raise ResumeError(
                    f"checkpoint {step} is damaged (metrics: {problem}); move "
                    f"{checkpoints / step} out of the way"
                )
            aside = _aside(checkpoints / step)
            (checkpoints / step).rename(aside)
            log(f"checkpoint {step} is damaged (metrics: {problem}); it was moved to {aside}")
    distributed.sync("metrics of the checkpoints")


def _aside(checkpoint: StoragePath) -> StoragePath:
    aside = checkpoint.parent.parent / f"damaged-checkpoint-{checkpoint.name}"
    while aside.exists():
        aside = aside.with_name(aside.name + "-again")
    return aside


def _metrics_problem(checkpoint: StoragePath) -> str | None:
    """What is wrong with a checkpoint's held-out metrics; None: nothing, or it has none."""
    path = checkpoint / "metrics" / "metrics"
    if not path.exists():
        return None  # it was saved between two evaluations
    try:
        metrics = parse_json(path.read_bytes(), nan=True)
    except (OSError, JsonError) as error:
        return str(error)
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    if isinstance(loss, bool) or not isinstance(loss, int | float):
        return "they hold no loss"
    if checksums.has_checksums(checkpoint):
        return checksums.find_damage(checkpoint, ("metrics",))
    return None
