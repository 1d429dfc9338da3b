"""The mistakes that a user can mend, and the one way in which every entry script ends.

Each package's error class derives from `UserError`; its message says what is wrong, where, and what
to type next. Whatever else escapes is a defect of MaxDraft and keeps its traceback.

    exit status   0   done
                  1   a defect, with its traceback
                  2   a mistake, with one line that explains it
                 42   stopped by SIGTERM, or during training by Ctrl-C as well, or another process
                      of the run was lost: what is lost was not saved yet, a stop during training
                      loses nothing, and the same command goes on
                130   interrupted by Ctrl-C outside of training; or, with
                      enable_checkpointing=False, by either signal once training has begun: nothing
                      was saved
                141   whatever read the output has ended, as in `train.py | head`

This module imports nothing heavy, so that an entry script can handle signals before it imports jax.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

DEFECT, MISTAKE, RESTARTABLE, INTERRUPTED, BROKEN_PIPE = 1, 2, 42, 130, 141


class UserError(Exception):
    """Something a user can mend; printed without a traceback, exit status 2."""


class ProcessGroup(Protocol):
    """The other processes of a run, as this one sees them when it ends (distributed.py)."""

    def wait_for_explanation(self) -> None:
        """Ends the process where another one's death explains the error at hand."""

    def leave(self, status: int, reason: str | None) -> None:
        """Tells the others why this process ends; None: as it should."""


_groups: list[ProcessGroup] = []


def join_group(group: ProcessGroup) -> None:
    """Makes `run_main` tell the other processes when this one ends."""
    _groups.append(group)


def exit_on_signals() -> None:
    """From here on SIGTERM and Ctrl-C end the process with a line; a second one ends it at once.

    Entry scripts call it first of all: importing jax and the rest takes seconds, in which SIGTERM
    would end the process without a word and Ctrl-C with a traceback of the import system.
    """

    def stop(number: int, _frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\nstopped by {name}; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED if number == signal.SIGINT else RESTARTABLE)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Runs an entry script's main(argv) and exits with its status."""
    reason = None
    try:
        status = main(sys.argv)
        sys.stdout.flush()
    except SystemExit as request:
        status = request.code
        reason = f"it was stopped (exit status {status})" if status else None
    except BaseException as error:
        for group in _groups:
            group.wait_for_explanation()
        status, reason = _report(error)
    for group in _groups:
        group.leave(status, reason)
    sys.exit(status)


def print_error(message: str) -> None:
    """Prints an error in the one form that all entry scripts use."""
    print(f"\nerror: {message}", file=sys.stderr, flush=True)


def _report(error: BaseException) -> tuple[int, str]:
    """Prints what ended the entry script -> exit status, and a line for other processes."""
    if isinstance(error, UserError):
        print_error(str(error))
        return MISTAKE, str(error)
    if isinstance(error, BrokenPipeError):
        # The interpreter flushes stdout once more when it ends, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print_error("whatever read the output has ended; the same command goes on")
        return BROKEN_PIPE, "whatever read its output has ended"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room, and " if full else ""
        message = f"{error}; nothing that was saved is lost: {advice}give the same command again"
        print_error(message)
        return MISTAKE, message
    if isinstance(error, KeyboardInterrupt):
        print("\nstopped by Ctrl-C; the same command goes on", file=sys.stderr, flush=True)
        return INTERRUPTED, "it was stopped by Ctrl-C"
    traceback.print_exception(error)
    last_line = traceback.format_exception_only(error)[-1].strip()
    return DEFECT, f"{last_line} (the traceback stands in that process's log)"
