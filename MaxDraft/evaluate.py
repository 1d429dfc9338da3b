"""Measures a trained head: teacher-forced metrics, and real speculative decoding.

    python3 MaxDraft/evaluate.py configs/base.yml run_name=q3 base_output_directory=/runs

Reads the run's own configuration; further key=value go on top. Writes <run>/evaluation.json, and
<run>/report.txt from it.
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
from MaxDraft.errors import run_main
from MaxDraft.run import training_run
from MaxDraft.run.evaluation import evaluate


def main(argv: Sequence[str]) -> int:
    run = training_run.open_for_evaluation(pyconfig.initialize(argv, from_run=True))
    step, params, vocabulary = run.restore_head()
    evaluate(run, step, params, training_run.load_frozen(run, vocabulary))
    return 0


if __name__ == "__main__":
    run_main(main)
