"""What the processes of a run tell each other: `Heartbeat`, `Verdict`, and the strict reading of values that arrive."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeVar, get_type_hints

T = TypeVar("T")


class ThreadState(str, Enum):
    """What a thread does."""

    BUSY = "busy"  # it computes, or is in no run
    WAITING = "waiting"  # in a collective
    ASLEEP = "asleep"  # idle in the user's code, here or in the loader's worker that it waits for
    OUTSIDE = "outside"  # idle in a library, for a disk or a network perhaps


@dataclass(frozen=True)
class Activity:
    """One sample of a thread."""

    state: ThreadState = ThreadState.BUSY
    collective: str = ""  # that it is in
    location: str = ""  # in the source
    sequence: int = 0  # collectives that this process has begun
    unchanged_s: float = 0.0  # in this very place, and idle if it is asleep or outside
    since_collective_s: float = 0.0  # since the last one began
    stack: str = ""


@dataclass(frozen=True)
class Heartbeat(Activity):
    """What each process says every second: what its main thread does, and who it is."""

    pid: int = 0
    host: str = ""
    done: bool = False  # with its run
    position: str = ""  # in the run: stage, epoch and batch


class FailureKind(str, Enum):
    """How a rank failed."""

    RAISED = "raised"
    GONE = "gone"  # its process died or stopped, or its machine cannot be reached
    STALLED = "stalled"
    DEADLOCK = "deadlock"  # all wait, in different collectives
    DONE = "done"  # with its run, while others wait for it
    EXIT = "exit"  # it was told to end


@dataclass(frozen=True)
class Verdict:
    """Which rank failed and how. All processes end because of the first one that is published."""

    rank: int
    kind: FailureKind
    text: str  # continues "Rank 3"
    stack: str = ""
    exit_code: int = 1  # of all processes
    stopped_pid: int = 0  # a stopped process that must be killed, as it does not hear of the verdict
    host: str = ""  # of the process that raised
    pid: int = 0  # of the process that raised
    reporter: int = -1  # the rank that prints it

    @property
    def reason(self) -> str:
        return f"Rank {self.rank} {self.text}"


# By the part of a key before the slash; what follows the slash is the rank that says it.
VALUE_TYPES: dict[str, type] = {
    "heartbeat": Heartbeat,
    "verdict": Verdict,
    "signal": int,  # that came to some process
    "location": str,  # where a rank waits, once it has heard of the verdict
    "broken": bool,  # a collective of that rank failed
    "reported": bool,  # the verdict was printed
    "closed": bool,  # the callbacks and loggers of that rank have heard of the end
}


def parse_value(kind: type[T], value: object) -> T | None:
    """The `kind` that a JSON value stands for; None if it is another, or has other fields or fields of other types."""
    if kind in (int, str, bool):
        return value if type(value) is kind else None
    kinds = get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        return None
    try:
        fields = {name: k(value[name]) if issubclass(k, Enum) else value[name] for name, k in kinds.items()}
    except ValueError:  # no member of the enum
        return None
    return kind(**fields) if all(type(fields[name]) is k for name, k in kinds.items()) else None
