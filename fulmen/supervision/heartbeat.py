"""`Board`: a few values that all processes of a run can read, over connections that show when a process is gone.

Not a store of `torch.distributed`: those print the stack of their C++ code when they lose a connection, keep every user
waiting while one waits, and do not tell who left.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import threading
import time
from typing import Any

CONNECT_SECONDS = 10.0
MOST_STRANGERS, LONGEST_HELLO, LONGEST_MESSAGE = 64, 256, 1 << 20  # connections; bytes of a line
# Not `select`, which takes no descriptor above 1,023.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Board:
    """Rank 0 keeps the values, the others send theirs there as lines of JSON. Only some travel on to all.

    Whoever connects must say the secret of the run first, which is in the store. What else comes is dropped.

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
        self.strangers: dict[socket.socket, float] = {}  # who has not said the secret yet, and until when it may
        self.gone: set[int] = set()  # ranks whose connection ended
        self.listener: socket.socket | None = None
        if rank == 0:
            try:
                self.listener = listen(address)
            except OSError:
                store.set("board", "-")  # nobody waits for it
                raise
            self.token = secrets.token_hex(16)
            store.set("board", f"{self.listener.getsockname()[1]} {self.token}")
            return
        told = store.get("board").decode().split()
        if len(told) != 2:
            raise OSError("it could not listen")
        self.token = told[1]
        connection = socket.create_connection((address, int(told[0])), timeout=CONNECT_SECONDS)
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
        try:
            ready = readable([*self.peers, *filter(None, (self.listener, also))], seconds)
        except (OSError, ValueError, KeyError):  # closed meanwhile
            time.sleep(min(seconds, 0.05))
            return False
        for source in ready:
            if source is self.listener:
                self.accept()
            elif source is not also and source in self.peers:
                self.read(source)
        for stranger in [one for one, until in self.strangers.items() if until < time.monotonic()]:
            self.drop(stranger)
        return also in ready

    def accept(self) -> None:
        """Somebody connects. Of those that say nothing only so many are kept, so that descriptors do not run out."""
        assert self.listener is not None
        if len(self.strangers) >= MOST_STRANGERS:
            self.drop(next(iter(self.strangers)))
        try:
            connection = self.listener.accept()[0]
        except OSError:
            time.sleep(0.05)  # no descriptor is free: it would be reported as ready again at once
            return
        self.peers[connection], self.strangers[connection] = bytearray(), time.monotonic() + CONNECT_SECONDS

    def drop(self, connection: socket.socket) -> None:
        """Ends a connection; if it was that of a rank, the rank is gone."""
        with self.lock:  # the main thread may be sending to all
            self.peers.pop(connection, None)
            self.strangers.pop(connection, None)
            if (rank := self.ranks.pop(connection, None)) is not None:
                self.gone.add(rank)
        with contextlib.suppress(OSError):
            connection.close()

    def drain(self, rank: int) -> None:
        """Takes all that a process which has ended had sent."""
        for connection in [peer for peer, whose in self.ranks.items() if whose == rank]:
            while connection in self.peers and readable([connection], 0):
                self.read(connection)

    def read(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(1 << 16)
        *lines, rest = (self.peers[connection] + data).split(b"\n")
        self.peers[connection] = bytearray(rest)
        for line in lines:
            if connection in self.peers:
                self.hear(connection, bytes(line))
        limit = LONGEST_HELLO if connection in self.strangers else LONGEST_MESSAGE
        if connection in self.peers and (not data or len(rest) > limit):
            self.drop(connection)

    def hear(self, connection: socket.socket, line: bytes) -> None:
        """One line. A stranger is asked for the secret before anything of it is taken apart any further."""
        known = connection in self.ranks
        message = parsed(line, LONGEST_MESSAGE if known else LONGEST_HELLO)
        if known and message is not None:
            self.take(*message)
        elif not known and not self.welcome(connection, message):
            self.drop(connection)

    def welcome(self, connection: socket.socket, message: tuple[str, Any] | None) -> bool:
        """Is it a process of this run, which says so for the first time?"""
        key, value = message or ("", None)
        if key != "hello" or not isinstance(value, list) or [type(part) for part in value] != [int, str]:
            return False
        rank, token = value
        if (
            not hmac.compare_digest(token.encode(errors="replace"), self.token.encode())
            or rank < 1
            or rank in self.ranks.values()
        ):
            return False
        with self.lock:
            self.ranks[connection] = rank
            self.strangers.pop(connection, None)
            for key in ("verdict", "reported", "signal"):
                if key in self.values:
                    self.send(connection, key, self.values[key])
        return True

    def close(self) -> None:
        """Ends the connections; with something left unread they would be reset, and the others lose what was sent last."""
        if self.listener is not None:
            self.listener.close()
        deadline = time.monotonic() + 1
        for connection in self.peers:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        for connection in self.peers:
            with contextlib.suppress(OSError):
                while (left := deadline - time.monotonic()) > 0:
                    connection.settimeout(left)
                    if not connection.recv(1 << 16):
                        break
            connection.close()
        self.peers.clear()


def listen(address: str) -> socket.socket:
    """At a free port of that address."""
    family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server((str(place[0]), 0), family=family)
    except OSError:  # the address belongs to what forwards to this machine
        both = socket.has_dualstack_ipv6()
        any_family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", 0), family=any_family, dualstack_ipv6=both)


def readable(sources: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Those from which something can be read, once there are any."""
    with _Selector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ, source)
        return [key.data for key, _ in selector.select(seconds)]


def parsed(line: bytes, longest: int) -> tuple[str, Any] | None:
    """The key and value of a line, if it is one."""
    if len(line) > longest:
        return None
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, list) or len(message) != 2 or not isinstance(message[0], str):
        return None
    return message[0], message[1]
