"""`Board`: a few values that all processes of a run can read, over connections that show when a process is gone.

Not a store of `torch.distributed`: those print the stack of their C++ code when they lose a connection, keep every user
waiting while one waits, and do not tell who left.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import socket
import threading
import time
from typing import Any

CONNECT_SECONDS = 10.0


class Board:
    """Rank 0 keeps the values, the others send theirs there as lines of JSON. Only some travel on to all.

    Arguments:
        store: where rank 0 writes its port, once.
        address: the host of rank 0 as others reach it.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, rank: int, store: Any, address: str) -> None:
        self.rank, self.values, self.lock = rank, dict[str, Any](), threading.RLock()
        self.peers: dict[socket.socket, bytearray] = {}  # what came from them and is no whole line yet
        self.ranks: dict[socket.socket, int] = {}
        self.gone: set[int] = set()  # ranks whose connection ended
        self.listener: socket.socket | None = None
        if rank == 0:
            family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
            try:
                self.listener = socket.create_server((str(place[0]), 0), family=family)
            except OSError:  # the address belongs to what forwards to this machine
                both = socket.has_dualstack_ipv6()
                any_family = socket.AF_INET6 if both else socket.AF_INET
                self.listener = socket.create_server(("", 0), family=any_family, dualstack_ipv6=both)
            self.token = secrets.token_hex(8)
            store.set("board", f"{self.listener.getsockname()[1]} {self.token}")
            return
        port, self.token = store.get("board").decode().split()
        connection = socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS)
        self.ranks[connection], self.peers[connection] = 0, bytearray()
        self.send(connection, "hello", [rank, self.token])

    def set(self, key: str, value: Any) -> None:
        """Tells rank 0; a "verdict" counts only if it is the first."""
        if self.rank == 0:
            self.take(key, value)
        else:
            for connection in list(self.peers):
                self.send(connection, key, value)

    def take(self, key: str, value: Any) -> None:
        """A value has come."""
        with self.lock:
            if key == "verdict" and key in self.values:
                return
            self.values[key] = value
            if self.rank != 0:
                return
            if key in ("verdict", "reported", "signal", "beat/0") or key.startswith("closed/"):
                receivers = set(self.ranks.values())
            elif key.startswith("at/"):  # for who reports
                receivers = {self.values.get("verdict", {}).get("by")}
            else:
                return
            for connection in [peer for peer, rank in self.ranks.items() if rank in receivers]:
                self.send(connection, key, value)

    def send(self, connection: socket.socket, key: str, value: Any) -> None:
        with self.lock, contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.sendall(json.dumps([key, value]).encode() + b"\n")

    def pump(self, seconds: float, also: socket.socket | None = None) -> bool:
        """Takes what comes, for at most so long; whether something can be read from `also`. For one thread only."""
        sources = [*self.peers, *filter(None, (self.listener, also))]
        try:
            ready = select.select(sources, [], [], seconds)[0]
        except (OSError, ValueError):  # closed meanwhile
            time.sleep(min(seconds, 0.05))
            return False
        for source in ready:
            if source is self.listener:
                with contextlib.suppress(OSError):
                    self.peers[self.listener.accept()[0]] = bytearray()
            elif source is not also:
                self.read(source)
        return also in ready

    def drain(self, rank: int) -> None:
        """Takes all that a process which has ended had sent."""
        for connection in [peer for peer, whose in self.ranks.items() if whose == rank]:
            while connection in self.peers and select.select([connection], [], [], 0)[0]:
                self.read(connection)

    def read(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(1 << 16)
        if not data:
            self.peers.pop(connection)
            if (rank := self.ranks.pop(connection, None)) is not None:
                self.gone.add(rank)
            return
        *lines, rest = (self.peers[connection] + data).split(b"\n")
        self.peers[connection] = bytearray(rest)
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                key, value = json.loads(line)
                if connection in self.ranks:
                    self.take(key, value)
                elif key == "hello" and value[1] == self.token:
                    self.welcome(connection, value[0])

    def welcome(self, connection: socket.socket, rank: int) -> None:
        with self.lock:
            self.ranks[connection] = rank
            for key in ("verdict", "reported", "signal"):
                if key in self.values:
                    self.send(connection, key, self.values[key])

    def close(self) -> None:
        for connection in filter(None, (*self.peers, self.listener)):
            with contextlib.suppress(OSError):
                if connection is not self.listener:
                    connection.shutdown(socket.SHUT_WR)
                connection.close()
        self.peers.clear()
