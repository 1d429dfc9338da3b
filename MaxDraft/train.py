"""Trains a draft head, measures it by real decoding and exports it.

    python3 MaxDraft/train.py configs/base.yml                      (the embedded default)
    python3 MaxDraft/train.py configs/base.yml model_name=qwen3-8b target_path=/models/Qwen3-8B \
        grain_train_files=sharegpt.jsonl base_output_directory=/runs run_name=q3

The same command resumes a run that was stopped. Exit status: 0 done, 2 a mistake it explains,
42 training stopped by SIGTERM or Ctrl-C with everything saved; MaxDraft/errors.py has the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # importing this file changes nothing
    # The repository's root, not this folder: no file in it may shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from MaxDraft.errors import exit_on_signals

    exit_on_signals()

from MaxDraft import pyconfig
from MaxDraft.errors import INTERRUPTED, RESTARTABLE, run_main
from MaxDraft.export import export
from MaxDraft.metric_logger import say
from MaxDraft.report import text as report
from MaxDraft.run import training_run
from MaxDraft.run.description import describe
from MaxDraft.run.evaluation import evaluate
from MaxDraft.run.training_loop import train


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
    describe(run, vocabulary)
    frozen = training_run.load_frozen(run, vocabulary)

    # ---------------------------------------------------- training
    state, stopped = train(run, frozen, state, vocabulary.draft_to_target, batches_read)
    step = int(state.step)
    if stopped and not run.config.enable_checkpointing:
        say(f"stopped after step {step} of {run.total_steps}; enable_checkpointing=False: all lost")
        return INTERRUPTED
    if stopped:
        say(f"stopped after step {step} of {run.total_steps}, all saved: the same command goes on")
        return RESTARTABLE

    # ---------------------------------------------------- is it any good, and how to serve it
    params = state.params
    if run.config.enable_checkpointing:
        del state
        step, params, vocabulary = run.restore_head()
    result = evaluate(run, step, params, frozen)
    export(run, step, params, vocabulary)
    say(f"\n{report.of_result(result)}")
    return 0


if __name__ == "__main__":
    run_main(main)
