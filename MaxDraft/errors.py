"""The mistakes that a user can mend, and the one way in which every entry script ends.

Each room's error class derives from `UserError`; its message says what is wrong, where, and what to
type next. Whatever else escapes is a defect of MaxDraft and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Something a user can mend; told without a traceback, exit status 2."""


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Runs an entry script's main(argv) and exits with its status."""
    try:
        sys.exit(main(sys.argv))
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error}; the checkpoints are whole, and the same command goes on from them"
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(130)
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
