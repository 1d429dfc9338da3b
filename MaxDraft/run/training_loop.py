"""The training loop: steps, their log, held-out evaluations and checkpoints.

A step's numbers are fetched while the next one runs, so the devices never wait for the host. An
implicit transfer between host and devices inside a step is an error (jax.transfer_guard): it would
make them wait without anybody noticing.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from MaxDraft import distributed
from MaxDraft.cost import flops
from MaxDraft.metric_logger import MetricLogger, say
from MaxDraft.profiler import Profiler
from MaxDraft.run.evaluation import held_out_metrics
from MaxDraft.run.stop_signal import StopSignal
from MaxDraft.run.training_run import TrainingError, TrainingRun
from MaxDraft.train_step import FrozenParams, TrainState


def train(
    run: TrainingRun,
    frozen: FrozenParams,
    state: TrainState,
    draft_to_target: np.ndarray,  # int32 [D], saved with the state
    batches_read: int,
) -> tuple[TrainState, bool]:
    """Optimizer steps up to run.total_steps -> (state, True where a signal asked to stop)."""
    config, last = run.config, run.total_steps
    first = int(state.step) + 1
    logger = _metric_logger(run, first - 1)
    pending = PendingStep(logger, config.log_period, config.abort_on_nan_loss)
    batches = run.train_batches(batches_read)
    profiler = Profiler.from_config(config, first, last)
    stop, stopping = StopSignal(), False
    try:
        for step in range(first, last + 1):
            batch = next(batches)
            with profiler.step(step, state), jax.transfer_guard("disallow"):
                state, numbers = run.programs.train(state, frozen, batch)
                pending.settle()
            pending.put(step, numbers)

            evaluating = step == last or _is_due(step, config.eval_interval)
            stopping = stop.requested(step)
            if evaluating or stopping or _is_due(step, config.checkpoint_period):
                pending.settle()
                logger.flush()
                metrics = None
                if evaluating:
                    metrics = held_out_metrics(run, state.params, frozen, config.eval_steps)
                    logger.evaluation(step, metrics)
                if config.enable_checkpointing:
                    run.checkpoints.save(step, state, draft_to_target, step, metrics)
                logger.restart_clock()
            if stopping:
                break
    finally:
        run.checkpoints.wait()  # whatever happened, what was being saved is finished
        profiler.close()
        logger.close()
    stop.exit_at_once_from_now_on(everything_saved=config.enable_checkpointing)
    return state, stopping


class PendingStep:
    """The step in flight: its numbers are fetched and checked before anything is built on it."""

    def __init__(self, logger: MetricLogger, log_period: int, abort_on_nan_loss: bool):
        self._logger, self._log_period, self._abort = logger, log_period, abort_on_nan_loss
        self._step: tuple[int, dict[str, jax.Array]] | None = None

    def put(self, step: int, numbers: dict[str, jax.Array]) -> None:
        """The numbers of a step that the devices have just been given."""
        self._step = (step, numbers)

    def settle(self) -> None:
        """Waits for that step and logs it; TrainingError where it is not finite, if that aborts."""
        if self._step is None:
            return
        (step, numbers), self._step = self._step, None
        fetched = jax.device_get(numbers)
        if fetched["finite"]:
            self._logger.train_step(step, fetched)
        elif self._abort:
            raise TrainingError(_not_finite(step, fetched))
        else:
            say(f"step {step}: loss or gradient is not finite; the step is left out")
        if step % self._log_period == 0:
            self._logger.flush()


def _not_finite(step: int, numbers: dict[str, Any]) -> str:
    return (
        f"step {step}: loss {numbers['total_loss']}, gradient norm {numbers['gradient_norm']}: not "
        f"finite, or the updated head is not. Stopped; the checkpoints before are whole. Start "
        f"under another run_name with a lower learning_rate, or go on with "
        f"abort_on_nan_loss=False, which leaves such steps out"
    )


def _is_due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _metric_logger(run: TrainingRun, start_step: int) -> MetricLogger:
    config = run.config
    flops_per_token = flops.per_token(
        run.target.dims,
        run.drafter,
        run.spec.num_steps,
        config.max_target_length,
        run.data.supervised_share,
    )
    return MetricLogger(
        config.run_directory,
        metrics_file=config.metrics_file,
        tensorboard=config.enable_tensorboard,
        step_weights=run.drafter.step_weights(run.spec.loss),
        start_step=start_step,
        total_steps=run.total_steps,
        flops_per_token=sum(flops_per_token.values()),
        num_devices=run.mesh.size,
        write=distributed.is_main_process(),
    )
