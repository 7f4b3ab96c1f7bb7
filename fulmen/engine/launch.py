"""What both launchers share: the environment of started processes, their threads, signals, and how they end.

`script_launcher` runs the command line again, `process_launcher` a function in processes of `multiprocessing`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from fulmen.supervision.processes import process_state
from fulmen.supervision.reports import write_stderr
from fulmen.supervision.watchdog import on_parent_exit
from fulmen.utilities.console import is_interactive as is_interactive
from fulmen.utilities.errors import INTERRUPTED as INTERRUPTED

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy

GRACE_SECONDS = 5.0  # between asking a process to end and killing it
PARENT = "FULMEN_PARENT"  # the environment variable with the id of the process that started this one
_KNOWN_PARENT = "FULMEN_KNOWN_PARENT"  # the same, once this process watches over it


ReportError = Callable[
    [BaseException, str, bool], None
]  # the error, its traceback, and if another process had it first


class Launcher(Protocol):
    """Starts the processes of a run."""

    runs_elsewhere: bool  # is the process that calls `launch` none of those of the run?

    @property
    def is_interactive_compatible(self) -> bool: ...

    def end_if_asleep(self) -> AbstractContextManager[None]:
        """Inside, this process is ended if what is told of a failed run falls asleep."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: ResultOwner) -> Any: ...


class ResultOwner(Protocol):
    """Whose run is launched, a Trainer's or that of Fabric: it knows how results travel from the process of rank 0 to the one that launched it."""

    @property
    def strategy(self) -> Strategy: ...

    def pack_results(self) -> Any: ...

    def unpack_results(self, packed: Any) -> None: ...


class RunningProcess(NamedTuple):
    """A started process: its id, and a function that returns its exit code, or None while it runs."""

    pid: int
    poll: Callable[[], int | None]


def divide_cpu_threads(count: int) -> None:
    """Limits torch to this process's part of the processors of a node with ``count`` processes.

    Nothing changes if OMP_NUM_THREADS is set.
    """
    if "OMP_NUM_THREADS" not in os.environ and count > 1:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, available // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def set_environment(variables: dict[str, str]) -> Iterator[None]:
    """Inside, these environment variables are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------- the process that started this one


def end_with_parent() -> None:
    """In a process that a launcher started: from now on it ends when that one ends."""
    if (started_by := os.environ.pop(PARENT, None)) is None:
        return
    parent = int(started_by)
    os.environ[_KNOWN_PARENT] = str(parent)
    threading.Thread(target=_exit_after_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def signal_launcher() -> None:
    """SIGTERM came to this process: whoever started it passes it on to all."""
    parent = os.environ.get(_KNOWN_PARENT)
    if parent is not None and os.getppid() == int(parent):
        os.kill(int(parent), signal.SIGTERM)


def _exit_after_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    on_parent_exit()  # says so, and closes what is open
    os._exit(1)


# ---------------------------------------------------------------------- ending


class StoppedProcessKiller:
    """Kills processes that are stopped (as by SIGSTOP) for longer than a run may stand still.

    Arguments:
        limit_s: how long that is, in seconds; 0 is for ever.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.stopped_since: dict[int, float] = {}
        self.last_check = 0.0

    def check(self, processes: dict[int, int]) -> None:
        """Looks at the processes that run; their ids by rank."""
        now = time.monotonic()
        if now - self.last_check > 5:  # this one was stopped too, as by Ctrl-Z
            self.stopped_since.clear()
        self.last_check = now
        for rank, pid in processes.items():
            if process_state(pid) != "T":
                self.stopped_since.pop(rank, None)
            elif now - self.stopped_since.setdefault(rank, now) > self.limit_s > 0:
                write_stderr(
                    f"Rank {rank} has done nothing for {self.limit_s:g} s: its process {pid} is stopped, and is ended now."
                )
                os.kill(pid, signal.SIGKILL)


def describe_exit_code(code: int) -> str:
    """An exit code of `subprocess` or `multiprocessing` in words.

    >>> describe_exit_code(3), describe_exit_code(-9)
    ('ended with exit code 3', 'was ended by SIGKILL')
    """
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def terminate_processes(processes: list[RunningProcess]) -> None:
    """Asks each process to end; those that do not are killed after `GRACE_SECONDS`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [process for process in processes if process.poll() is None]
        if not running:
            return
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        wait_for_exits([process.poll for process in running], GRACE_SECONDS)


def wait_for_exits(polls: list[Callable[[], Any]], timeout_s: float) -> None:
    """Waits until no function of `polls` returns None, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while any(poll() is None for poll in polls) and time.monotonic() < deadline:
        time.sleep(0.05)


def exit_now(code: int) -> None:
    """Ends this process without waiting for its threads, with what was written flushed."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
