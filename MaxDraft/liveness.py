"""How a process hears at once that another one of its run has ended.

The collectives of a run wait for every process. When one of them is killed the others would wait
for JAX's own heartbeats (100 seconds), and then be aborted with a stack trace. Here every process
keeps one TCP connection open to process 0, for as long as it lives. The kernel closes a dead
process's connections, and keep-alive probes find a machine that is gone, within 30 seconds.

A process that ends tells the others why before it closes its connection:

    {"process": 3, "token": "..."}                    the first line, from a process to process 0
    {"process": 3, "status": 2, "reason": "..."}      it ends; reason null: it is done, all is well

Process 0 passes on what it hears. A connection that closes without a last line belongs to a process
that was killed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

from MaxDraft.errors import RESTARTABLE

KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, probes
CONNECT_TIMEOUT = 20.0  # seconds
KILLED = (
    "it was killed, ran out of memory, or its machine is gone; give the same command to all "
    "processes again, and they go on from the newest checkpoint"
)

# Called once, in a thread: number of the process that ended, why, the exit status it asks for.
OnLost = Callable[[int, str, int], None]


class Liveness:
    """The connections of one process. Process 0 calls `listen`, every other `connect`."""

    def __init__(self, process: int, on_lost: OnLost):
        self._process, self._on_lost = process, on_lost
        self._connections: dict[int, socket.socket] = {}  # by the number of the other process
        self._done: set[int] = set()  # processes that have ended as they should
        self._leaving = False
        self._lock = threading.Lock()

    def listen(self) -> tuple[int, str]:
        """Starts to accept the other processes -> the port and the token that they must give."""
        token = secrets.token_hex(16)
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", 0))
        self._start(self._accept, server, token)
        return server.getsockname()[1], token

    def connect(self, host: str, port: int, token: str) -> None:
        """Joins process 0; OSError where it cannot be reached."""
        connection = socket.create_connection((host, port), CONNECT_TIMEOUT)
        connection.settimeout(None)
        _send(connection, {"process": self._process, "token": token})
        self._add(0, connection)
        self._start(self._follow, 0, connection, connection.makefile(encoding="utf-8"))

    def leave(self, status: int, reason: str | None) -> None:
        """Tells the others that this process ends, and why; None: it is done and all is well."""
        with self._lock:
            self._leaving = True
        self._tell({"process": self._process, "status": status, "reason": reason})

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            connection, _ = server.accept()
            self._start(self._welcome, connection, token)

    def _welcome(self, connection: socket.socket, token: str) -> None:
        lines = connection.makefile(encoding="utf-8")
        hello = _read(lines)
        if hello is None or hello.get("token") != token:
            connection.close()  # some other program
            return
        self._add(hello["process"], connection)
        self._follow(hello["process"], connection, lines)

    def _follow(self, other: int, connection: socket.socket, lines: Any) -> None:
        """Reads what another process says until its connection closes."""
        while (message := _read(lines)) is not None:
            if message["reason"] is None:
                self._done.add(message["process"])
            else:
                self._lost(message["process"], message["reason"], message["status"])
        if other not in self._done:
            self._lost(other, KILLED, RESTARTABLE)

    def _lost(self, other: int, reason: str, status: int) -> None:
        with self._lock:
            if self._leaving:
                return
            self._leaving = True
        self._tell({"process": other, "status": status, "reason": reason})
        self._on_lost(other, reason, status)

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):  # that one is gone too
                _send(connection, message)

    def _add(self, other: int, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):  # Linux has all three
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[other] = connection

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read(lines: Any) -> dict[str, Any] | None:
    """The next message of a connection; None when it has closed."""
    try:
        line = lines.readline()
        return json.loads(line) if line else None
    except (OSError, ValueError):
        return None
