"""What is printed of a failure, by whom, and the mark on an exception that keeps it from being printed twice."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from fulmen.supervision.heartbeat import StatusChannel
from fulmen.supervision.messages import FailureKind, Verdict
from fulmen.supervision.stack_sampler import ThreadProbe, strip_library_frames

if TYPE_CHECKING:
    from fulmen.supervision.protocols import SupervisedRun


class FailureReporter:
    """Prints, once, what one process has to say of a failure."""

    def __init__(self, channel: StatusChannel, size: int, run: SupervisedRun, probe: ThreadProbe) -> None:
        self.channel = channel
        self.rank = channel.rank
        self.size = size
        self.run = run
        self.probe = probe
        self._claim = threading.Lock()  # taken by whoever prints
        self._printed = threading.Event()

    def print_report(self, verdict: Verdict) -> None:
        """Who failed and how, where the others wait, and the stack. On the rank whose verdict counts."""
        if not self._claim.acquire(blocking=False):
            return
        if verdict.kind is FailureKind.EXIT:
            self._printed.set()
            return
        waiting: dict[str, list[int]] = {}
        deadline = time.monotonic() + 3
        for rank in range(self.size):
            if rank == verdict.rank:
                continue
            own = rank == self.rank
            location = self.describe_location() if own else self.channel.wait_for(f"location/{rank}", deadline)
            if location is not None:
                waiting.setdefault(str(location), []).append(rank)
        lines = [verdict.reason]
        for location, ranks in waiting.items():
            lines.append(f"{'Ranks' if len(ranks) > 1 else 'Rank'} {format_ranks(ranks)}: {location}")
        if verdict.stack:
            lines.append(verdict.stack.rstrip())
        write_stderr("\n".join(lines))
        self._printed.set()
        self.channel.publish_value("reported", True)
        if verdict.stopped_pid:
            with contextlib.suppress(OSError):
                os.kill(verdict.stopped_pid, signal.SIGKILL)

    def print_follow_up(self, verdict: Verdict | None, more: str = "") -> None:
        """One line from each rank that ends because of another, after the report."""
        self.publish_location()
        if verdict is None or verdict.rank == self.rank or verdict.kind is FailureKind.EXIT:
            return
        if self._claim.acquire(blocking=False):
            self.channel.wait_for("reported", time.monotonic() + 3)
            write_stderr(f"Rank {self.rank} ends because of rank {verdict.rank}.{more}")
            self._printed.set()

    def print_alone(self, verdict: Verdict) -> None:
        """What cannot be told to others; if somebody prints here already, until that is out."""
        if self._claim.acquire(blocking=False):
            write_stderr(f"{verdict.reason}\nRank {self.rank}: {self.describe_location()}")
        else:
            self._printed.wait(4.0)

    def describe_location(self) -> str:
        """Where this rank is."""
        last = self.probe.last
        return f"{'waits' if last.collective else 'is'} in {last.location} ({self.run.describe_position()})"

    def publish_location(self) -> None:
        self.channel.publish_value(f"location/{self.rank}", self.describe_location())

    def await_acks(self) -> None:
        """Until all others have said where they are: they have heard of the verdict."""
        deadline = time.monotonic() + 3
        for rank in range(1, self.size):
            if rank not in self.channel.gone:
                self.channel.wait_for(f"location/{rank}", deadline)


class ReportMark(NamedTuple):
    """An error was printed."""

    by_this_process: bool
    is_consequence: bool  # of the failure of another rank


def mark_reported(error: BaseException, by_this_process: bool = True, is_consequence: bool = False) -> None:
    """The error has been printed: the script that it ends prints it no more, or only where it was raised here."""
    with contextlib.suppress(AttributeError):
        error._fulmen_report = ReportMark(by_this_process, is_consequence)  # type: ignore[attr-defined]


def report_mark(error: BaseException) -> ReportMark | None:
    """None if it has not been printed, by this process or another."""
    return error._fulmen_report if hasattr(error, "_fulmen_report") else None


def is_consequence(error: BaseException) -> bool:
    """Does it only say that another rank failed?"""
    mark = report_mark(error)
    return mark is not None and mark.is_consequence


def install_excepthook() -> None:
    """An error that was reported is not printed again when it ends the script."""
    if not isinstance(sys.excepthook, _ExceptHook):
        sys.excepthook = _ExceptHook()


class _ExceptHook:
    def __init__(self) -> None:
        self.before = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        mark = report_mark(error)
        if mark is None:
            self.before(kind, error, trace)
        elif not mark.by_this_process:  # only the place here is new
            write_stderr(strip_library_frames("".join(traceback.format_exception(kind, error, trace, chain=False))))


def format_ranks(ranks: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def write_stderr(text: str) -> None:
    """In one piece, whatever happens to be there."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n" if text else "")
        sys.stderr.flush()
