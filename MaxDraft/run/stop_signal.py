"""SIGTERM and Ctrl-C during training: one asks for a stop after the running step."""

from __future__ import annotations

import signal
import sys

import jax

from MaxDraft import distributed
from MaxDraft.errors import INTERRUPTED, RESTARTABLE
from MaxDraft.metric_logger import say

AGREEMENT_PERIOD = 10  # steps


class StopSignal:
    """Handles both signals from its construction on; a second one ends the process at once."""

    def __init__(self):
        self._requested = False
        self._former = {n: signal.signal(n, self._request) for n in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number: int, _frame) -> None:
        self._requested = True
        for other, handler in self._former.items():
            signal.signal(other, handler)
        say(f"{signal.Signals(number).name}: stopping after this step")

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; on several processes, whether any of them was asked to.

        They agree every AGREEMENT_PERIOD steps only, since agreeing means waiting for each other.
        """
        if jax.process_count() > 1 and step % AGREEMENT_PERIOD:
            return False
        return distributed.any_process(self._requested)

    def exit_at_once_from_now_on(self, everything_saved: bool) -> None:
        """From here on a signal ends the process at once.

        everything_saved: the same command goes on from the last step, which the status tells.
        """
        status = RESTARTABLE if everything_saved else INTERRUPTED
        for number in self._former:
            signal.signal(number, lambda *_: sys.exit(status))
