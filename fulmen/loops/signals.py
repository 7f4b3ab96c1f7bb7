"""Signals during a run: the first one is noted, and obeyed at the next boundary of a step (`loops/preemption.py`)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from fulmen.engine.cluster import SLURMEnvironment
from fulmen.engine.launch import INTERRUPTED, is_interactive
from fulmen.utilities.errors import SIGTERMException
from fulmen.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # the exit status of whoever was told to end, by convention


class Signals:
    """Installs our handlers for the time of a run, and puts the user's back."""

    def __init__(self) -> None:
        self.received_sigterm = False
        self.pending: int | None = None  # the signal because of which the run ends at the next boundary
        self.saving = False  # is the file being written with which the run ends?
        self.saved = ""  # that file
        self.cluster: SLURMEnvironment | None = None  # who gives the job another turn
        self._interrupted = False  # was Ctrl-C pressed in this process?
        self._looping = False  # does a loop run that looks at `pending`?
        self._before: dict[int, Any] = {}
        self._process = 0

    def install(self, cluster: Any = None) -> None:
        """Before the loop begins SIGTERM ends the run at once: there is nothing to finish. Main thread only.

        Arguments:
            cluster: an environment that can requeue the job; its signal is heard as well.
        """
        self.received_sigterm = self.saving = self._looping = False
        self._interrupted, self.pending, self.saved, self._process = False, None, "", os.getpid()
        requeues = isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue and cluster.requeue_signal is not None
        self.cluster = cluster if requeues else None
        for number in (signal.SIGTERM, self.cluster.requeue_signal if self.cluster else None):
            self._handle(number, self._on_signal)

    def defer(self) -> None:
        """A loop begins, which ends at a boundary. Ctrl-C, too, is told to it, unless the user handles it."""
        self._looping = True
        if self.pending is not None:  # another process was told, or an `except:` of somebody's caught the exception
            raise self.exception()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handle(signal.SIGINT, self._on_interrupt)

    def restore(self) -> None:
        """The handlers as they were before the run."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def ignore_interrupts(self) -> None:
        """A second Ctrl-C would tear what is being closed now."""
        self._handle(signal.SIGINT, signal.SIG_IGN)

    @property
    def requeueing(self) -> bool:
        """Does the run end because the job gets another turn?"""
        return self.cluster is not None and self.pending == self.cluster.requeue_signal

    def requeue(self) -> None:
        """The last thing a run does: its job may be killed for it."""
        if self.cluster is not None and self.requeueing:
            self.cluster.requeue()

    def request_stop(self, number: int) -> bool:
        """The run ends at the next boundary because of this signal; False if it does because of another."""
        if self.pending is not None:
            return False
        self.pending = number
        return True

    def exception(self) -> BaseException:
        """What ends the run."""
        return KeyboardInterrupt() if self.pending == signal.SIGINT else SIGTERMException(TERMINATED)

    def behind(self, error: BaseException) -> BaseException:
        """The interrupt, if that is why a loader's worker ended before the step did: a terminal tells it to all."""
        worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        return self.exception() if worker and self.pending == signal.SIGINT else error

    def obey(self) -> None:
        """Everything is closed: a signal that came too late to stop anything still ends the script."""
        if self.pending == signal.SIGINT and not is_interactive():
            sys.exit(INTERRUPTED)
        if self.pending is not None:
            raise self.exception()

    def ours(self, number: int) -> bool:
        """Does the run end by itself when this signal comes?"""
        handler = signal.getsignal(number)
        return getattr(handler, "__self__", None) is self or handler is signal.default_int_handler

    def _handle(self, number: Any, handler: Any) -> None:
        if number is not None and threading.current_thread() is threading.main_thread():
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if os.getpid() != self._process:  # a child that inherited the handler: not its run
            signal.signal(number, before if before is not None else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received_sigterm = self.received_sigterm or number == signal.SIGTERM
        if self.request_stop(number):
            self._say(f"Received {signal.Signals(number).name}: the run ends after the current step.")
        if callable(before):
            before(number, frame)
        if not self._looping:
            raise self.exception()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker in the terminal's group: the step needs its batches
            return
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self.request_stop(number)
        self._say("Ctrl-C: the run ends after the current step. Press it again to stop at once.")

    def _say(self, text: str) -> None:
        if getattr(rank_zero_only, "rank", 0) == 0:
            with contextlib.suppress(OSError):  # there may be no stderr
                os.write(2, f"{text}\n".encode())  # a logger may be in the middle of a line, and is not entered twice
