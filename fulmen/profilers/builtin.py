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


def _no_durations() -> array[float]:
    return array("d")  # eight bytes per call: a long run has millions


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
        self.recorded_durations: dict[str, array[float]] = defaultdict(_no_durations)
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
        self.recorded_durations[action_name].append(now - started)

    def summary(self) -> str:
        durations = sorted(self.recorded_durations.items(), key=lambda item: sum(item[1]), reverse=True)
        if not durations:
            return self._report({})
        elapsed = time.monotonic() - self.start_time
        rows: list[tuple[str, ...] | None] = [
            ("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"),
            None,
            ("Total", "-", str(sum(len(times) for _, times in durations)), f"{elapsed:.5}", "100 %"),
            None,
        ]
        for name, times in durations:
            total = sum(times)
            share = f"{100 * total / elapsed:.5}"
            rows.append((name, f"{total / len(times):.5}", str(len(times)), f"{total:.5}", share))
        if not self.extended:
            rows = [(row[0], row[1], row[3]) if row else None for row in (rows[0], None, *rows[4:])]
        return self._report({"": _table(rows)})


def _table(rows: list[tuple[str, ...] | None]) -> str:
    """Columns as wide as their widest cell; None is a horizontal line."""
    widths = [max(map(len, column)) for column in zip(*filter(None, rows))]
    line = "-" * (sum(widths) + 3 * len(widths) + 1)
    texts = [line, *("| " + " | ".join(map(str.ljust, row, widths)) + " |" if row else line for row in rows), line]
    return "\n".join(texts) + "\n"


class AdvancedProfiler(Profiler):
    """Which functions each action spends its time in, measured by `cProfile`.

    Python can follow one profile at a time: while an action runs inside another, its functions count for the inner
    one alone.

    Args:
        line_count_restriction: how many functions to show per action: a number, or a fraction of all.
        dump_stats: also write each profile to ``<dirpath>/<stage>-<filename>-<action>.prof``, for `pstats` or a viewer.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
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

    def __reduce__(self) -> tuple:
        # Profiles cannot travel to another process; each process has its own.
        return (type(self), (self.dirpath, self.filename, self.line_count_restriction, self.dump_stats))
