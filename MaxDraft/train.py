"""Trains a draft head, measures it by real decoding and exports it.

    python3 MaxDraft/train.py configs/base.yml                      (the embedded default)
    python3 MaxDraft/train.py configs/base.yml model_name=qwen3-8b target_path=/models/Qwen3-8B \
        grain_train_files=sharegpt.jsonl base_output_directory=/runs run_name=q3

The same command resumes a run that was stopped. Exit status: 0 done, 2 a mistake it explains,
42 stopped by SIGTERM or Ctrl-C with everything saved.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from MaxDraft.errors import exit_on_signals

    exit_on_signals()

import jax
import numpy as np

from MaxDraft import distributed, pyconfig
from MaxDraft.cost import flops
from MaxDraft.errors import run_main
from MaxDraft.evaluate import evaluate, held_out_metrics
from MaxDraft.export import export
from MaxDraft.metric_logger import MetricLogger, say
from MaxDraft.profiler import Profiler
from MaxDraft.report import text as report
from MaxDraft.run import training_run
from MaxDraft.run.training_run import TrainingError, TrainingRun
from MaxDraft.train_step import FrozenParams, TrainState

STOPPED = 42
SIGNAL_PERIOD = 10  # steps


def main(argv: Sequence[str]) -> int:
    # ---------------------------------------------------- target, data, mesh, programs (no weights)
    run = training_run.open_for_training(pyconfig.initialize(argv))

    # ---------------------------------------------------- newest checkpoint, warm start or seed
    restored = run.checkpoints.restore_latest(run.programs.abstract_state)
    if restored is not None:
        state, ids, batches_read = restored
        vocabulary = run.vocabulary(ids)
        say(f"resuming after step {int(state.step)} of {run.total_steps}")
    else:
        vocabulary, warm_start = training_run.initial_head(run)
        state, batches_read = run.programs.initialize(warm_start), 0
    report.describe(run, vocabulary)
    frozen = training_run.load_frozen(run, vocabulary)

    # ---------------------------------------------------- training
    state, stopped = train(run, frozen, state, vocabulary.draft_to_target, batches_read)
    step = int(state.step)
    if stopped and not run.config.enable_checkpointing:
        say(f"stopped after step {step} of {run.total_steps}; enable_checkpointing=False: all lost")
        return 1
    if stopped:
        say(f"stopped after step {step} of {run.total_steps}, all saved: the same command goes on")
        return STOPPED

    # ---------------------------------------------------- is it any good, and how to serve it
    params = state.params
    if run.config.enable_checkpointing:
        del state
        step, params, vocabulary = run.restore_head()
    result = evaluate(run, step, params, frozen)
    folder = export(run, step, params, vocabulary)
    report.finish(run, result, folder)
    return 0


def train(
    run: TrainingRun,
    frozen: FrozenParams,
    state: TrainState,
    draft_to_target: np.ndarray,
    batches_read: int,
) -> tuple[TrainState, bool]:
    """Optimizer steps up to run.total_steps -> (state, True where a signal asked to stop).

    A step's numbers are fetched while the next one runs, so the device never waits for the host.
    """
    config, programs, last = run.config, run.programs, run.total_steps
    logger = MetricLogger(
        config.run_directory,
        metrics_file=config.metrics_file,
        tensorboard=config.enable_tensorboard,
        decay=config.ttt_loss_decay,
        start_step=int(state.step),
        total_steps=last,
        flops_per_token=sum(
            flops.per_token(
                run.target.dims,
                run.drafter,
                config.ttt_length,
                config.max_target_length,
                run.data.supervised_share,
            ).values()
        ),
        num_devices=run.mesh.size,
        write=jax.process_index() == 0,
    )
    batches = run.train_batches(batches_read)
    profiler = Profiler.from_config(config, int(state.step) + 1, last)
    stop = StopSignal()
    in_flight = []

    def settle() -> None:
        """Fetches and checks the step in flight, before anything is built on it."""
        while in_flight:
            number, result = in_flight.pop()
            fetched = jax.device_get(result)
            if fetched["finite"]:
                logger.train_step(number, fetched)
            elif config.abort_on_nan_loss:
                raise TrainingError(
                    f"step {number}: loss {fetched['total_loss']}, gradient norm "
                    f"{fetched['gradient_norm']}: not finite, or the updated head is not. Stopped; "
                    f"the checkpoints before are whole. Start under another run_name with a lower "
                    f"learning_rate, or go on with abort_on_nan_loss=False, which leaves such "
                    f"steps out"
                )
            else:
                say(f"step {number}: loss or gradient is not finite; the step is left out")
            if number % config.log_period == 0:
                logger.flush()

    stopping = False
    try:
        for step in range(int(state.step) + 1, last + 1):
            with profiler.step(step, state):
                state, result = programs.train(state, frozen, next(batches))
            settle()
            in_flight.append((step, result))

            evaluating = step == last or (
                config.eval_interval > 0 and step % config.eval_interval == 0
            )
            stopping = stop.requested(step)
            if evaluating or stopping or step % config.checkpoint_period == 0:
                settle()
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
    stop.all_is_saved()
    return state, stopping


class StopSignal:
    """SIGTERM and Ctrl-C ask for a stop after the running step; a second one stops at once."""

    def __init__(self):
        self._asked = False
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, _frame) -> None:
        self._asked = True
        for other, handler in self._before.items():
            signal.signal(other, handler)
        say(f"{signal.Signals(number).name}: saving after this step")

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; on several processes, whether any of them was asked to.

        They agree every SIGNAL_PERIOD steps only, since agreeing means waiting for each other.
        """
        if jax.process_count() > 1 and step % SIGNAL_PERIOD:
            return False
        return distributed.any_process(self._asked)

    def all_is_saved(self) -> None:
        """From here on a signal stops at once, and the same command goes on."""
        for number in self._before:
            signal.signal(number, lambda *_: sys.exit(STOPPED))


if __name__ == "__main__":
    run_main(main)
