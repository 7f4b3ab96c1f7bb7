"""`TQDMProgressBar`: the bar that works everywhere."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Callable
from math import inf
from time import time
from typing import Any, TextIO

from fulmen.callbacks.progress_bar import SHORTEST_BAR, TerminalProgressBar, Track, leaves_lines, wrap_items
from fulmen.utilities.console import escape_unencodable
from fulmen.utilities.optional import import_optional


@functools.cache
def _tqdm_class() -> Any:
    """`Tqdm`, made on first use: importing tqdm takes as long as all of fulmen."""
    tqdm = import_optional("tqdm.auto", "for `TQDMProgressBar`").tqdm

    class Tqdm(tqdm):  # type: ignore[misc, valid-type]
        """A tqdm bar whose numbers keep their width, and whose metrics stand below it where the line is too short."""

        monitor_interval = 0  # no thread that redraws: we do
        lines_below = 0
        _printers: tuple[Any, ...] = ()

        @staticmethod
        def format_num(n: float | str) -> str:
            """At least five characters for anything but an int: ``0.5`` is ``"0.500"``."""
            if isinstance(n, int):
                return str(n)
            text = n if isinstance(n, str) else tqdm.format_num(n)
            if not re.fullmatch(r"-?\d+\.?\d*", text):
                return text
            return (text if "." in text or len(text) >= 5 else f"{text}.").ljust(5, "0")

        def display(self, msg: str | None = None, pos: int | None = None, **kwargs: Any) -> Any:
            if hasattr(self, "container"):  # a notebook's widget
                return super().display(msg, pos, **kwargs)
            lines = _layout_lines(self) if msg is None else [msg]
            pos = abs(self.pos) if pos is None else pos
            shown = super().display(lines[0], pos, **kwargs)
            self._show_below(lines[1 : max((self.nrows or 20) - pos - 1, 1)], pos)
            return shown

        def clear(self, nolock: bool = False) -> None:
            super().clear(nolock=nolock)
            self._show_below([], abs(self.pos))

        def _show_below(self, lines: list[str], pos: int) -> None:
            while len(self._printers) < len(lines):
                self._printers = (*self._printers, self.status_printer(self.fp))
            for number in range(max(len(lines), self.lines_below)):
                self.moveto(pos + number + 1)
                self._printers[number](lines[number] if number < len(lines) else "")
                self.fp.write("\r")
                self.moveto(-(pos + number + 1))
            self.lines_below = len(lines)

        def close(self) -> None:
            open_ = not self.disable
            leave = self.leave or (self.leave is None and not self.pos)
            super().close()
            if open_ and leave and self.lines_below:
                self.fp.write("\n" * self.lines_below)

    return Tqdm


def _layout_lines(bar: Any) -> list[str]:
    """What is drawn of a tqdm bar: the bar, and where it is too short the lines of metrics below it."""
    from tqdm.utils import disp_len

    meter = bar.format_dict
    metrics = bar.postfix
    if not meter["ncols"] and bar.fp.isatty():  # a stream around that of the terminal
        meter["ncols"] = shutil.get_terminal_size((0, 0)).columns or None
    width = meter["ncols"]
    whole = bar.format_meter(**{**meter, "ncols": None})  # its bar has 10 columns
    if not width or not metrics or disp_len(whole) - 10 + SHORTEST_BAR <= width:
        return [escape_unencodable(bar.format_meter(**meter), bar.fp)]
    below = wrap_items(escape_unencodable(metrics, bar.fp).split(", "), ", ", width, disp_len)
    return [escape_unencodable(bar.format_meter(**{**meter, "postfix": None}), bar.fp), *below]


def __getattr__(name: str) -> Any:
    if name == "Tqdm":
        return _tqdm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def _bar_property(kind: str) -> property:
    """A bar as users read it, up to date; they may configure it, or put another in its place."""

    def read_bar(self: TQDMProgressBar) -> Any:
        bar = self._bars.get(kind)
        if bar is None:
            what = f"The `{type(self).__name__}._{kind}_progress_bar` reference has not been set yet."
            raise TypeError(f"{what} The bar is made when its loop starts.")
        for track in filter(None, (self._train, self._evaluation)):
            if _kind_of_bar(track.kind) == kind:
                self._update_count(track)
        return bar

    return property(read_bar, lambda self, bar: self._bars.update({kind: bar}))


def _bar_slot(kind: str) -> property:
    """A bar, or None, as it was last drawn."""
    return property(lambda self: self._bars.get(kind), lambda self, bar: self._bars.update({kind: bar}))


class TQDMProgressBar(TerminalProgressBar):
    """The progress bar that works everywhere, drawn by tqdm.

    One line per finished epoch stays on the screen, unless ``leave`` says otherwise.

    Args:
        refresh_rate: batches between two redraws, at least (the environment variable ``TQDM_MINITERS`` wins); 0 draws nothing.
        process_position: how many pairs of lines above are left free for bars of other runs.
        leave: False keeps the line of the last epoch alone, True makes a bar for each epoch.

    Examples:
        >>> TQDMProgressBar(refresh_rate=20).refresh_rate
        20
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    train_progress_bar = _bar_property("train")
    val_progress_bar = _bar_property("val")
    test_progress_bar = _bar_property("test")
    predict_progress_bar = _bar_property("predict")
    process_position = property(lambda self: self._process_position)
    # Under these names subclasses put bars of their own; None until there is one.
    _train_progress_bar = _bar_slot("train")
    _val_progress_bar = _bar_slot("val")
    _test_progress_bar = _bar_slot("test")
    _predict_progress_bar = _bar_slot("predict")

    @leaves_lines
    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        if refresh_rate == 1 and "COLAB_GPU" in os.environ:
            refresh_rate = 20  # every redraw travels to the browser
        if refresh_rate > 0:
            refresh_rate = max(refresh_rate, int(os.environ.get("TQDM_MINITERS", 1)))
        super().__init__(refresh_rate, leave)
        self._batches_between_redraws = refresh_rate
        self._process_position = process_position
        self._bars: dict[str, Any] = {}  # by "train", "val", "test" and "predict"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bars": {}}

    def init_sanity_tqdm(self) -> Any:
        """Override the `init_*_tqdm` methods to make the bars differently."""
        return self._new_bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Any:
        return self._new_bar(self.train_description)

    def init_validation_tqdm(self) -> Any:
        alone = self.trainer.state.fn == "validate"
        return self._new_bar(self.validation_description, leave=alone, lines_above=int(not alone))

    def init_test_tqdm(self) -> Any:
        return self._new_bar(self.test_description)

    def init_predict_tqdm(self) -> Any:
        return self._new_bar(self.predict_description)

    def _new_bar(self, description: str, leave: bool = True, lines_above: int = 0) -> Any:
        # A delay of anything but zero: not to be drawn before its total is known.
        look = {"file": sys.stdout, "bar_format": self.BAR_FORMAT, "dynamic_ncols": True, "smoothing": 0, "delay": 1e-9}
        if sys.stdout is None or not sys.stdout.isatty():
            lines_above = 0  # a notebook has widgets, or a page on which nothing moves up
        place = {"position": 2 * self._process_position + lines_above, "disable": not self._drawing, "leave": leave}
        return sys.modules[__name__].Tqdm(desc=description, **place, **look)

    def _has_terminal(self) -> bool:
        ipython = sys.modules.get("IPython")
        in_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
        return in_notebook or (sys.stdout is not None and sys.stdout.isatty())

    def _open_bar(self, kind: str) -> None:
        self._redirect_streams(False)
        # One is made even when nothing is drawn, because users configure it in their hooks.
        makers = {
            "sanity_check": self.init_sanity_tqdm, "train": self.init_train_tqdm, "validation": self.init_validation_tqdm,
            "test": self.init_test_tqdm, "predict": self.init_predict_tqdm,
        }  # fmt: skip
        self._bars[_kind_of_bar(kind)] = makers[kind]()
        self._redirect_streams(self._drawing)

    def _begin_track(self, track: Track) -> None:
        bar = self._bars[_kind_of_bar(track.kind)]
        loader = "" if track.kind == "train" else f" DataLoader {track.loader}"
        bar.set_description(track.name + loader, refresh=False)
        bar.total = None if track.total == inf else track.total
        if hasattr(bar, "container"):
            bar.reset(total=bar.total)  # a notebook's widget learns the total only here
        elif below := getattr(self._bars.get("train"), "lines_below", 0) if track.kind == "validation" else 0:
            bar.pos = -(2 * self._process_position + 1 + below)
        self._update_count(track)

    def _update_count(self, track: Track) -> None:
        bar = self._bars[_kind_of_bar(track.kind)]
        if self.is_enabled:
            bar.n = track.done
            bar.initial = track.first

    def _keep_line(self, track: Track) -> Callable[[], None]:
        bar = self._bars[_kind_of_bar(track.kind)]
        text = "\n".join(_layout_lines(bar))
        return lambda: type(bar).write(text, file=bar.fp)

    def _show_track(self, track: Track, metrics: dict[str, Any] | None) -> None:
        bar = self._bars[_kind_of_bar(track.kind)]
        self._update_count(track)
        bar.last_print_t = time()  # else `close` believes there is nothing to clear
        bar.start_t = bar.last_print_t - track.seconds
        if metrics is not None:
            bar.set_postfix(metrics, refresh=False)
        bar.refresh()

    def _close_bar(self, kind: str) -> None:
        self._bars[_kind_of_bar(kind)].close()
        kind_of_bar = _tqdm_class()
        if not any(isinstance(bar, kind_of_bar) for bar in kind_of_bar._instances):  # another trainer's may be open
            self._redirect_streams(False)

    def _redirect_streams(self, above: bool) -> None:
        """While bars are open, what is printed, warned and logged on a terminal appears above them."""
        screen = sys.stdout
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if above and stream is not None and stream.isatty():
                setattr(sys, name, _AboveBars(stream, screen))
            elif isinstance(stream, _AboveBars):
                stream.stream.write(stream.line)
                setattr(sys, name, stream.stream)


def _kind_of_bar(kind: str) -> str:
    """By the kind of a track: the sanity check and validation have one bar."""
    return "val" if kind in ("sanity_check", "validation") else kind


class _AboveBars:
    """A stream that makes room for each complete line by moving the bars on ``screen`` down."""

    def __init__(self, stream: TextIO, screen: TextIO) -> None:
        self.stream = stream
        self.screen = screen
        self.line = ""
        self.process = os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if "\r" in text or "\x1b[A" in text or (not self.line and not text.strip("\n")):
            return self.stream.write(text)  # moves the cursor: somebody else's bar
        lines, newline, self.line = (self.line + text).rpartition("\n")
        if newline and os.getpid() != self.process:
            self.stream.write(f"\r\x1b[K{lines}{newline}")  # a worker: the bars are not its own
        elif newline:
            with _tqdm_class().external_write_mode(file=self.screen):
                self.stream.write(lines + newline)
        return len(text)
