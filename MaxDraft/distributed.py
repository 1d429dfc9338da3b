"""Who the processes of a run are: they find each other, agree, and notice when one is missing.

One process drives the devices of one host. On a Cloud TPU pod JAX knows from the machine how many
hosts there are and which of them this is; elsewhere three keys say so. This file alone touches
`jax.distributed` and `multihost_utils`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax._src import clusters
from jax._src import distributed as jax_distributed  # the key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from MaxDraft import errors
from MaxDraft.errors import RESTARTABLE, UserError
from MaxDraft.liveness import Liveness

# How long the first process waits for the last. A pod's hosts boot minutes apart; processes that
# are started by hand are there at once, and a wrong address should not take long to show.
POD_TIMEOUT = 300  # seconds
TIMEOUT = 60
# JAX aborts the process with a stack trace when its own time is over, so it is given more.
MARGIN = 60
EXPLANATION = 2.0  # seconds in which the death of another process is known if it caused an error
LIVENESS_KEY = "maxdraft/liveness"
TPU_CLUSTERS = (clusters.GkeTpuCluster, clusters.GceTpuCluster)


class DistributedError(UserError):
    """The processes of a run do not find each other."""


def start(coordinator: str, num_processes: int, process_id: int, automatic: bool) -> None:
    """Joins the processes of a run; before any other use of jax.

    coordinator: host:port of process 0; empty: one process, or with `automatic` those of the TPU
    pod, if this is a host of one. Returns when all processes are there. Where one of them is
    missing too long, ends this process with a line that says so.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise DistributedError(
                f"distributed_process_id={process_id} is not among the processes 0 to "
                f"{num_processes - 1} of distributed_num_processes={num_processes}"
            )
        _join(coordinator, num_processes, process_id, TIMEOUT)
        return
    pod = next((pod for pod in TPU_CLUSTERS if pod.is_env_present()), None) if automatic else None
    if pod is None or pod.get_process_count() == 1:
        return
    address = pod.get_coordinator_address(POD_TIMEOUT, None)
    _join(address, pod.get_process_count(), pod.get_process_id(), POD_TIMEOUT)


def is_main_process() -> bool:
    """Whether this process writes what all processes know."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Returns when every process has come to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them must call it together, and wait."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())


def gather(tree: Any, mesh: Mesh) -> Any:
    """Whole arrays on every process, as numpy; all processes must call it together."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.device_get(jax.jit(lambda x: x, out_shardings=everywhere)(tree))


def _join(address: str, num_processes: int, process_id: int, timeout: int) -> None:
    print(
        f"process {process_id} of {num_processes}: waiting for the others at {address}, for at "
        f"most {timeout} seconds",
        flush=True,
    )
    joined = threading.Event()
    arguments = (joined, address, num_processes, process_id, timeout)
    threading.Thread(target=_end_when_too_late, args=arguments, daemon=True).start()
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=timeout + MARGIN,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the processes cannot be joined at {address}: {str(error).splitlines()[0]}; is that "
            f"port free on the host of process 0, and each distributed_process_id given once?"
        ) from error
    finally:
        joined.set()
    _watch_each_other(address, process_id)


def _end_when_too_late(
    joined: threading.Event, address: str, num_processes: int, process_id: int, timeout: int
) -> None:
    """Ends the process, which JAX would abort with a stack trace, when not all came in time."""
    if joined.wait(timeout):
        return
    others = "process 1" if num_processes == 2 else f"one of processes 1 to {num_processes - 1}"
    if process_id == 0:
        missing = f"{others} has not come to {address}"
    elif _answers(address):
        missing = f"process 0 answers at {address}, but not all {num_processes} processes have come"
    else:
        missing = f"process 0 does not answer at {address}"
    _end(
        f"{missing} within {timeout} seconds; start all {num_processes} processes with the same "
        f"distributed_coordinator and distributed_num_processes, each with a "
        f"distributed_process_id of its own, and look why a missing one has ended",
        RESTARTABLE,
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _watch_each_other(address: str, process_id: int) -> None:
    """Connects the processes, so that each hears at once when another one ends (liveness.py)."""
    liveness = Liveness(process_id, _end_with_another)
    store = jax_distributed.global_state.client
    if process_id == 0:
        port, token = liveness.listen()
        store.key_value_set(LIVENESS_KEY, f"{port} {token}")
    else:
        port, token = store.blocking_key_value_get(LIVENESS_KEY, 1000 * MARGIN).split()
        host = address.rpartition(":")[0].strip("[]")
        try:
            liveness.connect(host, int(port), token)
        except OSError as error:
            print(
                f"process {process_id}: no connection to port {port} of {host} ({error}): if "
                f"another process ends, this one waits for JAX to notice",
                flush=True,
            )
    errors.join_group(_Group(liveness))


def _end_with_another(process: int, reason: str, status: int) -> None:
    _end(f"process {process} of this run has ended: {reason}", status)


def _end(message: str, status: int) -> None:
    errors.print_error(message)
    sys.stdout.flush()
    os._exit(status)  # the interpreter's own way out would wait for the processes that are gone


class _Group:
    """What an entry script does at its end because there are other processes (errors.run_main)."""

    def __init__(self, liveness: Liveness):
        self._liveness = liveness

    def wait_for_explanation(self) -> None:
        """Returns when the error at hand is this process's own.

        A process's death also shows as an error of the collective that was under way, often a
        moment before it is known to be dead. Then this process is ended while it waits here.
        """
        time.sleep(EXPLANATION)

    def leave(self, status: int, reason: str | None) -> None:
        """Tells the others. After an error it does not return, since JAX would wait for them."""
        self._liveness.leave(status, reason)
        if reason is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
