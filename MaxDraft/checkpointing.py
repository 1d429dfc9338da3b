"""Checkpoints of a run: everything that decides how it goes on, saved together or not at all.

A checkpoint holds the train state (head, optimizer, step), the draft vocabulary, the number of
batches read, and the configuration with the target's fingerprint. Orbax writes into a temporary
folder and renames it, so a kill at any moment leaves the checkpoints before it whole. The layout
does not depend on mesh, host count or any performance switch: a run may go on under others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from MaxDraft import distributed, pyconfig
from MaxDraft.errors import UserError
from MaxDraft.layers.params import Tree
from MaxDraft.pyconfig import Config
from MaxDraft.train_step import TrainState


class ResumeError(UserError):
    """The run's folder holds something that this command cannot go on from."""


class Checkpoints:
    """The checkpoints of one run, under <run>/checkpoints.

    log: told of damaged checkpoints. read_only: leaves the folder as it is, also what a training
    process is writing into it at this moment.
    """

    def __init__(self, config: Config, log: Callable[[str], None], read_only: bool = False):
        self._config, self._log, self._read_only = config, log, read_only
        self._identity: dict[str, Any] = {}
        self._folder = config.run_directory / "checkpoints"
        self._manager = self._open()

    def expect(self, identity: Mapping[str, Any]) -> None:
        """What must be the same to resume besides the configuration, by name, as JSON values.

        The target's fingerprint, the rows of a step, the number of steps, ...
        """
        self._identity = dict(identity)

    def _open(self) -> ocp.CheckpointManager:
        # Orbax reads the metrics of every checkpoint when it opens the folder, and one that a full
        # disk or a dying machine cut short would keep it from opening at all.
        for path in self._folder.glob("*/metrics/metrics"):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                step = path.parent.parent.name
                if self._read_only:
                    raise ResumeError(
                        f"checkpoint {step} is damaged ({path}: {_first_line(error)}); move "
                        f"{path.parent.parent} out of the way"
                    ) from error
                self._log(f"checkpoint {step} is damaged (metrics: {_first_line(error)})")
                self._move_aside(step)
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=self._config.max_num_checkpoints_to_keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_held_out_loss,
                    reverse=True,  # the lowest held-out loss ranks last, and the last n are kept
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=_held_out_loss,  # without it the metrics are not written
                best_mode="min",
                enable_async_checkpointing=self._config.async_checkpointing,
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
            ),
            item_names=("params", "optimizer", "vocabulary", "meta"),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        draft_to_target: np.ndarray,
        batches_read: int,
        metrics: Mapping[str, Any] | None,
    ) -> None:
        """Saves step `step`; metrics: held-out metrics of these parameters, if there are any."""
        if step in self._manager.all_steps():
            return
        meta = {
            "config": self._config.as_dict(),
            "identity": self._identity,
            "batches_read": batches_read,
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_rest(state)),
                    vocabulary=ocp.args.StandardSave({"draft_to_target": draft_to_target}),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=metrics,
            )
        except (OSError, ValueError) as error:  # tensorstore raises ValueError
            raise self._explained(error) from error

    def wait(self) -> None:
        """Returns when every save has reached the disk; raises what went wrong while writing."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> ResumeError:
        return ResumeError(
            f"a checkpoint could not be written to {self._folder} ({_first_line(error)}); those "
            f"that are there are whole. Make room and give the same command again"
        )

    def restore_latest(
        self, abstract_state: TrainState
    ) -> tuple[TrainState, np.ndarray, int] | None:
        """-> (state, draft_to_target, batches read) of the newest readable checkpoint, or None.

        A damaged checkpoint is set aside and the one before it is taken, aloud. ResumeError where
        the run was made with another target or configuration, or where none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                meta = self._meta(step)
                self._check_same_run(meta)
                restored = self._restore(step, abstract_state)
            except ResumeError:
                raise
            except Exception as error:  # damage surfaces as whatever the reader stumbles over
                self._log(
                    f"checkpoint {step} is damaged ({_first_line(error)}); trying the one before"
                )
                continue
            for damaged in (other for other in steps if other > step):
                self._set_aside(damaged)
            return restored[0], restored[1], meta["batches_read"]
        if steps:
            raise ResumeError(
                f"none of the checkpoints {sorted(steps)} in {self._folder} can be read; start "
                f"again under another run_name, or delete that folder to start this run afresh"
            )
        return None

    def identity(self) -> dict[str, Any] | None:
        """What the newest readable checkpoint was saved with as identity; None: there is none."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        found = self._first_readable(steps, self._meta)
        return found["identity"] if found else None

    def restore_params(self, which: str, abstract_params: Tree) -> tuple[int, Tree, np.ndarray]:
        """-> (step, head, draft_to_target) of the "best" or the "latest" checkpoint.

        Where that one is damaged: of the newest that is not, aloud.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        best = self._manager.best_step() if which == "best" else None
        if best is not None:  # None: no checkpoint was evaluated
            steps = [best, *(step for step in steps if step != best)]
        found = self._first_readable(steps, lambda step: self._head(step, abstract_params))
        if found is None:
            raise ResumeError(
                f"no {'readable ' if steps else ''}checkpoint in {self._folder}; run train.py first"
            )
        return found

    def _first_readable(self, steps: Sequence[int], read: Callable[[int], Any]) -> Any | None:
        for step in steps:
            try:
                return read(step)
            except Exception as error:  # damage surfaces as whatever the reader stumbles over
                self._log(f"checkpoint {step} is damaged ({_first_line(error)}); trying another")
        return None

    def _head(self, step: int, abstract_params: Tree) -> tuple[int, Tree, np.ndarray]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_params),
                vocabulary=ocp.args.StandardRestore(),
            ),
        )
        return step, restored["params"], np.asarray(restored["vocabulary"]["draft_to_target"])

    def close(self) -> None:
        """Waits for writes under way and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def _restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, np.ndarray]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                optimizer=ocp.args.StandardRestore(_rest(abstract_state)),
                vocabulary=ocp.args.StandardRestore(),
            ),
        )
        state = TrainState(params=restored["params"], **restored["optimizer"])
        return state, np.asarray(restored["vocabulary"]["draft_to_target"])

    def _check_same_run(self, meta: Mapping[str, Any]) -> None:
        lines = pyconfig.resume_differences(meta["config"], self._config.as_dict())
        lines += pyconfig.differences(meta["identity"], self._identity, set())
        if lines:
            raise ResumeError(
                f"{self._config.run_directory} holds a run that differs from this command:\n  "
                + "\n  ".join(lines)
                + "\nGive it another run_name, or the values it was started with"
            )

    def _set_aside(self, step: int) -> None:
        self._manager.close()
        self._move_aside(str(step))
        self._manager = self._open()

    def _move_aside(self, step: str) -> None:
        aside = self._folder.parent / f"damaged-checkpoint-{step}"
        if distributed.is_main_process():
            while aside.exists():
                aside = aside.with_name(aside.name + "-again")
            (self._folder / step).rename(aside)
        distributed.sync(f"set aside checkpoint {step}")
        self._log(f"checkpoint {step} was moved to {aside}")


def _held_out_loss(metrics: Mapping[str, Any]) -> float:
    return metrics["loss"]


def _rest(state: TrainState) -> dict[str, Any]:
    """What evaluation and export do not need; stored apart, so that they need not read it."""
    return {"step": state.step, "optimizer": state.optimizer}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"
