"""The state of processes and threads of this machine, as the system tells it."""

from __future__ import annotations

import contextlib
import os
import time

ENDED = ("gone", "Z", "X")  # states of a process
STOPPED = ("T", "t")


def process_state(pid: int) -> str:
    """The state of a process of this machine as one letter, of which T is stopped and Z dead; or "gone"."""
    try:
        if os.path.exists("/proc/self/stat"):
            return stat_fields(str(pid))[0]
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        pass
    return "S"


def waits_in_kernel(thread: int | None) -> bool:
    """Does a thread of this process wait for a disk, or for a program that it started, as `os.system` does?"""
    folder = f"self/task/{thread}"
    with contextlib.suppress(OSError):
        if stat_fields(folder)[0] == "D":
            return True
    with contextlib.suppress(OSError), open(f"/proc/{folder}/wchan") as file:
        return file.read().startswith("do_wait")
    return False


def cpu_seconds() -> float:
    """Of this process without the thread that asks and, where the system tells, of those that it started."""
    total = time.process_time() - time.thread_time()
    pids = child_pids(os.getpid())
    while pids:
        pid = pids.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat_fields(str(pid))
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            pids += child_pids(pid)
    return total


def seconds_ready(thread: int | None) -> float:
    """How long a thread of this process was ready to run while others had the processors; 0 where that is not told."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/self/task/{thread}/schedstat") as file:
        return int(file.read().split()[1]) / 1e9
    return 0.0


def child_pids(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def stat_fields(folder: str) -> list[str]:
    """The fields behind the name, which may hold anything, of a `stat` in /proc: state, parent, group, session, ..."""
    with open(f"/proc/{folder}/stat") as file:
        return file.read().rpartition(")")[2].split()
