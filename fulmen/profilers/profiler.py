"""What every profiler offers, and those that need nothing but Python's own clocks."""

from __future__ import annotations

import functools
import io
import os
import re
import time
from abc import ABC, abstractmethod
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

from fulmen.storage.filesystem import ensure_dir, get_filesystem
from fulmen.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from torch import nn


class Profiler(ABC):
    """Measures named actions between `start` and `stop`: the Trainer's (``[Callback]Timer.on_fit_end``) and yours.

    Args:
        dirpath: where files go; the Trainer's log folder if None.
        filename: the report goes to ``<dirpath>/<stage>-<filename>.txt``, with the rank before the ending if there are
            several; to the log if None.

    Examples:
        >>> class Counts(Profiler):
        ...     calls = 0
        ...     def start(self, action_name):
        ...         self.calls += 1
        ...     def stop(self, action_name): ...
        >>> profiler = Counts()
        >>> with profiler.profile("augmentation"):
        ...     pass
        >>> profiler.calls
        1
    """

    active = True  # False tells the Trainer that it need not name its actions at all

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self.module: nn.Module | None = None  # set by the Trainer before `setup`
        self._stage: str | None = None
        self._local_rank: int | None = None

    local_rank = property(lambda self: self._local_rank or 0, doc="The place of this process on its machine.")

    @abstractmethod
    def start(self, action_name: str) -> None:
        """An action begins.

        Args:
            action_name: what is measured.
        """

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """The action ends.

        Args:
            action_name: what is measured.
        """

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Measures a block of code: ``with self.trainer.profiler.profile("augmentation"): …``.

        Args:
            action_name: what is measured.

        Yields:
            The name.
        """
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """The report as text."""
        return ""

    def describe(self) -> None:
        """Appends the report to the file, or logs it; the Trainer does so at the end of each verb."""
        text = self.summary()
        if text and self.filename and self.dirpath:
            ensure_dir(self.dirpath)
            with get_filesystem(self.dirpath).open(self._report_path(), "a") as file:
                file.write(text)
        elif text:
            rank_zero_info(text)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run begins.

        Args:
            stage: "fit", "validate", "test" or "predict".
            local_rank: the place of this process on its machine; None for a single process.
            log_dir: where files go without a ``dirpath``.
        """
        self._stage = str(stage.value) if isinstance(stage, Enum) else stage
        self._local_rank = local_rank
        self.dirpath = self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:
        """The run is over: release what was held for it.

        Args:
            stage: of the run, as in `setup`.
        """

    def _report_path(self, action_name: str = "", extension: str = ".txt") -> str:
        """The path of a file of this profiler, with everything in its name that tells it from others."""
        rank = None if self._local_rank is None else str(self._local_rank)
        name = "-".join(part for part in (self._stage, self.filename, rank, action_name) if part) + extension
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f\x7f]+', "_", name)  # actions contain what file systems do not take
        return os.path.join(self.dirpath or "", name)

    def _write_report(self, sections: Mapping[str, str]) -> str:
        """One text from parts with headings; a part without heading is set apart by an empty line."""
        lines = [f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"]
        rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
        for heading, body in sections.items():
            lines += [f"Profile stats for: {heading}{rank}" if heading else "", body]
        return "\n".join(lines) + "\n"


class PassThroughProfiler(Profiler):
    """Measures nothing; what the Trainer uses unless told otherwise."""

    active = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.active = vars(cls).get("active", True)  # a subclass measures something

    def start(self, action_name: str) -> None: ...
    def stop(self, action_name: str) -> None: ...


def measured(profiler: Profiler, action_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself if nobody measures, else one that measures each call: decide once, before the loop."""
    if not profiler.active:
        return function

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action_name):
            return function(*args, **kwargs)

    return timed


class SimpleProfiler(Profiler):
    """How often each action ran and how long it took.

    Args:
        extended: also count calls, and show each total as a percentage of the time since the profiler was made.

    Examples:
        >>> profiler = SimpleProfiler()
        >>> with profiler.profile("augmentation"):
        ...     pass
        >>> "augmentation" in profiler.summary()
        True
    """

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, array[float]] = {}  # eight bytes per call: a long run has millions
        self.extended = extended
        self.start_time = time.monotonic()

    def start(self, action_name: str) -> None:
        """Notes the time.

        Args:
            action_name: what is measured.

        Raises:
            ValueError: it has started already.
        """
        if action_name in self.current_actions:
            raise ValueError(f"The action `{action_name}` has already started. Stop it, or give this one another name.")
        self.current_actions[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        """Keeps how long it took.

        Args:
            action_name: what is measured.

        Raises:
            ValueError: it was not started.
        """
        if action_name not in self.current_actions:
            raise ValueError(
                f"The action `{action_name}` cannot stop: it was never started. Call `start` before `stop`."
            )
        duration = time.monotonic() - self.current_actions.pop(action_name)
        self.recorded_durations.setdefault(action_name, array("d")).append(duration)

    def summary(self) -> str:
        """The table of actions, the longest first."""
        durations = sorted(self.recorded_durations.items(), key=lambda item: sum(item[1]), reverse=True)
        elapsed = time.monotonic() - self.start_time
        rows: list[tuple[str, ...]] = [("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")]
        if self.extended:
            num_calls = sum(map(len, self.recorded_durations.values()))
            rows.append(("Total", "-", str(num_calls), f"{elapsed:.5}", "100 %"))
        for name, times in durations:
            total = sum(times)
            calls = len(times)
            rows.append((name, f"{total / calls:.5}", str(calls), f"{total:.5}", f"{100 * total / elapsed:.5}"))
        if not self.extended:
            rows = [(name, mean, total) for name, mean, _, total, _ in rows]
        widths = [max(map(len, column)) for column in zip(*rows)]
        rule = "-" * (sum(widths) + 3 * len(widths) + 1)
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        for place in (0, 2, 4) if self.extended else (0, 2):  # above and below each head
            lines.insert(place, rule)
        return self._write_report({"": "\n".join([*lines, rule, ""])})


class AdvancedProfiler(Profiler):
    """Which functions each action spends its time in, measured by `cProfile`.

    Python follows one profile at a time: while an action runs inside another, functions count for the inner one alone.

    Args:
        line_count_restriction: how many functions to show per action: a number, or a fraction of all.
        dump_stats: also write each profile to ``<dirpath>/<stage>-<filename>-<action>.prof``, for `pstats` or a viewer.

    Examples:
        >>> profiler = AdvancedProfiler(line_count_restriction=5)
        >>> with profiler.profile("sorting"):
        ...     ordered = sorted([3, 1, 2])
        >>> "Profile stats for: sorting" in profiler.summary()
        True
    """

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None,
        line_count_restriction: float = 1.0, dump_stats: bool = False,
    ) -> None:  # fmt: skip
        import cProfile

        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = defaultdict(cProfile.Profile)
        self._running: list[str] = []

    def start(self, action_name: str) -> None:
        """Functions count for this action from now on.

        Args:
            action_name: what is measured.
        """
        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        self._running.append(action_name)
        self.profiled_actions[action_name].enable()

    def stop(self, action_name: str) -> None:
        """Functions count for the action around this one again.

        Args:
            action_name: what is measured.

        Raises:
            ValueError: it was not started.
        """
        if action_name not in self._running:
            raise ValueError(
                f"The action `{action_name}` cannot stop: it was never started. Call `start` before `stop`."
            )
        self.profiled_actions[self._running[-1]].disable()
        # Usually the last one; actions that overlap without nesting may end in any order.
        del self._running[len(self._running) - 1 - self._running[::-1].index(action_name)]
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        """A table of functions for each action; with `dump_stats`, the profiles are written too."""
        import pstats

        sections = {}
        for action_name, profile in self.profiled_actions.items():
            profile.create_stats()
            if not profile.stats:
                continue
            if self.dump_stats:
                ensure_dir(self.dirpath or ".")
                profile.dump_stats(self._report_path(action_name, ".prof"))
            text = io.StringIO()
            stats = pstats.Stats(profile, stream=text).strip_dirs()
            stats.sort_stats("cumulative").print_stats(self.line_count_restriction)
            sections[action_name] = text.getvalue()
        return self._write_report(sections)

    def teardown(self, stage: str | None) -> None:
        """Forgets all profiles.

        Args:
            stage: of the run.
        """
        self.profiled_actions.clear()
        self._running.clear()

    def __reduce__(self) -> tuple[Any, ...]:  # profiles cannot travel to another process
        return (type(self), (self.dirpath, self.filename, self.line_count_restriction, self.dump_stats))


class XLAProfiler(PassThroughProfiler):
    """Stands for the profiler of TPUs, which are not supported."""

    STEP_FUNCTIONS = {"validation_step", "test_step", "predict_step"}
    RECORD_FUNCTIONS = {"training_step", "backward", *STEP_FUNCTIONS}
    port: int

    def __init__(self, port: int = 9012) -> None:
        raise NotImplementedError('`XLAProfiler`: TPUs are not supported. Use `profiler="pytorch"` or another one.')
