"""What a watchdog asks of the run and of the processes that it watches. It knows no more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class SupervisedRun(Protocol):
    """A run, in one of its processes. Called from the watchdog's thread while the main thread is anywhere in the run."""

    def describe_position(self) -> str:
        """Where the run is: "train, epoch 0, batch 3"."""

    def notify_exception(self, error: BaseException) -> None:
        """Tells callbacks and loggers. Runs code of the user, which may raise anything or never return."""

    def finalize_loggers(self) -> None:
        """Writes what was logged, whatever the loggers raise."""

    def handles_signal(self, number: int) -> bool:
        """Does the run end by itself when this signal comes?"""

    def request_stop(self, number: int) -> bool:
        """The run ends at the next boundary of a step because of this signal; False if it does because of another."""

    def is_saving_last(self) -> bool:
        """Is the checkpoint being written with which the run ends?"""


class ChildProcesses(Protocol):
    """The processes that this one has started."""

    def describe_exit(self, rank: int) -> str:
        """How the process of a rank ended; "" if it has not, or was not started here."""

    def end_children(self, patience_s: float) -> None:
        """Waits for them for so many seconds, and ends those that still run."""


class SupervisedProcess(Protocol):
    """This process among those of the run: the strategy."""

    report_to_parent: Callable[[BaseException, str, bool], None] | None  # error, stack, does it only follow another's?

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def start_method(self) -> str: ...

    def abort_collectives(self) -> None:
        """From now on they do nothing: nobody waits for the others."""
