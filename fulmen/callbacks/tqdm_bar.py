"""`TQDMProgressBar`: the bar that works everywhere."""

from __future__ import annotations

import functools
import os
import re
import sys
from math import inf
from time import time
from typing import Any

from fulmen.callbacks.progress_bar import TerminalProgressBar, Track
from fulmen.utilities.optional import require


@functools.cache
def _tqdm_class() -> Any:
    """`Tqdm`, made on first use: importing tqdm takes as long as all of fulmen."""
    tqdm = require("tqdm.auto", "for `TQDMProgressBar`").tqdm

    class Tqdm(tqdm):  # type: ignore[misc, valid-type]
        """A tqdm bar whose numbers keep their width, so that the line does not jump."""

        monitor_interval = 0  # no thread that redraws: we do

        @staticmethod
        def format_num(n: float | str) -> str:
            """At least five characters for anything but an int: ``0.5`` is ``"0.500"``."""
            text = n if isinstance(n, str) else tqdm.format_num(n)
            if isinstance(n, int) or not re.fullmatch(r"-?\d+\.?\d*", text):
                return text
            return (text if "." in text or len(text) >= 5 else f"{text}.").ljust(5, "0")

    return Tqdm


def __getattr__(name: str) -> Any:
    if name == "Tqdm":
        return _tqdm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


class TQDMProgressBar(TerminalProgressBar):
    """A bar drawn by tqdm, at least `refresh_rate` batches (or ``TQDM_MINITERS``) after the last time; 0 draws nothing.

    `process_position` pairs of lines above are free for bars of other runs; `leave` keeps the bar of every epoch.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    # Made when their loops start; users may configure them, or put others in their place.
    train_progress_bar: Any = None
    val_progress_bar: Any = None
    test_progress_bar: Any = None
    predict_progress_bar: Any = None
    process_position = property(lambda self: self._process_position)

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        if refresh_rate == 1 and "COLAB_GPU" in os.environ:
            refresh_rate = 20  # every redraw travels to the browser
        if refresh_rate > 0:
            refresh_rate = max(refresh_rate, int(os.environ.get("TQDM_MINITERS", 1)))
        super().__init__(refresh_rate, leave)
        self._batches_between_redraws, self._process_position = refresh_rate, process_position

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_progress_bar")}

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
        place = {"position": 2 * self._process_position + lines_above, "disable": not self._drawing, "leave": leave}
        return _tqdm_class()(desc=description, **place, **look)

    def _has_terminal(self) -> bool:
        ipython = sys.modules.get("IPython")
        in_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
        return in_notebook or (sys.stdout is not None and sys.stdout.isatty())

    def _open(self, kind: str) -> None:
        self._redirect(False)
        # One is made even when nothing is drawn, because users configure it in their hooks.
        setattr(self, _attribute(kind), getattr(self, f"init_{kind.removesuffix('_check')}_tqdm")())
        self._redirect(self._drawing)

    def _begin(self, track: Track) -> None:
        bar = getattr(self, _attribute(track.kind))
        loader = "" if track.kind == "train" else f" DataLoader {track.loader}"
        bar.set_description(track.name + loader, refresh=False)
        bar.total = None if track.total == inf else track.total
        if hasattr(bar, "container"):
            bar.reset(total=bar.total)  # a notebook's widget learns the total only here

    def _show(self, track: Track, metrics: dict[str, Any] | None) -> None:
        bar = getattr(self, _attribute(track.kind))
        bar.n, bar.initial = track.done, track.first
        bar.last_print_t = time()  # else `close` believes there is nothing to clear
        bar.start_t = bar.last_print_t - track.seconds
        if metrics is not None:
            bar.set_postfix(metrics, refresh=False)
        bar.refresh()

    def _close(self, kind: str) -> None:
        getattr(self, _attribute(kind)).close()
        if not self._train and not self._evaluation:
            self._redirect(False)

    def _redirect(self, above: bool) -> None:
        """While bars are open, what is printed, warned and logged on a terminal appears above them."""
        screen = sys.stdout
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if above and stream is not None and stream.isatty():
                setattr(sys, name, _AboveBars(stream, screen))
            elif isinstance(stream, _AboveBars):
                stream.stream.write(stream.line)
                setattr(sys, name, stream.stream)


def _attribute(kind: str) -> str:
    return "val_progress_bar" if kind in ("sanity_check", "validation") else f"{kind}_progress_bar"


class _AboveBars:
    """A stream that makes room for each complete line by moving the bars on ``screen`` down."""

    def __init__(self, stream: Any, screen: Any) -> None:
        self.stream, self.screen, self.line, self.process = stream, screen, "", os.getpid()

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
