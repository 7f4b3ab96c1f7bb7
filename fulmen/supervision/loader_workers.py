"""The worker of a `DataLoader` that the main thread waits for: its process, its state, and what it executes."""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import os
import re
import signal
import time
from types import FrameType
from typing import Any, NamedTuple

import torch

from fulmen.supervision.processes import STOPPED, process_state
from fulmen.utilities.introspection import in_library

_LOADER = os.path.join(os.path.dirname(torch.__file__), "utils", "data", "dataloader.py")
_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else 0  # one that nobody else uses
_FRAME = re.compile(r'File "(.*?)", line (\d+) in (\S+)')
_STACKS = "fulmen-stacks-"  # the name of a file in memory, in which a process writes its stack when it is asked
_dumps_in_forks = False


class WorkerStatus(NamedTuple):
    """Of the worker that a loader waits for."""

    is_stuck: bool  # it is stopped, or sleeps in the user's code
    description: str


class WorkerFrame(NamedTuple):
    """One entry of the stack of a worker."""

    file: str
    line: str
    function: str


def enable_stack_dumps() -> None:
    """From now on processes that are forked here write their stacks when they are asked."""
    global _dumps_in_forks
    _dumps_in_forks = True


def install_stack_handler() -> None:
    """In a worker: it can be asked for its stack. The handler is in C, and answers also while all of Python is stuck."""
    if _SIGNAL > 0 and hasattr(faulthandler, "register") and hasattr(os, "memfd_create"):
        with contextlib.suppress(Exception):
            faulthandler.register(_SIGNAL, os.memfd_create(f"{_STACKS}{os.getpid()}"), all_threads=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: install_stack_handler() if _dumps_in_forks else None)


def find_loader_frame(frames: list[FrameType]) -> FrameType | None:
    """The frame in which a loader waits for one of its workers, if that is what a thread with these frames does."""
    return next((f for f in frames if f.f_code.co_filename == _LOADER and f.f_code.co_name == "_next_data"), None)


def inspect_worker(frame: FrameType) -> WorkerStatus:
    """The worker that this frame of a loader waits for."""
    iterator = iterator_attributes(frame)
    number = (iterator.get("_task_info", {}).get(iterator.get("_rcvd_idx")) or [None])[0]
    if number is None:  # there is only this process
        return WorkerStatus(False, "the dataset")
    pid = iterator["_workers"][number].pid
    dataset = type(iterator["_dataset"])
    reads = _reading_method(dataset)
    place = ""
    if inspect.isfunction(reads):
        place = f" ({os.path.basename(reads.__code__.co_filename)}:{reads.__code__.co_firstlineno})"
    named = f"worker {number} of the DataLoader, process {pid}, which reads `{dataset.__qualname__}`{place}"
    if process_state(pid) in STOPPED:
        return WorkerStatus(True, f"{named} and is stopped")
    stack = read_worker_stack(pid)
    if not stack:
        return WorkerStatus(False, named)
    own = next((entry for entry in stack if not in_library(entry.file)), stack[0])
    location = f"{os.path.basename(own.file)}:{own.line} in {own.function}"
    return WorkerStatus(own is stack[0], f"{named} and is in {location}")


def _reading_method(dataset: type) -> object:
    """What gives the samples of a dataset of this class."""
    if hasattr(dataset, "__iter__"):
        return dataset.__iter__
    return dataset.__getitem__ if hasattr(dataset, "__getitem__") else None


def describe_exited_worker(frame: FrameType, seconds: float) -> str:
    """The worker of the loader in this frame whose process has ended, or does within these seconds, in words."""
    workers = list(iterator_attributes(frame).get("_workers", ()))
    deadline = time.monotonic() + seconds
    while True:
        for number, worker in enumerate(workers):
            if worker.exitcode is not None:
                named = f"worker {number} of the DataLoader, process {worker.pid}"
                return f"{named}, ended with exit code {worker.exitcode}"
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.02)


def iterator_attributes(frame: FrameType) -> dict[str, Any]:
    """Those of the iterator of a loader whose method this frame is; one without workers has fewer."""
    iterator: object = frame.f_locals["self"]
    return vars(iterator)


def read_worker_stack(pid: int) -> list[WorkerFrame]:
    """The frames of a worker, innermost first; none if it cannot be asked."""
    try:
        names = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
        path = next(name for name in names if os.readlink(name).startswith(f"/memfd:{_STACKS}{pid} "))
        with open(path, "rb") as file:
            before = file.seek(0, os.SEEK_END)
            os.kill(pid, _SIGNAL)
            text = b""
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                time.sleep(0.02)
                file.seek(before)
                found = file.read()
                if found and found == text:  # all of it is there
                    break
                text = found
    except (OSError, StopIteration):
        return []
    return [WorkerFrame(*entry) for entry in _FRAME.findall(text.decode(errors="replace"))]
