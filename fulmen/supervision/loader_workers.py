"""What a worker of a `DataLoader` does that the main thread waits for: its process, its state, its place in the code."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from typing import Any

import torch

from fulmen.utilities.introspection import in_library

_LOADER = os.path.join(os.path.dirname(torch.__file__), "utils", "data", "dataloader.py")
_SIGNAL = getattr(signal, "SIGRTMAX", 0) - 3  # one that nobody else uses
_FRAME = re.compile(r'File "(.*?)", line (\d+) in (\S+)')
_STACKS = "fulmen-stacks-"  # the name of a file in memory, in which a process writes its stack when it is asked
_asks = False  # will somebody ask processes that are forked here?


def prepare() -> None:
    """From now on processes that are forked here can be asked what they do."""
    global _asks
    _asks = True


def answer() -> None:
    """In a worker: it can be asked. The handler is in C, and answers also while all of Python is stuck."""
    if _SIGNAL > 0 and hasattr(faulthandler, "register") and hasattr(os, "memfd_create"):
        with contextlib.suppress(Exception):
            faulthandler.register(_SIGNAL, os.memfd_create(f"{_STACKS}{os.getpid()}"), all_threads=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: answer() if _asks else None)


def waiting_for(frames: list[Any]) -> Any:
    """The frame in which a loader waits for one of its workers, if that is what a thread with these frames does."""
    return next((f for f in frames if f.f_code.co_filename == _LOADER and f.f_code.co_name == "_next_data"), None)


def looked_at(frame: Any) -> tuple[bool, str]:
    """Whether the worker that this frame waits for is stopped, or sleeps in the user's code; and which it is, in words."""
    iterator = frame.f_locals.get("self")
    number = (getattr(iterator, "_task_info", {}).get(getattr(iterator, "_rcvd_idx", None)) or [None])[0]
    if number is None:  # there is only this process
        return False, "the dataset"
    pid, dataset = iterator._workers[number].pid, type(iterator._dataset)
    reads = getattr(dataset, "__iter__" if hasattr(dataset, "__iter__") else "__getitem__", None)
    code = getattr(reads, "__code__", None)
    place = f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code is not None else ""
    named = f"worker {number} of the DataLoader, process {pid}, which reads `{dataset.__qualname__}`{place}"
    if process_state(pid) in ("T", "t"):
        return True, f"{named} and is stopped"
    stack = ask(pid)
    if not stack:
        return False, named
    own = next((entry for entry in stack if not in_library(entry[0])), stack[0])
    return own is stack[0], f"{named} and is in {os.path.basename(own[0])}:{own[1]} in {own[2]}"


def ended_early(frame: Any, seconds: float) -> str:
    """The worker of the loader in this frame whose process has ended, or does in a moment, in words."""
    found, deadline = list(getattr(frame.f_locals.get("self"), "_workers", ())), time.monotonic() + seconds
    while True:
        for number, worker in enumerate(found):
            if worker.exitcode is not None:
                return (
                    f"worker {number} of the DataLoader, process {worker.pid}, ended with exit code {worker.exitcode}"
                )
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.02)


def ask(pid: int) -> list[tuple[str, str, str]]:
    """The frames of a worker, as (file, line, function), innermost first; none if it cannot be asked."""
    try:
        names = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
        place = next(name for name in names if os.readlink(name).startswith(f"/memfd:{_STACKS}{pid} "))
        with open(place, "rb") as file:
            before = file.seek(0, os.SEEK_END)
            os.kill(pid, _SIGNAL)
            text, deadline = b"", time.monotonic() + 0.5
            while time.monotonic() < deadline:
                time.sleep(0.02)
                file.seek(before)
                found = file.read()
                if found and found == text:  # all of it is there
                    break
                text = found
    except (OSError, StopIteration):
        return []
    return _FRAME.findall(text.decode(errors="replace"))


def waits_outside(task: int | None) -> bool:
    """Does a thread of this process wait for a disk, or for a program that it started, as `os.system` does?"""
    found = ""
    for name in ("stat", "wchan"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/{name}") as file:
            found += file.read().rpartition(")")[2] + " "
    state, wchan = (found.split() or [""])[0], (found.split() or [""])[-1]
    return state == "D" or wchan.startswith("do_wait")


def process_state(pid: int) -> str:
    """The state of a process of this machine as one letter, of which T is stopped and Z dead; or "gone"."""
    try:
        if os.path.exists("/proc/self/stat"):
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0]
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        pass
    return "S"
