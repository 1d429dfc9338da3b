"""Trains an EAGLE-3 draft head, measures it by real decoding and exports it.

    python3 MaxDraft/train.py configs/base.yml                                   the embedded default
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

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if sys.path[1] == str(Path(__file__).resolve().parent):
    del sys.path[1]  # our folder: no file in it may shadow a library

from MaxDraft import evaluate, export, flops, pyconfig, wiring
from MaxDraft.checkpointing import Checkpoints
from MaxDraft.metric_logger import MetricLogger, say
from MaxDraft.pyconfig import Config
from MaxDraft.train_step import Programs, TrainState, make_programs
from MaxDraft.wiring import Data, NanLossError

STOPPED = 42


def main(argv: Sequence[str]) -> int:
    # ---------------------------------------------------------------- what is trained, on what
    config = wiring.with_embedded_target(pyconfig.initialize(argv))
    wiring.start_jax(config)
    wiring.open_run_directory(config)
    target = wiring.open_target(config)
    data = wiring.open_data(config, target)
    head_dims = wiring.head_dims(config, target.dims)
    say(data.describe())

    # ---------------------------------------------------------------- where it runs
    mesh = wiring.make_mesh(config)
    total_steps = data.total_steps(config, mesh)
    programs = make_programs(config, target.dims, head_dims, target.capture, mesh, total_steps)

    # ---------------------------------------------------------------- newest checkpoint, warm start, seed
    checkpoints = Checkpoints(config, wiring.identity(config, target, data, mesh, total_steps))
    restored = checkpoints.restore_latest(programs.abstract_state, say)
    if restored is not None:
        state, draft_to_target, batches_read = restored
        vocabulary = data.vocabulary_from(draft_to_target)
        say(f"resuming after step {int(state.step)} of {total_steps}")
    else:
        vocabulary, warm_params = wiring.first_vocabulary(config, data, target, head_dims, programs)
        state, batches_read = programs.initialize(warm_params), 0
    wiring.describe_run(config, target, head_dims, mesh, total_steps, vocabulary, data)
    wiring.save_config(config)
    frozen = wiring.load_frozen(config, target, vocabulary, mesh)

    # ---------------------------------------------------------------- training
    logger = MetricLogger(
        config.run_directory,
        metrics_file=config.metrics_file,
        tensorboard=config.enable_tensorboard,
        decay=config.ttt_loss_decay,
        start_step=int(state.step),
        total_steps=total_steps,
        flops_per_token=sum(
            flops.per_token(
                target.dims, head_dims, config.ttt_length, config.max_target_length
            ).values()
        ),
        num_devices=mesh.size,
        write=jax.process_index() == 0,
    )
    state, finished = train(
        config, programs, frozen, state, data, vocabulary, batches_read, total_steps,
        checkpoints, logger,
    )
    checkpoints.close()
    if not finished:
        say(f"stopped after step {int(state.step)}, all saved; give the same command to go on")
        return STOPPED

    # ---------------------------------------------------------------- is it any good, and off it goes
    result = evaluate.run(config, target, data)
    export.run(config, target)
    wiring.final_report(config, target, result)
    return 0


def train(
    config: Config,
    programs: Programs,
    frozen,
    state: TrainState,
    data: Data,
    vocabulary,
    batches_read: int,
    total_steps: int,
    checkpoints: Checkpoints,
    logger: MetricLogger,
) -> tuple[TrainState, bool]:
    """Optimizer steps up to total_steps -> (state, False where a signal stopped it early).

    A step's numbers are fetched while the next one runs, so the device never waits for the host.
    """
    stop = StopSignal()
    batches = data.train_batches(config, programs.batch_sharding, batches_read, total_steps)
    in_flight = None

    def settle() -> None:
        """Fetches the step in flight; its numbers are checked before anything builds on them."""
        nonlocal in_flight
        if in_flight is None:
            return
        step, result = in_flight
        in_flight = None
        fetched = jax.device_get(result)
        finite = np.isfinite(fetched["total_loss"]) and np.isfinite(fetched["gradient_norm"])
        if not finite and config.abort_on_nan_loss:
            raise NanLossError(step, fetched)
        if finite:
            logger.train_step(step, fetched)
        else:
            say(f"step {step}: loss or gradient is not finite, left out")
        if step % config.log_period == 0:
            logger.flush()

    def save(step: int) -> None:
        evaluation = None
        if step == total_steps or (config.eval_interval > 0 and step % config.eval_interval == 0):
            logger.flush()
            evaluation = data.held_out(config, programs, frozen, state.params)
            logger.evaluation(step, evaluation)
        if config.enable_checkpointing:
            checkpoints.save(step, state, vocabulary.draft_to_target, step, evaluation)
        logger.restart_clock()

    for step in range(int(state.step) + 1, total_steps + 1):
        state, result = programs.train(state, frozen, next(batches))
        settle()
        in_flight = (step, result)
        due = step == total_steps or step % config.checkpoint_period == 0
        due |= config.eval_interval > 0 and step % config.eval_interval == 0
        stopping = stop.requested(step)
        if due or stopping:
            settle()
            save(step)
        if stopping and step < total_steps:
            logger.close()
            return state, False
    logger.close()
    return state, True


class StopSignal:
    """SIGTERM and Ctrl-C ask for a stop after the running step; a second one stops at once."""

    def __init__(self):
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, _frame) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)
        say(f"{signal.Signals(number).name}: stopping after this step and saving")

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; on several processes, all of them agree."""
        return wiring.any_process(self._asked, step)


if __name__ == "__main__":
    wiring.run_main(main)
