"""Profilers that need nothing but Python's own clocks."""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import time
from array import array
from collections import defaultdict

from fulmen.profilers.profiler import Profiler
from fulmen.utilities.filesystem import ensure_dir


def _never_started(action_name: str) -> ValueError:
    return ValueError(f"The action `{action_name}` was stopped but never started. Call `start` before `stop`.")


class SimpleProfiler(Profiler):
    """How often each action ran and how long it took.

    Args:
        extended: also count calls, and show each total as a percentage of the time since the profiler was made.
    """

    def __init__(
        self, dirpath: str | os.PathLike | None = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, array[float]] = {}  # eight bytes per call: a long run has millions
        self.start_time = time.monotonic()

    def start(self, action_name: str) -> None:
        if action_name in self.current_actions:
            raise ValueError(f"The action `{action_name}` is already running. Stop it, or give this one another name.")
        self.current_actions[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        now = time.monotonic()
        started = self.current_actions.pop(action_name, None)
        if started is None:
            raise _never_started(action_name)
        self.recorded_durations.setdefault(action_name, array("d")).append(now - started)

    def summary(self) -> str:
        durations = sorted(self.recorded_durations.items(), key=lambda item: sum(item[1]), reverse=True)
        if not durations:
            return self._report({})
        elapsed = time.monotonic() - self.start_time
        rows: list[tuple[str, ...]] = [("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")]
        if self.extended:
            num_calls = sum(len(times) for _, times in durations)
            rows.append(("Total", "-", str(num_calls), f"{elapsed:.5}", "100 %"))
        num_heads = len(rows)
        for name, times in durations:
            total, calls = sum(times), len(times)
            rows.append((name, f"{total / calls:.5}", str(calls), f"{total:.5}", f"{100 * total / elapsed:.5}"))
        if not self.extended:
            rows = [(name, mean, total) for name, mean, _, total, _ in rows]
        widths = [max(map(len, column)) for column in zip(*rows)]
        line = "-" * (sum(widths) + 3 * len(widths) + 1)
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
        heads = [text for head in lines[:num_heads] for text in (line, head)]
        return self._report({"": "\n".join([*heads, line, *lines[num_heads:], line, ""])})


class AdvancedProfiler(Profiler):
    """Which functions each action spends its time in, measured by `cProfile`.

    Python follows one profile at a time: while an action runs inside another, functions count for the inner one alone.

    Args:
        line_count_restriction: how many functions to show per action: a number, or a fraction of all.
        dump_stats: also write each profile to ``<dirpath>/<stage>-<filename>-<action>.prof``, for `pstats` or a viewer.
    """

    def __init__(
        self, dirpath: str | os.PathLike | None = None, filename: str | None = None,
        line_count_restriction: float = 1.0, dump_stats: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dirpath, filename)
        self.line_count_restriction, self.dump_stats = line_count_restriction, dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = defaultdict(cProfile.Profile)
        self._running: list[str] = []

    def start(self, action_name: str) -> None:
        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        self._running.append(action_name)
        self.profiled_actions[action_name].enable()

    def stop(self, action_name: str) -> None:
        if action_name not in self._running:
            raise _never_started(action_name)
        self.profiled_actions[self._running[-1]].disable()
        # Usually the last one; actions that overlap without nesting may end in any order.
        del self._running[len(self._running) - 1 - self._running[::-1].index(action_name)]
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        sections = {}
        for action_name, profile in self.profiled_actions.items():
            profile.create_stats()
            if not profile.stats:
                continue
            if self.dump_stats:
                ensure_dir(self.dirpath or ".")
                profile.dump_stats(self._path(action_name, ".prof"))
            text = io.StringIO()
            stats = pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative")
            stats.print_stats(self.line_count_restriction)
            sections[action_name] = text.getvalue()
        return self._report(sections)

    def teardown(self, stage: str | None) -> None:
        super().teardown(stage)
        self.profiled_actions.clear()
        self._running.clear()

    def __reduce__(self) -> tuple:  # profiles cannot travel to another process
        return (type(self), (self.dirpath, self.filename, self.line_count_restriction, self.dump_stats))
