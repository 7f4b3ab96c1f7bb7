"""What a thread does, sampled from its stack; where an error came from; tracebacks without the frames of libraries."""

from __future__ import annotations

import linecache
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import replace
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from fulmen.supervision import loader_workers
from fulmen.supervision.messages import Activity, ThreadState
from fulmen.supervision.processes import cpu_seconds, seconds_ready, waits_in_kernel
from fulmen.utilities.introspection import PACKAGE_FOLDER, in_library

_TORCH = os.path.dirname(torch.__file__)
_STANDARD = os.path.dirname(os.__file__)
_COLLECTIVES = tuple(
    os.path.join(_TORCH, *path) for path in (("distributed", ""), ("nn", "parallel", "distributed.py"))
)
_EXCHANGES = tuple(os.path.join(PACKAGE_FOLDER, "engine", name) for name in ("parallel.py", "collectives.py"))
_BACKWARD = os.path.join(_TORCH, "autograd", "graph.py")
_LOOPS = os.path.join(PACKAGE_FOLDER, "loops", "")
_RUN = (_LOOPS, os.path.join(PACKAGE_FOLDER, "trainer.py"))  # what is on the stack while a run is, in its hooks too
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


class StackPosition(NamedTuple):
    """Where a stack is."""

    collective: str  # that its innermost frames belong to, or ""
    location: str  # in the source


class ThreadProbe:
    """Samples what a thread does, and compares with the samples before: for how long has it done just that?

    Arguments:
        thread: of this process.
        patience_s: how long it may stand still. From half of that on, samples hold the stack and look at loaders' workers.
    """

    def __init__(self, thread: threading.Thread, patience_s: float) -> None:
        self.thread = thread
        self.patience_s = patience_s
        self.place: list[tuple[int, int]] = []  # code and instruction of each frame
        self.sequence = -1
        self.place_since = self.sequence_since = self.idle_since = time.monotonic()
        self.cpu_at_idle = 0.0  # processor time, used and waited for, at `idle_since`
        self.last = Activity()

    def sample(self) -> Activity:
        """What it does now."""
        frames = outer_frames(sys._current_frames().get(self.thread.ident or 0))
        loader = loader_workers.find_loader_frame(frames)
        # A loader that waits for its workers looks around now and then.
        idle = self._update_clocks(frames if loader is None else frames[frames.index(loader) :])
        now = time.monotonic()
        unchanged = now - self.place_since
        collective, location = describe_frames(frames)
        asleep = self._is_in_user_code(frames, unchanged)
        if loader is not None and idle and unchanged > self.patience_s / 2:
            worker = loader_workers.inspect_worker(loader)
            asleep = worker.is_stuck
            location = f"{location}, waiting for {worker.description}"
        state = classify_thread(frames, collective, idle, asleep)
        if state in (ThreadState.ASLEEP, ThreadState.OUTSIDE):
            unchanged = now - self.idle_since  # the time before, when it or what it started computed, does not count
        since_collective = now - self.sequence_since
        stack = format_stack(frames) if since_collective > self.patience_s / 2 else ""
        self.last = Activity(state, collective, location, self.sequence, unchanged, since_collective, stack)
        return self.last

    def freeze_position(self, frames: list[FrameType]) -> None:
        """What failed here is what the last sample tells from now on."""
        collective, location = describe_frames(frames)
        self.last = replace(self.last, collective=collective, location=location)

    def is_overdue(self) -> bool:
        """Has it slept in the user's code for longer than it may?"""
        activity = self.sample()
        return activity.state is ThreadState.ASLEEP and activity.unchanged_s > self.patience_s

    def _update_clocks(self, frames: list[FrameType]) -> bool:
        """Notes what has changed since the last sample. Returns whether the process has been idle since `idle_since`."""
        now = time.monotonic()
        # On a machine that others keep busy, a thread that computes may get no processor for a while.
        used = cpu_seconds() + seconds_ready(self.thread.native_id)
        sequence = collectives_begun()
        place = [(id(frame.f_code), frame.f_lasti) for frame in frames]
        if sequence != self.sequence:
            self.sequence_since = now
        moved = place != self.place or sequence != self.sequence
        if moved:
            self.place_since = now
        idle = moved or used - self.cpu_at_idle < 0.02 * (now - self.idle_since) + 0.05
        if moved or not idle:
            self.idle_since = now
            self.cpu_at_idle = used
        self.place = place
        self.sequence = sequence
        return idle

    def _is_in_user_code(self, frames: list[FrameType], unchanged: float) -> bool:
        if not frames or (in_library(frames[0].f_code.co_filename) and not only_waits(frames, self.thread)):
            return False
        return unchanged <= self.patience_s / 2 or not waits_in_kernel(self.thread.native_id)


def outer_frames(frame: FrameType | None) -> list[FrameType]:
    """That frame and those around it, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def classify_thread(frames: list[FrameType], collective: str, idle: bool, asleep: bool) -> ThreadState:
    if collective and (idle or collective != IN_BACKWARD):  # a backward pass may also compute
        return ThreadState.WAITING
    if not idle or not is_in_run(frames, asleep):
        return ThreadState.BUSY
    return ThreadState.ASLEEP if asleep else ThreadState.OUTSIDE


def is_in_run(frames: list[FrameType], asleep: bool) -> bool:
    """Is a run on the stack, and no debugger? Who sleeps outside of the loops, in a hook of the trainer, counts too."""
    files = [frame.f_code.co_filename for frame in frames]
    runs = any(file.startswith(_RUN if asleep else _LOOPS) for file in files)
    return runs and not any(file.endswith(_DEBUGGERS) for file in files)


def format_stack(frames: list[FrameType]) -> str:
    """The stack as it is printed."""
    found = traceback.StackSummary.extract(((f, f.f_lineno or 0) for f in reversed(frames)), lookup_lines=True)
    return truncate_middle(strip_library_frames("Stack (most recent call last):\n" + "".join(found.format())))


def only_waits(frames: list[FrameType], thread: threading.Thread) -> bool:
    """Does this thread wait for another one of which none could wait for a disk or a network?"""
    if not frames[0].f_code.co_filename.startswith(_WAITS):
        return False
    passive = {thread.ident, threading.get_ident()}
    tops = [frame.f_code.co_filename for ident, frame in sys._current_frames().items() if ident not in passive]
    return all(file.startswith((*_WAITS, PACKAGE_FOLDER)) or not in_library(file) for file in tops)


def describe_frames(frames: list[FrameType]) -> StackPosition:
    """Where the thread with these frames is."""
    outside = next((i for i, frame in enumerate(frames) if not frame.f_code.co_filename.startswith(_TORCH)), 0)
    own = next((frame for frame in frames if not in_library(frame.f_code.co_filename)), None)
    if collective := find_collective(frames, outside):
        return StackPosition(collective, f"{collective}, called at {frame_location(own or frames[outside])}")
    if not frames:
        return StackPosition("", "no Python code")
    nearest = own or frames[0]
    line = linecache.getline(nearest.f_code.co_filename, nearest.f_lineno or 0).strip()[:200]
    inside = f", inside of {frame_location(frames[0])}" if nearest is not frames[0] else ""
    return StackPosition("", f"{frame_location(nearest)}{f': `{line}`' if line else ''}{inside}")


def find_collective(frames: list[FrameType], outside: int) -> str:
    """The collective that the frames within torch, which are those before `outside`, belong to, if any."""
    found = ""
    for frame in frames[:outside]:
        file = frame.f_code.co_filename
        if file.startswith(_COLLECTIVES) and not file.endswith("c10d_logger.py"):
            found = frame.f_code.co_name  # the outermost of them, which was called
        elif file == _BACKWARD:
            found = IN_BACKWARD
    if not found and frames and frames[0].f_code.co_filename in _EXCHANGES:  # in the store of the group
        found = frames[0].f_code.co_name
    return found


def frame_location(frame: FrameType, line: int | None = None) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line or frame.f_lineno} in {frame.f_code.co_name}"


def frames_of(error: BaseException) -> list[FrameType]:
    """The frames that an error went through, and those around where it is handled; innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    return frames + outer_frames(frames[-1].f_back if frames else sys._getframe(1))


def error_location(error: BaseException) -> str:
    """The last place in the user's code that an error came through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not in_library(frame.f_code.co_filename):
            return frame_location(frame, line)
    for file, line, name in reversed(_FRAME.findall(str(error))):  # of a loader's worker
        if not in_library(file):
            return f"{os.path.basename(file)}:{line} in {name}"
    return describe_frames(frames_of(error)).location


def collectives_begun() -> int:
    """By this process, in the group of all; also those that the device has still to do."""
    try:
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return 0


def is_lost_connection(error: BaseException) -> bool:
    """Did a collective fail, because another process is not there?"""
    if not isinstance(error, RuntimeError):
        return False
    frames = frames_of(error)
    in_torch = error.__traceback__ is not None and frames[0].f_code.co_filename.startswith(_TORCH)
    return bool((isinstance(error, dist.DistError) or in_torch) and _BROKEN.search(str(error)))


def truncate_middle(text: str, max_length: int = 100_000) -> str:
    """Without its middle, if it is too long to be sent."""
    return text if len(text) <= max_length else f"{text[: max_length // 2]}\n...\n{text[-max_length // 2 :]}"


def strip_library_frames(text: str) -> str:
    """A traceback without the frames of torch and fulmen."""
    if os.environ.get("FULMEN_FULL_TRACEBACK") == "1":
        return text
    kept: list[str] = []
    cut = 0
    skipping = False
    for line in text.splitlines():
        if match := _FRAME.match(line):
            file = match[1]
            skipping = file.startswith((_TORCH, PACKAGE_FOLDER, "<frozen", "<string>")) or file.endswith(_PLUMBING)
            cut += skipping
        elif not line.startswith("    "):
            skipping = False
        if not skipping:
            kept.append(line)
    if cut:
        kept.append(f"({cut} frames of libraries are left out; FULMEN_FULL_TRACEBACK=1 shows them)")
    return "\n".join(kept)
