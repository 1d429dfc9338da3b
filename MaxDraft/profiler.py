"""A trace of a few training steps: what the devices and the host did when (profiler=xplane).

The first steps of a start are left out, since they compile, and only a few are recorded, since a
trace grows with every operation. XProf, TensorBoard and Perfetto show what lies in the folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from MaxDraft.metric_logger import say
from MaxDraft.pyconfig import Config


class Profiler:
    """Starts and stops jax.profiler around steps that follow each other.

    folder: where the trace is written; None: there is none.
    first_step, num_steps: the steps in the trace, by the numbers that `step` is given.
    """

    def __init__(self, folder: Path | None, first_step: int, num_steps: int):
        self._folder, self._running = folder, False
        self._first_step, self._end = first_step, first_step + num_steps

    @classmethod
    def from_config(cls, config: Config, next_step: int, last_step: int) -> Profiler:
        """The trace that the configuration asks for, of a training from next_step to last_step.

        The first process alone writes one: the others do the same at the same time.
        """
        wanted = config.profiler == "xplane" and jax.process_index() == 0
        first_step = next_step + config.skip_first_n_steps_for_profiler
        if wanted and first_step > last_step:
            say(
                f"profiler=xplane: no trace, since it would begin at step {first_step} and the "
                f"training ends at step {last_step}; lower skip_first_n_steps_for_profiler"
            )
        folder = config.run_directory / "profile" if wanted else None
        return cls(folder, first_step, config.profiler_steps)

    @contextlib.contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Around training step `number`, which begins with `state`.

        Where the trace begins or ends, it first waits for `state`, so that what the devices still
        do for the steps before is on the right side of that line.
        """
        if self._running and number >= self._end:
            jax.block_until_ready(state)
            self.close()
        if self._folder is not None and number == self._first_step:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def close(self) -> None:
        """Ends and writes a trace that is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
