"""The end of the processes that prepare batches.

A worker process waits for room in its buffer, which a trainer that was killed never makes: without
what stands here, it would hold its memory for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_trainer(worker: int, num_workers: int) -> None:
    """Called by Grain in each new worker process: makes it end when the trainer does.

    A thread waits for the pipe that the trainer holds open as long as it lives. Linux could send a
    signal instead (PR_SET_PDEATHSIG), but when the thread that started the worker ends, not the
    process.
    """
    del worker, num_workers
    threading.Thread(target=_wait_for_the_end, name="end_with_trainer", daemon=True).start()


def _wait_for_the_end() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        connection.wait([trainer.sentinel])
        os._exit(1)
