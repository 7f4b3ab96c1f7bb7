"""`RichProgressBar`: a bar in colours; prints and warnings appear above it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.progress_bar import EVALUATIONS, SECONDS_BETWEEN_REDRAWS, TerminalProgressBar, Track
from fulmen.utilities.optional import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, ProgressColumn, Task, TaskID

    from fulmen.trainer import Trainer


@dataclass
class RichProgressBarTheme:
    """Styles of the columns, in Rich's words ("bold", "#6206E0", …), and how metrics are written."""

    description: str = ""
    progress_bar: str = "#6206E0"
    progress_bar_finished: str = "#6206E0"
    progress_bar_pulse: str = "#6206E0"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim underline"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


_DEFAULT_THEME = RichProgressBarTheme()


class RichProgressBar(TerminalProgressBar):
    """A bar drawn by Rich.

    Args:
        refresh_rate: redraws per second, of which there are at most ten; 0 draws nothing.
        leave: keep the finished bar of every epoch.
        console_kwargs: arguments for `rich.console.Console`.

    Raises:
        ModuleNotFoundError: without Rich.
    """

    progress: Progress | None = None
    val_sanity_progress_bar_id: TaskID | None = None
    train_progress_bar_id: TaskID | None = None
    val_progress_bar_id: TaskID | None = None
    test_progress_bar_id: TaskID | None = None
    predict_progress_bar_id: TaskID | None = None

    val_sanity_check_bar = property(lambda self: self._task("val_sanity"))
    train_progress_bar = property(lambda self: self._task("train"))
    val_progress_bar = property(lambda self: self._task("val"))
    test_progress_bar = property(lambda self: self._task("test"))

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme = _DEFAULT_THEME,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require("rich", "for `RichProgressBar`", minimum=">=10.2.2")
        super().__init__(refresh_rate, leave)
        self._console_kwargs = console_kwargs or {}
        self.theme = theme
        if refresh_rate > 0:
            self._seconds_between_redraws = max(SECONDS_BETWEEN_REDRAWS, 1 / refresh_rate)
        self._console: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_console": None, "progress": None}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """The columns left of the metrics; override it to show others."""
        from rich.progress import BarColumn, TextColumn

        theme = self.theme
        styles = theme.progress_bar, theme.progress_bar_finished, theme.progress_bar_pulse
        return [
            TextColumn("[progress.description]{task.description}", style=theme.description),
            BarColumn(complete_style=styles[0], finished_style=styles[1], pulse_style=styles[2]),
            _column(_batches, theme.batch_progress),
            _column(_times, theme.time),
            _column(lambda task: f"{task.fields.get('rate', 0):.2f}it/s", theme.processing_speed),
        ]

    def refresh(self, hard: bool = False) -> None:
        """Draw now; without ``hard`` only when the last time was long enough ago."""
        if self.progress is not None and (hard or monotonic() >= self._redraw_at):
            self.progress.refresh()

    def _has_terminal(self) -> bool:
        from rich import get_console, reconfigure

        if self._console_kwargs:
            reconfigure(**self._console_kwargs)
        console = self._console = get_console()
        return console.is_interactive or console.is_jupyter

    def _open(self, kind: str) -> None:
        if not self._drawing:
            return
        if self.progress is None or not self.progress.live.is_started:
            from rich.progress import Progress

            for bar in ("train", *EVALUATIONS):
                setattr(self, f"{bar}_progress_bar_id", None)
            metrics = _column(lambda task: task.fields.get("metrics", ""), self.theme.metrics)
            columns = [*self.configure_columns(self.trainer), metrics]
            # Redrawn by us only: Rich's own thread would do it while the bar stands still, too.
            # Samples for a speed we do not show would fill memory for their first 30 seconds.
            self.progress = Progress(*columns, console=self._console, auto_refresh=False, speed_estimate_period=1)
            self.progress.start()
        if getattr(self, f"{kind}_progress_bar_id") is None:
            setattr(self, f"{kind}_progress_bar_id", self.progress.add_task("", total=None, visible=False))

    def _task(self, kind: str) -> Task | None:
        tasks = [] if self.progress is None else self.progress.tasks
        return next((task for task in tasks if task.id == getattr(self, f"{kind}_progress_bar_id")), None)

    def _begin(self, track: Track) -> None:
        name, last = track.name, self.trainer.max_epochs
        if track.kind != "train" and len(self._sizes(track.kind)) > 1:
            name += f" DataLoader {track.loader}"
        elif track.kind == "train" and last is not None and last > 0:
            name += f"/{last - 1}"
        self._update(track.kind, description=name, total=None if track.total == inf else track.total)

    def _show(self, track: Track, metrics: dict[str, Any] | None) -> None:
        values = {} if metrics is None else {"metrics": self._formatted(metrics)}
        self._update(track.kind, completed=track.done, visible=True, elapsed=track.seconds, rate=track.rate, **values)
        self.refresh(hard=True)

    def _update(self, kind: str, **values: Any) -> None:
        assert self.progress is not None
        self.progress.update(getattr(self, f"{kind}_progress_bar_id"), **values)

    def _formatted(self, metrics: dict[str, Any]) -> str:
        form = self.theme.metrics_format
        texts = (f"{k}: {v:{form}}" if isinstance(v, float) else f"{k}: {v}" for k, v in metrics.items())
        return self.theme.metrics_text_delimiter.join(texts)

    def _close(self, kind: str) -> None:
        if self.progress is not None and (kind == "val_sanity" or (kind == "val" and self._train)):
            self._update(kind, visible=False)
            self.refresh(hard=True)
        elif self.progress is not None:
            self.progress.stop()


def _column(text: Callable[[Task], str], style: str) -> ProgressColumn:
    """A column with a text that is computed from the task."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Computed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(text(task), style=style, overflow="fold")

    return Computed()


def _batches(task: Task) -> str:
    return f"{int(task.completed)}/{'--' if task.total is None else int(task.total)}"


def _times(task: Task) -> str:
    elapsed, rate = task.fields.get("elapsed", 0), task.fields.get("rate", 0)
    remaining = "-:--:--"
    if task.total is not None and rate:
        remaining = str(timedelta(seconds=ceil((task.total - task.completed) / rate)))
    return f"{timedelta(seconds=int(elapsed))} • {remaining}"
