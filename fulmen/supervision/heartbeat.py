"""`StatusChannel`: heartbeats, verdicts and a few more values, between all processes of a run.

Its connections show when a process is gone. A store of `torch.distributed` does not tell who left, prints the stack of
its C++ code when it loses a connection, and keeps every user waiting while one waits.
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
from typing import TYPE_CHECKING, NamedTuple, cast

from fulmen.supervision.messages import VALUE_TYPES, Heartbeat, Verdict, parse_value

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_SECONDS = 10.0
MAX_STRANGERS = 64
MAX_HELLO_BYTES = 256
MAX_MESSAGE_BYTES = 1 << 20
# Not `select`, which takes no descriptor above 1,023.
_Selector = selectors.PollSelector if hasattr(selectors, "PollSelector") else selectors.SelectSelector


class Message(NamedTuple):
    """One line that came over a connection, with a value of any shape."""

    key: str
    value: object


class StatusChannel:
    """Rank 0 keeps the values, the others send theirs there as lines of JSON. Only some are forwarded to all.

    Whoever connects must say the secret of the run first, which is in the store. What else comes is dropped, and so are
    values of unknown keys or of other types than `VALUE_TYPES` has.

    Arguments:
        store: where rank 0 writes its port, once.
        address: the host of rank 0 as others reach it.

    Raises:
        OSError: rank 0 cannot be reached.
    """

    def __init__(self, rank: int, store: Store, address: str) -> None:
        self.rank = rank
        self.values: dict[str, object] = {}
        self.lock = threading.RLock()
        self.peers: dict[socket.socket, bytearray] = {}  # what came from them and is no whole line yet
        self.ranks: dict[socket.socket, int] = {}
        self.strangers: dict[socket.socket, float] = {}  # who has not said the secret yet, and until when it may
        self.gone: set[int] = set()  # ranks whose connection ended
        self.listener: socket.socket | None = None
        self.reader = 0  # the thread that polls
        if rank == 0:
            try:
                self.listener = open_listener(address)
            except OSError:
                store.set("channel", "-")  # nobody waits for it
                raise
            self.token = secrets.token_hex(16)
            store.set("channel", f"{self.listener.getsockname()[1]} {self.token}")
            return
        port, _, self.token = store.get("channel").decode().partition(" ")
        if not self.token:
            raise OSError("it could not listen")
        connection = socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS)
        self.ranks[connection] = 0
        self.peers[connection] = bytearray()
        self.send_message(connection, "hello", [rank, self.token])

    @property
    def verdict(self) -> Verdict | None:
        """The first that was published by any rank."""
        return cast("Verdict | None", self.values.get("verdict"))

    def last_heartbeat(self, rank: int) -> Heartbeat | None:
        return cast("Heartbeat | None", self.values.get(f"heartbeat/{rank}"))

    def publish_value(self, key: str, value: object) -> None:
        """Tells rank 0; a "verdict" counts only if it is the first."""
        if self.rank == 0:
            self.store_value(key, value)
        else:
            for connection in list(self.peers):
                self.send_message(connection, key, value)

    def store_value(self, key: str, value: object) -> None:
        """Keeps a value, and on rank 0 forwards it to whom it concerns."""
        with self.lock:
            if key == "verdict" and key in self.values:
                return
            self.values[key] = value
            if self.rank != 0:
                return
            receivers: set[int] = set()
            if key in ("verdict", "reported", "signal", "heartbeat/0") or key.startswith("closed/"):
                receivers.update(self.ranks.values())
            elif key.startswith("location/") and self.verdict is not None:
                receivers.add(self.verdict.reporter)
            for connection in [peer for peer, rank in self.ranks.items() if rank in receivers]:
                self.send_message(connection, key, value)

    def send_message(self, connection: socket.socket, key: str, value: object) -> None:
        with self.lock, contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.sendall(json.dumps([key, value], default=vars).encode() + b"\n")

    def poll_connections(self, seconds: float, also: socket.socket | None = None) -> bool:
        """Reads what arrives, for at most so long; whether something can be read from `also`. For one thread only."""
        self.reader = threading.get_ident()
        try:
            ready = ready_sockets([*self.peers, *filter(None, (self.listener, also))], seconds)
        except (OSError, ValueError, KeyError):  # closed meanwhile
            time.sleep(min(seconds, 0.05))
            return False
        for source in ready:
            if source is self.listener:
                self.accept_stranger(source)
            elif source is not also and source in self.peers:
                self.read_connection(source)
        for stranger in [one for one, until in self.strangers.items() if until < time.monotonic()]:
            self.drop_connection(stranger)
        return also in ready

    def wait_for(self, key: str, deadline: float) -> object:
        """The value that is published under this key; None if it does not come."""
        while (found := self.values.get(key)) is None and time.monotonic() < deadline:
            if self.rank != 0 and not self.peers:
                break
            self.wait_polling(0.02)
        return found

    def wait_polling(self, seconds: float) -> None:
        """Lets time pass, in which values arrive: the thread that polls must do so meanwhile."""
        if threading.get_ident() == self.reader:
            self.poll_connections(seconds)
        else:
            time.sleep(seconds)

    def accept_stranger(self, listener: socket.socket) -> None:
        """Somebody connects. Of those that say nothing only so many are kept, so that descriptors do not run out."""
        if len(self.strangers) >= MAX_STRANGERS:
            self.drop_connection(next(iter(self.strangers)))
        try:
            connection = listener.accept()[0]
        except OSError:
            time.sleep(0.05)  # no descriptor is free: it would be reported as ready again at once
            return
        self.peers[connection] = bytearray()
        self.strangers[connection] = time.monotonic() + CONNECT_SECONDS

    def drop_connection(self, connection: socket.socket) -> None:
        """Ends a connection; if it was that of a rank, the rank is gone."""
        with self.lock:  # the main thread may be sending to all
            self.peers.pop(connection, None)
            self.strangers.pop(connection, None)
            if (rank := self.ranks.pop(connection, None)) is not None:
                self.gone.add(rank)
        with contextlib.suppress(OSError):
            connection.close()

    def read_remaining(self, rank: int) -> None:
        """Reads all that a process which has ended had sent."""
        for connection in [peer for peer, whose in self.ranks.items() if whose == rank]:
            while connection in self.peers and ready_sockets([connection], 0):
                self.read_connection(connection)

    def read_connection(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(1 << 16)
        *lines, rest = (self.peers[connection] + data).split(b"\n")
        self.peers[connection] = bytearray(rest)
        for line in lines:
            if connection in self.peers:
                self.handle_line(connection, bytes(line))
        limit = MAX_HELLO_BYTES if connection in self.strangers else MAX_MESSAGE_BYTES
        if connection in self.peers and (not data or len(rest) > limit):
            self.drop_connection(connection)

    def handle_line(self, connection: socket.socket, line: bytes) -> None:
        """One line. A stranger is asked for the secret before anything of it is taken apart any further."""
        if connection not in self.ranks:
            if not self.admit_rank(connection, parse_line(line, MAX_HELLO_BYTES)):
                self.drop_connection(connection)
        elif message := parse_line(line, MAX_MESSAGE_BYTES):
            kind = VALUE_TYPES.get(message.key.partition("/")[0])
            value = None if kind is None else parse_value(kind, message.value)
            if value is not None:
                self.store_value(message.key, value)

    def admit_rank(self, connection: socket.socket, message: Message | None) -> bool:
        """Is it a process of this run, which says so for the first time?"""
        if message is None or message.key != "hello" or not isinstance(message.value, list):
            return False
        if [type(part) for part in message.value] != [int, str]:
            return False
        rank, token = message.value
        knows_secret = hmac.compare_digest(token.encode(errors="replace"), self.token.encode())
        if not knows_secret or rank < 1 or rank in self.ranks.values():
            return False
        with self.lock:
            self.ranks[connection] = rank
            self.strangers.pop(connection, None)
            for key in ("verdict", "reported", "signal"):
                if key in self.values:
                    self.send_message(connection, key, self.values[key])
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


def open_listener(address: str) -> socket.socket:
    """At a free port of that address."""
    family, *_, found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server((str(found[0]), 0), family=family)
    except OSError:  # the address belongs to what forwards to this machine
        both = socket.has_dualstack_ipv6()
        any_family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", 0), family=any_family, dualstack_ipv6=both)


def ready_sockets(sources: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Those from which something can be read, once there are any."""
    with _Selector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ, source)
        return [key.data for key, _ in selector.select(seconds)]


def parse_line(line: bytes, max_bytes: int) -> Message | None:
    """The key and value of a line, if it is one."""
    if len(line) > max_bytes:
        return None
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, list) or len(message) != 2 or not isinstance(message[0], str):
        return None
    return Message(*message)
