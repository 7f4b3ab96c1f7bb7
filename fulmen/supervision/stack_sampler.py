"""What a thread is doing, where an error came from, and tracebacks without the frames of libraries."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import sys
import threading
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from fulmen.supervision import loader_workers
from fulmen.utilities.introspection import in_library

_TORCH, _FULMEN = os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__))
_STANDARD = os.path.dirname(os.__file__)
_COLLECTIVES = tuple(
    os.path.join(_TORCH, *path) for path in (("distributed", ""), ("nn", "parallel", "distributed.py"))
)
_EXCHANGES = tuple(os.path.join(_FULMEN, "engine", name) for name in ("parallel.py", "collectives.py"))
_BACKWARD = os.path.join(_TORCH, "autograd", "graph.py")
_LOOPS = os.path.join(_FULMEN, "loops", "")
_RUN = (_LOOPS, os.path.join(_FULMEN, "trainer.py"))  # what is on the stack while a run is, in its hooks too
_PLUMBING = tuple(
    os.path.join(_STANDARD, *path)
    for path in (
        ("contextlib.py",),
        ("threading.py",),
        ("multiprocessing", "process.py"),
        ("multiprocessing", "spawn.py"),
    )
)
_WAITS = tuple(os.path.join(_STANDARD, name) for name in ("threading.py", "queue.py"))
_FRAME = re.compile(r'  File "(.*?)", line (\d+), in (\S+)')
_BROKEN = re.compile(r"(?i)connection|peer|broken pipe|timed? ?out|socket|gloo|nccl|abort")
_DEBUGGERS = ("pdb.py", "bdb.py", "pydevd.py", "debugger.py")
IN_BACKWARD = "the backward pass, where gradients are exchanged"


class Sample:
    """What the main thread does, and since when it does just that."""

    def __init__(self) -> None:
        self.key: Any = None
        self.seq, self.frozen_at = -1, time.monotonic()
        self.moved_at = self.idle_at = self.frozen_at
        self.used = 0.0  # processor time at `idle_at`
        self.frozen = 0.0
        self.last: dict[str, Any] = {"kind": "busy", "what": "", "where": "", "seq": 0, "frozen": 0.0, "since": 0.0}

    def take(self, thread: threading.Thread, patience: float) -> dict[str, Any]:
        """Looks at it now.

        Returns:
            kind: "waiting" in a collective, "asleep" in the user's code, here or in the loader's worker that it waits
                for, idle "outside" of it, or "busy".
            what, where: the collective; the place in the source.
            seq: how many collectives this process has begun.
            frozen, since: seconds in this very place, and idle if asleep or outside; seconds since the last collective.
        """
        frames, frame = [], sys._current_frames().get(thread.ident or 0)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        now, seq = time.monotonic(), collectives_begun()
        loader = loader_workers.waiting_for(frames)
        outer = frames[frames.index(loader) :] if loader is not None else frames  # it looks around now and then
        key = [(id(frame.f_code), frame.f_lasti) for frame in outer]
        if seq != self.seq:
            self.moved_at = now
        if key != self.key or seq != self.seq:
            self.key, self.seq, self.frozen_at = key, seq, now
            self.idle_at, self.used = now, cpu_seconds()
        self.frozen = now - self.frozen_at
        idle = (used := cpu_seconds()) - self.used < 0.02 * (now - self.idle_at) + 0.05
        if not idle:
            self.idle_at, self.used = now, used
        what, where = doing(frames)
        own = bool(frames) and (not in_library(frames[0].f_code.co_filename) or only_waits(frames, thread))
        own = own and not (self.frozen > patience / 2 and loader_workers.waits_outside(thread.native_id))
        if loader is not None and idle and self.frozen > patience / 2:
            own, worker = loader_workers.looked_at(loader)
            where = f"{where}, waiting for {worker}"
        files = [frame.f_code.co_filename for frame in frames]
        runs = any(file.startswith(_RUN if own else _LOOPS) for file in files)
        debugged = any(file.endswith(_DEBUGGERS) for file in files)
        kind = "busy" if not idle or not runs or debugged else "asleep" if own else "outside"
        if what and (idle or what != IN_BACKWARD):  # a backward pass may also compute
            kind = "waiting"
        elif kind != "busy":  # the time before, when it or what it started computed, does not count
            self.frozen = now - self.idle_at
        stack = ""
        if now - self.moved_at > patience / 2:
            found = traceback.StackSummary.extract(((f, f.f_lineno or 0) for f in reversed(frames)), lookup_lines=True)
            stack = readable("Stack (most recent call last):\n" + "".join(found.format()))
        self.last = {
            "kind": kind, "what": what, "where": where, "seq": seq, "frozen": self.frozen,
            "since": now - self.moved_at, "stack": bounded(stack),
        }  # fmt: skip
        return dict(self.last)

    def overslept(self, thread: threading.Thread, patience: float) -> bool:
        """Does it sleep in the user's code for longer than that?"""
        told = self.take(thread, patience)
        return bool(told["kind"] == "asleep" and told["frozen"] > patience)


def only_waits(frames: list[Any], thread: threading.Thread) -> bool:
    """Does this thread wait for another one of which none could wait for a disk or a network?"""
    if not frames[0].f_code.co_filename.startswith(_WAITS):
        return False
    passive = {thread.ident, threading.get_ident()}
    tops = [frame.f_code.co_filename for ident, frame in sys._current_frames().items() if ident not in passive]
    return all(file.startswith((*_WAITS, _FULMEN)) or not in_library(file) for file in tops)


def doing(frames: list[Any]) -> tuple[str, str]:
    """Which collective the innermost frames belong to, if any; and the place."""
    what = ""
    outside = next((i for i, frame in enumerate(frames) if not frame.f_code.co_filename.startswith(_TORCH)), 0)
    for frame in frames[:outside]:
        file = frame.f_code.co_filename
        if file.startswith(_COLLECTIVES) and not file.endswith("c10d_logger.py"):
            what = frame.f_code.co_name  # the outermost of them, which was called
        elif file == _BACKWARD:
            what = IN_BACKWARD
    if not what and frames and frames[0].f_code.co_filename in _EXCHANGES:  # in the store of the group
        what = frames[0].f_code.co_name
    own = next((frame for frame in frames if not in_library(frame.f_code.co_filename)), None)
    if what:
        return what, f"{what}, called at {place(own or frames[outside])}"
    nearest = own if own is not None else frames[0] if frames else None
    if nearest is None:
        return "", "no Python code"
    line = linecache.getline(nearest.f_code.co_filename, nearest.f_lineno or 0).strip()[:200]
    inside = f", inside of {place(frames[0])}" if nearest is not frames[0] else ""
    return "", f"{place(nearest)}{f': `{line}`' if line else ''}{inside}"


def place(frame: Any, line: int | None = None) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line or frame.f_lineno} in {frame.f_code.co_name}"


def frames_of(error: BaseException) -> list[Any]:
    """The frames that an error went through, and those around where it is handled; innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    frame = frames[-1].f_back if frames else sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def origin(error: BaseException) -> str:
    """The last place in the user's code that an error came through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not in_library(frame.f_code.co_filename):
            return place(frame, line)
    for file, line, name in reversed(_FRAME.findall(str(error))):  # of a loader's worker
        if not in_library(file):
            return f"{os.path.basename(file)}:{line} in {name}"
    return doing(frames_of(error))[1]


def collectives_begun() -> int:
    """By this process, in the group of all; also those that the device has still to do."""
    try:
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return 0


def cpu_seconds() -> float:
    """Of this process without the thread that asks and, where that is told, of those that it started."""
    total, todo = time.process_time() - time.thread_time(), _children(os.getpid())
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat") as file:
                numbers = file.read().rpartition(")")[2].split()
            total += (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
            todo += _children(pid)
    return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def because_of_others(error: BaseException) -> bool:
    """Did a collective fail, because another process is not there?"""
    if not isinstance(error, RuntimeError):
        return False
    frames = frames_of(error)
    in_torch = error.__traceback__ is not None and frames[0].f_code.co_filename.startswith(_TORCH)
    return bool((isinstance(error, dist.DistError) or in_torch) and _BROKEN.search(str(error)))


def bounded(text: str, most: int = 100_000) -> str:
    """Without its middle, if it is too long to be sent."""
    return text if len(text) <= most else f"{text[: most // 2]}\n...\n{text[-most // 2 :]}"


def readable(text: str) -> str:
    """A traceback without the frames of torch and fulmen."""
    if os.environ.get("FULMEN_FULL_TRACEBACK") == "1":
        return text
    kept: list[str] = []
    cut, skipping = 0, False
    for line in text.splitlines():
        if match := _FRAME.match(line):
            file = match[1]
            skipping = file.startswith((_TORCH, _FULMEN, "<frozen", "<string>")) or file.endswith(_PLUMBING)
            cut += skipping
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    if cut:
        kept.append(f"({cut} frames of libraries are left out; FULMEN_FULL_TRACEBACK=1 shows them)")
    return "\n".join(kept)
