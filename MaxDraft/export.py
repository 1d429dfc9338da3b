"""Writes a trained head as the folder that the serving engines read, and proves it.

    python3 MaxDraft/export.py configs/base.yml run_name=q3 base_output_directory=/runs

Reads the run's own configuration; further key=value go on top. The folder is <run>/export, or
export_path.
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

import jax

from MaxDraft import distributed, pyconfig
from MaxDraft.convert.engines.report import engine_report
from MaxDraft.convert.heads.check import check_export
from MaxDraft.convert.heads.export import export_head
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.errors import run_main
from MaxDraft.layers.params import Tree
from MaxDraft.metric_logger import say
from MaxDraft.run import training_run
from MaxDraft.run.folder import check_export_directory
from MaxDraft.run.training_run import OpenedRun


def main(argv: Sequence[str]) -> int:
    config = pyconfig.initialize(argv, from_run=True)
    check_export_directory(config)
    run = training_run.open_for_export(config)
    step, params, vocabulary = run.restore_head()
    export(run, step, params, vocabulary)
    return 0


def export(run: OpenedRun, step: int, params: Tree, vocabulary: DraftVocabulary) -> Path:
    """Writes, checks and describes the export of the head of step `step` -> its folder."""
    folder, target, drafter = run.config.export_directory, run.target, run.drafter
    say(f"\nexporting the head of step {step}")
    params = distributed.gather(params, run.mesh)
    if jax.process_index() > 0:
        return folder

    def check(written: Path) -> None:
        say(str(check_export(written, params, drafter, vocabulary, target.captured_layers)))

    export_head(
        folder,
        params,
        drafter,
        vocabulary,
        target.config,
        target.captured_layers,
        run.config.model_name,
        check,
    )
    say(f"exported to {folder}\n")
    say(engine_report(drafter, target.captured_layers, target.config, target.path, folder))
    return folder


if __name__ == "__main__":
    run_main(main)
