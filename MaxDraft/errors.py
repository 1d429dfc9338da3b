"""The mistakes that a user can mend, and the one way in which every entry script ends.

Each room's error class derives from `UserError`; its message says what is wrong, where, and what to
type next. Whatever else escapes is a defect of MaxDraft and keeps its traceback.

Exit status: what main() returns; 1 a defect; 2 a mistake that was explained; 130 Ctrl-C; 143
SIGTERM.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol


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


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Runs an entry script's main(argv) and exits with its status."""
    reason = None
    try:
        status = main(sys.argv)
    except SystemExit as request:
        status = request.code
    except BaseException as error:
        for group in _groups:
            group.wait_for_explanation()
        status, reason = _report(error)
    for group in _groups:
        group.leave(status, reason)
    sys.exit(status)


def print_error(message: str) -> None:
    """The one form in which an error is told."""
    print(f"\nerror: {message}", file=sys.stderr, flush=True)


def _report(error: BaseException) -> tuple[int, str]:
    """Prints what ended the entry script -> exit status, and a line for other processes."""
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted; the same command goes on", file=sys.stderr, flush=True)
        return 130, "it was interrupted by Ctrl-C"
    if isinstance(error, UserError):
        print_error(str(error))
        return 2, str(error)
    if isinstance(error, OSError):
        message = f"{error}; the checkpoints are whole, and the same command goes on from them"
        print_error(message)
        return 2, message
    traceback.print_exception(error)
    last_line = traceback.format_exception_only(error)[-1].strip()
    return 1, f"{last_line} (the traceback stands in that process's log)"
