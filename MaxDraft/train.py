"""Trains an EAGLE-3 draft head, measures it by real decoding and exports it.

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

# The repository's root, not this folder: no file in it may shadow a library.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import jax
import numpy as np

from MaxDraft import flops, pyconfig, report, wiring
from MaxDraft.evaluate import evaluate, held_out_metrics
from MaxDraft.export import export
from MaxDraft.metric_logger import MetricLogger, say
from MaxDraft.train_step import Frozen, TrainState
from MaxDraft.wiring import Run, TrainingError

STOPPED = 42


def main(argv: Sequence[str]) -> int:
    # ---------------------------------------------------- target, data, mesh, programs (no weights)
    run = wiring.open_run(pyconfig.initialize(argv), for_training=True)

    # ---------------------------------------------------- newest checkpoint, warm start or seed
    restored = run.checkpoints.restore_latest(run.programs.abstract_state, say)
    if restored is not None:
        state, ids, batches_read = restored
        vocabulary = wiring.vocabulary(run, ids)
        say(f"resuming after step {int(state.step)} of {run.total_steps}")
    else:
        vocabulary, warm_start = wiring.initial_head(run)
        state, batches_read = run.programs.initialize(warm_start), 0
    report.describe(run, vocabulary)
    frozen = wiring.load_frozen(run, vocabulary)

    # ---------------------------------------------------- training
    state = train(run, frozen, state, vocabulary.draft_to_target, batches_read)
    step = int(state.step)
    if step < run.total_steps:
        saved = "all saved" if run.config.enable_checkpointing else "with nothing saved"
        say(f"stopped after step {step} of {run.total_steps}, {saved}: the same command goes on")
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
    run: Run, frozen: Frozen, state: TrainState, draft_to_target: np.ndarray, batches_read: int
) -> TrainState:
    """Optimizer steps up to run.total_steps, or to the step after which a signal asks to stop.

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
                run.target.dims, run.head_dims, config.ttt_length, config.max_target_length
            ).values()
        ),
        num_devices=run.mesh.size,
        write=jax.process_index() == 0,
    )
    batches = run.train_batches(batches_read)
    stop = StopSignal()
    in_flight = []

    def settle() -> None:
        """Fetches and checks the step in flight, before anything is built on it."""
        while in_flight:
            number, result = in_flight.pop()
            fetched = jax.device_get(result)
            if np.isfinite(fetched["total_loss"]) and np.isfinite(fetched["gradient_norm"]):
                logger.train_step(number, fetched)
            elif config.abort_on_nan_loss:
                raise TrainingError(
                    f"step {number}: loss {fetched['total_loss']}, gradient norm "
                    f"{fetched['gradient_norm']}; stopped, the last checkpoint is whole. Lower "
                    f"learning_rate, or set abort_on_nan_loss=False to leave such steps out"
                )
            else:
                say(f"step {number}: loss or gradient is not finite; the step is left out")
            if number % config.log_period == 0:
                logger.flush()

    for step in range(int(state.step) + 1, last + 1):
        state, result = programs.train(state, frozen, next(batches))
        settle()
        in_flight.append((step, result))

        evaluating = step == last or (config.eval_interval > 0 and step % config.eval_interval == 0)
        stopping = stop.requested()
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
    stop.restore()
    logger.close()
    run.checkpoints.wait()
    return state


class StopSignal:
    """SIGTERM and Ctrl-C ask for a stop after the running step; a second one stops at once."""

    def __init__(self):
        self._asked = False
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, _frame) -> None:
        self._asked = True
        self.restore()
        say(f"{signal.Signals(number).name}: saving after this step")

    def restore(self) -> None:
        """From here on a signal does what it did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to stop; on several processes, whether any of them was asked to."""
        return wiring.any_process(self._asked)


if __name__ == "__main__":
    wiring.run_main(main)
