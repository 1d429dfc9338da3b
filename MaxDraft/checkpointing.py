"""Checkpoints of a run: everything that decides how it goes on, saved together or not at all.

A checkpoint holds the train state (head, optimizer, step), the draft vocabulary, the number of
batches read, the configuration and the run's identity. Orbax writes into a temporary folder; the
checksums of its files are added there before it is renamed (checksums.py), so a kill at any moment
leaves whole checkpoints only. The layout depends neither on the mesh nor on the number of hosts,
and a run may go on under others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from MaxDraft import checksums, storage
from MaxDraft.damaged_checkpoints import find_damage, set_aside, set_aside_broken_metrics
from MaxDraft.drafts import registry
from MaxDraft.layers.params import Tree
from MaxDraft.pyconfig import Config
from MaxDraft.resume import ResumeError, check_same_config, check_same_identity
from MaxDraft.train_step import TrainState

# What evaluation and export read stands apart from the optimizer, which is twice as large.
ITEMS = ("params", "optimizer", "vocabulary", "meta")


class Checkpoints:
    """The checkpoints of one run, under <run>/checkpoints.

    log: receives a line about each damaged checkpoint. read_only: leaves the folder as it is, also
    what a training process is writing into it at this moment.
    """

    def __init__(self, config: Config, log: Callable[[str], None], read_only: bool = False):
        self._config, self._log, self._read_only = config, log, read_only
        self._identity: dict[str, Any] = {}
        self._step_being_saved: int | None = None
        self._folder = config.run_directory / "checkpoints"
        if not read_only:
            _hide_closed_event_loops()
        self._manager = self._open()

    def set_identity(self, identity: Mapping[str, Any]) -> None:
        """What must be the same to resume besides the configuration, by name, as JSON values.

        The drafter, the target's fingerprint, the rows of a step, the number of steps, ...
        """
        self._identity = dict(identity)

    def saved_identity(self) -> dict[str, Any] | None:
        """The identity that the newest readable checkpoint was saved with; None: there is none."""
        newest = self._first_readable(self._newest_first(), ("meta",), self._meta)
        return registry.upgraded(newest["identity"]) if newest else None

    def save(
        self,
        step: int,
        state: TrainState,
        draft_to_target: np.ndarray,
        batches_read: int,
        metrics: Mapping[str, Any] | None,
    ) -> None:
        """Saves step `step`; metrics: held-out metrics of these parameters, if there are any.

        Returns when the arrays have been copied, and before they are written, unless
        async_checkpointing is off. ResumeError where this save or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        self.wait()  # the checksums of the save before are written under its own number
        self._step_being_saved = step
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
                    optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                    vocabulary=ocp.args.StandardSave({"draft_to_target": draft_to_target}),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics=metrics,
            )
        except (OSError, ValueError) as error:  # tensorstore raises ValueError
            raise self._write_error(error) from error
        if not self._config.async_checkpointing:
            self.wait()

    def wait(self) -> None:
        """Returns when every save has reached the disk; raises what went wrong while writing."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits for writes under way and lets go of the folder."""
        self.wait()
        self._manager.close()

    def restore_latest(
        self, abstract_state: TrainState
    ) -> tuple[TrainState, np.ndarray, int] | None:
        """-> (state, draft_to_target, batches read) of the newest readable checkpoint, or None.

        Checkpoints that are damaged are set aside, and a line names each. ResumeError where the run
        was made with another target or configuration, or where no checkpoint can be read.
        """
        steps = self._newest_first()

        def restore(step: int) -> tuple[int, TrainState, np.ndarray, int]:
            meta = self._meta(step)
            check_same_config(meta["config"], self._config)
            check_same_identity(meta["identity"], self._identity, self._config)
            state, draft_to_target = self._restore(step, abstract_state)
            return step, state, draft_to_target, meta["batches_read"]

        restored = self._first_readable(steps, ITEMS, restore)
        if restored is None:
            if not steps:
                return None
            raise ResumeError(
                f"none of the checkpoints {sorted(steps)} in {self._folder} can be read; start "
                f"again under another run_name, or delete that folder to start this run afresh"
            )
        damaged = [step for step in steps if step > restored[0]]
        if damaged:
            self._manager.close()
            for step in damaged:
                set_aside(self._folder / str(step), self._log)
            self._manager = self._open()
        return restored[1:]

    def restore_params(self, which: str, abstract_params: Tree) -> tuple[int, Tree, np.ndarray]:
        """-> (step, parameters, draft_to_target) of the "best" or the "latest" checkpoint.

        Where that one is damaged: of the newest that is not, and a line says so.
        """
        steps = self._newest_first()
        best = self._manager.best_step() if which == "best" else None
        if best is not None:  # None: no checkpoint was evaluated
            steps = [best, *(step for step in steps if step != best)]

        def restore(step: int) -> tuple[int, Tree, np.ndarray]:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract_params),
                    vocabulary=ocp.args.StandardRestore(),
                ),
            )
            return step, restored["params"], np.asarray(restored["vocabulary"]["draft_to_target"])

        head = self._first_readable(steps, ("params", "vocabulary"), restore)
        if head is None:
            raise ResumeError(
                f"no {'readable ' if steps else ''}checkpoint in {self._folder}; run train.py first"
            )
        return head

    # ---------------------------------------------------------------------- opening the folder
    def _open(self) -> ocp.CheckpointManager:
        set_aside_broken_metrics(self._folder, self._read_only, self._log)
        preserved = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=self._config.max_num_checkpoints_to_keep),
                checkpoint_managers.BestN(
                    get_metric_fn=_held_out_loss,
                    reverse=True,  # the lowest loss ranks last, and the last n are preserved
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserved,
                best_fn=_held_out_loss,  # without it the metrics are not written
                best_mode="min",
                # Always, because only then does Orbax call back before a checkpoint is complete.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
            ),
            item_names=ITEMS,
        )

    def _add_checksums(self) -> None:
        """Called by Orbax when the files of a checkpoint are written, before it gets its name.

        It runs on the main process only, in the thread that writes.
        """
        step = str(self._step_being_saved)
        for name in storage.names(self._folder):
            # A bucket renames no folder: there a checkpoint has its name from the beginning.
            if name == step or name.startswith(f"{step}.orbax-checkpoint-tmp"):
                checksums.write_checksums(self._folder / name)

    # ---------------------------------------------------------------------- reading
    def _newest_first(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def _first_readable(
        self, steps: Sequence[int], items: Collection[str], read: Callable[[int], Any]
    ) -> Any | None:
        """What `read` returns for the first of the steps whose items are not damaged."""
        for step in steps:
            try:
                problem = find_damage(self._folder / str(step), items)
                if problem is None:
                    result = read(step)
                    self._log_missing_checksums(step, items)
                    return result
            except ResumeError:
                raise
            except Exception as error:  # damage surfaces as whatever the reader stumbles over
                problem = _first_line(error)
            self._log(f"checkpoint {step} is damaged ({problem}); trying another")
        return None

    def _log_missing_checksums(self, step: int, items: Collection[str]) -> None:
        """Says which checkpoint's numbers nobody could verify."""
        if "params" in items and not checksums.has_checksums(self._folder / str(step)):
            self._log(f"checkpoint {step} has no checksums: what it holds was not verified")

    def _meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def _restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, np.ndarray]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract_state.params),
                optimizer=ocp.args.StandardRestore(_optimizer_item(abstract_state)),
                vocabulary=ocp.args.StandardRestore(),
            ),
        )
        state = TrainState(params=restored["params"], **restored["optimizer"])
        return state, np.asarray(restored["vocabulary"]["draft_to_target"])

    def _write_error(self, error: Exception) -> ResumeError:
        return ResumeError(
            f"a checkpoint could not be written to {self._folder} ({_first_line(error)}); those "
            f"that are there are whole. Make room and give the same command again"
        )


def _hide_closed_event_loops() -> None:
    """Keeps one exception out of the log that tells nobody anything.

    When one write of a save fails (a full disk), Orbax ends the event loop of that save and raises
    the failure, which is printed as the error it is. Its other writes still come to their ends, and
    each would print a traceback that says "Event loop is closed".
    """
    print_exception = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            print_exception(unraisable)

    sys.unraisablehook = hook


def _held_out_loss(metrics: Mapping[str, Any]) -> float:
    loss = metrics["loss"]
    return loss if math.isfinite(loss) else math.inf  # never the best


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "optimizer": state.optimizer}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"
