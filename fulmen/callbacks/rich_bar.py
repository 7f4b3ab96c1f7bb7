"""`RichProgressBar`: a bar in colours; prints and warnings appear above it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import ceil, inf, isfinite
from time import monotonic
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.progress_bar import (
    SECONDS_BETWEEN_REDRAWS,
    SHORTEST_BAR,
    TerminalProgressBar,
    Track,
    leaves_lines,
    wrap_items,
)
from fulmen.utilities.console import escape_unencodable
from fulmen.utilities.optional import import_optional

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task

    from fulmen.trainer import Trainer


@dataclass
class RichProgressBarTheme:
    """Styles of the columns of a `RichProgressBar`, in Rich's words (``"bold"``, ``"#6206E0"``, …), and how metrics are written.

    Examples:
        >>> RichProgressBarTheme(metrics_format=".1e").metrics_format
        '.1e'
    """

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
BAR_WIDTH = 40


class RichProgressBar(TerminalProgressBar):
    """A progress bar drawn by Rich, in colours; prints and warnings appear above it.

    One line per finished epoch stays on the screen.

    Args:
        refresh_rate: redraw at most so often a second, and never more than ten times; 0 draws nothing.
        leave: False keeps the line of the last epoch alone, True makes a display for each epoch.
        theme: styles of the columns.
        console_kwargs: arguments of ``rich.console.Console``.

    Raises:
        ModuleNotFoundError: Rich is not installed.

    Examples:
        >>> bar = RichProgressBar(theme=RichProgressBarTheme(progress_bar="green", metrics_format=".4f"))
    """

    progress: Any = None  # Rich's display, also where it is not shown and after the run

    val_sanity_progress_bar_id = property(lambda self: self._ids.get("sanity_check"))
    train_progress_bar_id = property(lambda self: self._ids.get("train"))
    val_progress_bar_id = property(lambda self: self._ids.get("validation"))
    test_progress_bar_id = property(lambda self: self._ids.get("test"))
    predict_progress_bar_id = property(lambda self: self._ids.get("predict"))

    val_sanity_check_bar = property(lambda self: self._find_task("sanity_check"))
    train_progress_bar = property(lambda self: self._find_task("train"))
    val_progress_bar = property(lambda self: self._find_task("validation"))
    test_progress_bar = property(lambda self: self._find_task("test"))

    @leaves_lines
    def __init__(
        self, refresh_rate: int = 100, leave: bool = False, theme: RichProgressBarTheme = _DEFAULT_THEME,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        import_optional("rich", "for `RichProgressBar`", minimum=">=10.2.2")
        super().__init__(refresh_rate, leave)
        self.theme = theme
        self._console_kwargs = console_kwargs or {}
        if refresh_rate > 0:
            self._seconds_between_redraws = max(SECONDS_BETWEEN_REDRAWS, 1 / refresh_rate)
        self._console: Any = None
        self._ids: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_console": None, "progress": None, "_ids": {}}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
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
        return bool(console.is_interactive or console.is_jupyter)

    def _open_bar(self, kind: str) -> None:
        if not self.is_enabled or self._console is None:  # None: enabled after the run had begun
            return
        if self.progress is None or not self.progress.is_open:
            self._ids = {}
            columns = self.configure_columns(self.trainer)
            self.progress = _make_display(columns, self.theme, self._console, shown=self._drawing)
            self.progress.start()
        if kind not in self._ids:
            texts = dict.fromkeys(("batches", "times", "speed", "metrics"), "")  # shown beside the bar
            self._ids[kind] = self.progress.add_task("", total=None, visible=not self._drawing, items=[], **texts)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        super().teardown()
        if self.progress is not None:
            self.progress.stop()  # between the sanity check and training it goes on without a track

    on_train_end = on_exception = teardown

    def _find_task(self, kind: str) -> Task | None:
        for track in filter(None, (self._train, self._evaluation)):
            if track.kind == kind:
                self._update_count(track)
        tasks = [] if self.progress is None else self.progress.tasks
        return next((task for task in tasks if task.id == self._ids.get(kind)), None)

    def _begin_track(self, track: Track) -> None:
        if track.kind not in self._ids:
            return
        name = track.name
        last = self.trainer.max_epochs
        if track.loaders > 1:
            name += f" DataLoader {track.loader}"
        elif track.kind == "train" and last is not None and last > 0:
            name += f"/{last - 1}"
        self.progress.update(self._ids[track.kind], description=name, total=None if track.total == inf else track.total)
        self._update_count(track)

    def _update_count(self, track: Track) -> None:
        if track.kind in self._ids:
            self.progress.update(self._ids[track.kind], completed=track.done)

    def _keep_line(self, track: Track) -> Callable[[], None]:
        task = self._find_task(track.kind)
        return self.progress.keep(task) if task is not None else lambda: None

    def _show_track(self, track: Track, metrics: dict[str, Any] | None) -> None:
        done = track.done
        total = track.total
        rate = track.rate
        remaining = timedelta(seconds=ceil((total - done) / rate)) if total < inf and rate else "-:--:--"
        dot = "•" if self._console.encoding.startswith("utf") else "-"
        texts: dict[str, Any] = {
            "batches": f"{done}/{'--' if total == inf else int(total)}",
            "times": f"{timedelta(seconds=int(track.seconds))} {dot} {remaining}",
            "speed": f"{rate:.2f}it/s",
        }
        if metrics is not None:
            texts["items"] = [
                escape_unencodable(f"{k}: {self._format_value(v)}", self._console) for k, v in metrics.items()
            ]
            texts["metrics"] = self.theme.metrics_text_delimiter.join(texts["items"])
        self.progress.update(self._ids[track.kind], completed=done, visible=True, **texts)
        self.refresh(hard=True)

    def _format_value(self, value: Any) -> str:
        """As the theme says, unless that would show nothing of a small number, or every digit of a large one."""
        form = self.theme.metrics_format
        if not isinstance(value, float):
            return str(value)
        unreadable = form.endswith("f") and isfinite(value) and value and not 5e-4 <= abs(value) < 1e9
        return f"{value:.2e}" if unreadable else f"{value:{form}}"

    def _close_bar(self, kind: str) -> None:
        if kind not in self._ids:
            return  # nothing was drawn
        if kind == "sanity_check" or (kind == "validation" and self._train):
            self.progress.update(self._ids[kind], visible=False)
            self.refresh(hard=True)
        else:
            self.progress.stop()


def _make_display(columns: list[ProgressColumn], theme: RichProgressBarTheme, console: Console, shown: bool) -> Any:
    from rich.console import Group
    from rich.jupyter import JupyterMixin
    from rich.progress import Progress, TextColumn

    class Cell(JupyterMixin):  # type: ignore[misc]
        """What a notebook shows, and replaces."""

        def __init__(self, parts: Iterable[Any]) -> None:
            self.parts = list(parts)

        def __rich__(self) -> Group:
            return Group(*self.parts)

    class Display(Progress):  # type: ignore[misc]
        is_open = False
        cell: Any = None  # the handle of what a notebook shows

        def start(self) -> None:
            self.is_open = True
            if shown and not console.is_jupyter:  # in a notebook Rich's own display asks for ipywidgets
                super().start()

        def stop(self) -> None:
            self.is_open = False
            self.cell = None
            if shown and not console.is_jupyter:
                super().stop()

        def refresh(self) -> None:
            if not (shown and console.is_jupyter):
                super().refresh()
                return
            from IPython.display import display

            # A lock, because several threads may print.
            with self._lock:
                content = Cell(self.get_renderables())
                if self.cell is None:
                    self.cell = display(content, display_id=True)
                else:
                    self.cell.update(content)

        def keep(self, task: Task) -> Callable[[], None]:
            """What leaves the line of a task, as it is now, above the display."""
            if console.is_jupyter:
                self.refresh()
                return lambda: setattr(self, "cell", None)
            parts = Group(*_lay_out(self, console, theme, [task]))
            return lambda: console.print(parts)

        def get_renderables(self) -> Iterable[Any]:
            return _lay_out(self, console, theme, [task for task in self.tasks if task.visible])

    metrics = TextColumn("{task.fields[metrics]}", theme.metrics, markup=False)
    # Redrawn by us only: Rich's own thread would do it while the bar stands still, too.
    # Samples for a speed we do not show would fill memory for their first 30 seconds.
    return Display(*columns, metrics, console=console, auto_refresh=False, speed_estimate_period=1)


def _lay_out(progress: Progress, console: Console, theme: RichProgressBarTheme, tasks: list[Task]) -> list[Any]:
    """A line per task; where it has no room for the shortest bar, the metrics stand on lines below."""
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.progress import BarColumn
    from rich.text import Text

    columns = progress.columns
    table = progress.make_tasks_table(tasks)
    needed = Measurement.get(console, console.options.update_width(10_000), table).maximum
    if any(isinstance(column, BarColumn) for column in columns):
        needed -= BAR_WIDTH - SHORTEST_BAR
    items = [item for task in tasks for item in task.fields.get("items", ())]
    if not items or needed <= console.width:
        return [table]
    progress.columns = columns[:-1]
    table = progress.make_tasks_table(tasks)
    progress.columns = columns
    lines = wrap_items(items, theme.metrics_text_delimiter, console.width, cell_len)
    return [table, Text("\n".join(lines), theme.metrics, no_wrap=True)]
