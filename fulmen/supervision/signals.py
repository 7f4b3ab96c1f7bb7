"""`SignalMonitor`: hears of signals whatever the main thread is doing, which alone could run their handlers."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fulmen.supervision.heartbeat import StatusChannel
    from fulmen.supervision.protocols import SupervisedRun


class ReceivedSignal(NamedTuple):
    """SIGTERM or SIGINT, to this process or another."""

    number: int
    at: float


class SignalMonitor:
    """Of one process: passes signals on to all, and what others pass on to the run here."""

    def __init__(self, run: SupervisedRun, channel: StatusChannel) -> None:
        self.run = run
        self.channel = channel
        self.received: ReceivedSignal | None = None  # the main thread has some seconds from then on
        self.socket: socket.socket | None = None  # where the numbers of signals can be read
        self._wakeup: socket.socket | None = None  # where the interpreter writes them
        self._wakeup_before = -1

    def install_wakeup(self) -> None:
        """Only the main thread can do that."""
        if threading.current_thread() is threading.main_thread():
            self.socket, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def restore_wakeup(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.set_wakeup_fd(self._wakeup_before)

    def read_numbers(self) -> bytes:
        """Of the signals that have come."""
        return b"" if self.socket is None else self.socket.recv(64)

    def on_signals(self, numbers: bytes) -> None:
        """Signals have come to this process: all processes hear of them."""
        for number in numbers:
            handled = number == signal.SIGTERM or self.run.handles_signal(number)
            if handled and self.received is None:
                self.channel.publish_value("signal", number)
                self._note_signal(number)

    def on_remote_signal(self) -> None:
        """A signal has come to another process: it ends there only if all end."""
        number = self.channel.values.get("signal")
        if isinstance(number, int) and self.run.request_stop(number):
            self._note_signal(number)

    def _note_signal(self, number: int) -> None:
        if self.received is None and number in (signal.SIGTERM, signal.SIGINT):
            self.received = ReceivedSignal(number, time.monotonic())
