"""`RichProgressBar`: a bar in colours; prints and warnings appear above it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.progress_bar import SECONDS_BETWEEN_REDRAWS, TerminalProgressBar, Track
from fulmen.utilities.optional import require

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task
    from rich.table import Table


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
BAR_WIDTH, SHORTEST_BAR = 40, 8


class RichProgressBar(TerminalProgressBar):
    """A bar drawn by Rich, at most `refresh_rate` and ten times per second, or never if that is 0.

    `leave` keeps the finished bar of every epoch; `console_kwargs` are for `rich.console.Console`.
    """

    progress: Any = None  # Rich's display while there is one

    val_sanity_progress_bar_id = property(lambda self: self._ids.get("sanity_check"))
    train_progress_bar_id = property(lambda self: self._ids.get("train"))
    val_progress_bar_id = property(lambda self: self._ids.get("validation"))
    test_progress_bar_id = property(lambda self: self._ids.get("test"))
    predict_progress_bar_id = property(lambda self: self._ids.get("predict"))

    val_sanity_check_bar = property(lambda self: self._task("sanity_check"))
    train_progress_bar = property(lambda self: self._task("train"))
    val_progress_bar = property(lambda self: self._task("validation"))
    test_progress_bar = property(lambda self: self._task("test"))

    def __init__(
        self, refresh_rate: int = 100, leave: bool = False, theme: RichProgressBarTheme = _DEFAULT_THEME,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        require("rich", "for `RichProgressBar`", minimum=">=10.2.2")
        super().__init__(refresh_rate, leave)
        self.theme, self._console_kwargs = theme, console_kwargs or {}
        if refresh_rate > 0:
            self._seconds_between_redraws = max(SECONDS_BETWEEN_REDRAWS, 1 / refresh_rate)
        self._console: Any = None
        self._ids: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_console": None, "progress": None, "_ids": {}}

    def configure_columns(self, trainer: Any) -> list[ProgressColumn]:
        """The columns left of the metrics; override it to show others."""
        from rich.progress import BarColumn, TextColumn

        theme = self.theme
        description = TextColumn("[progress.description]{task.description}", style=theme.description)
        colours = theme.progress_bar, theme.progress_bar_finished, theme.progress_bar_pulse
        bar = BarColumn(BAR_WIDTH, "bar.back", *colours)
        styles = {"batches": theme.batch_progress, "times": theme.time, "speed": theme.processing_speed}
        return [description, bar, *(TextColumn(f"{{task.fields[{name}]}}", styles[name]) for name in styles)]

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
            self._ids = {}
            self.progress = _display(self.configure_columns(self.trainer), self.theme.metrics, self._console)
            self.progress.start()
        if kind not in self._ids:
            texts = dict.fromkeys(("batches", "times", "speed", "metrics"), "")  # shown beside the bar
            self._ids[kind] = self.progress.add_task("", total=None, visible=False, **texts)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        super().teardown()
        if self.progress is not None:
            self.progress.stop()  # between the sanity check and training it goes on without a track

    on_train_end = on_exception = teardown

    def _task(self, kind: str) -> Task | None:
        tasks = [] if self.progress is None else self.progress.tasks
        return next((task for task in tasks if task.id == self._ids.get(kind)), None)

    def _begin(self, track: Track) -> None:
        name, last = track.name, self.trainer.max_epochs
        if track.loaders > 1:
            name += f" DataLoader {track.loader}"
        elif track.kind == "train" and last is not None and last > 0:
            name += f"/{last - 1}"
        self.progress.update(self._ids[track.kind], description=name, total=None if track.total == inf else track.total)

    def _show(self, track: Track, metrics: dict[str, Any] | None) -> None:
        done, total, rate = track.done, track.total, track.rate
        remaining = timedelta(seconds=ceil((total - done) / rate)) if total < inf and rate else "-:--:--"
        texts = {
            "batches": f"{done}/{'--' if total == inf else int(total)}",
            "times": f"{timedelta(seconds=int(track.seconds))} • {remaining}",
            "speed": f"{rate:.2f}it/s",
        }
        if metrics is not None:
            form = self.theme.metrics_format
            values = (f"{k}: {v:{form}}" if isinstance(v, float) else f"{k}: {v}" for k, v in metrics.items())
            texts["metrics"] = self.theme.metrics_text_delimiter.join(values)
        self.progress.update(self._ids[track.kind], completed=done, visible=True, **texts)
        self.refresh(hard=True)

    def _close(self, kind: str) -> None:
        if kind not in self._ids:
            return  # nothing was drawn
        if kind == "sanity_check" or (kind == "validation" and self._train):
            self.progress.update(self._ids[kind], visible=False)
            self.refresh(hard=True)
        else:
            self.progress.stop()


def _display(columns: list[ProgressColumn], metrics_style: str, console: Any) -> Any:
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.progress import BarColumn, Progress, TextColumn

    class Display(Progress):
        def make_tasks_table(self, tasks: Any) -> Table:
            """Lines are not wrapped: Rich shortens the bar, and where that is not enough metrics are cut."""
            table, width = super().make_tasks_table(tasks), console.width
            longest = max((cell_len(task.fields["metrics"]) for task in tasks if task.visible), default=0)
            needed = Measurement.get(console, console.options.update_width(10_000), table).maximum
            if any(isinstance(column, BarColumn) for column in self.columns):
                needed -= BAR_WIDTH - SHORTEST_BAR
            if longest and needed > width:
                table.columns[-1].max_width = max(longest - (needed - width), 1)
            return table

    metrics = TextColumn("{task.fields[metrics]}", metrics_style, markup=False)
    # Redrawn by us only: Rich's own thread would do it while the bar stands still, too.
    # Samples for a speed we do not show would fill memory for their first 30 seconds.
    return Display(*columns, metrics, console=console, auto_refresh=False, speed_estimate_period=1)
