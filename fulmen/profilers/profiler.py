"""What every profiler offers, and the one that does nothing."""

from __future__ import annotations

import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fulmen.utilities.filesystem import ensure_dir, get_filesystem
from fulmen.utilities.rank_zero import rank_zero_info


class Profiler(ABC):
    """Measures named actions between `start` and `stop`: the Trainer's (``[Callback]Timer.on_fit_end``) and yours.

    Args:
        dirpath: where files go; the Trainer's log folder if None.
        filename: the report goes to ``<dirpath>/<stage>-<filename>.txt``, with the rank before the ending if there are
            several; to the log if None.
    """

    active = True  # False tells the Trainer that it need not name its actions at all

    def __init__(self, dirpath: str | os.PathLike | None = None, filename: str | None = None) -> None:
        self.dirpath, self.filename = dirpath, filename
        self.module: torch.nn.Module | None = None  # set by the Trainer before `setup`
        self._stage: str | None = None
        self._local_rank: int | None = None

    @property
    def local_rank(self) -> int:
        return self._local_rank or 0

    @abstractmethod
    def start(self, action_name: str) -> None:
        """An action begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """The action ends."""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Measures a block of code: ``with self.trainer.profiler.profile("augmentation"): …``."""
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
            with get_filesystem(self.dirpath).open(self._path(), "a") as file:
                file.write(text)
        elif text:
            rank_zero_info(text)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run begins: ``stage`` is "fit", "validate", "test" or "predict"; the rank is None for a single process."""
        self._stage = getattr(stage, "value", stage)
        self._local_rank = local_rank
        self.dirpath = self.dirpath or log_dir

    def teardown(self, stage: str | None) -> None:
        """The run is over: release what was held for it."""

    def _path(self, action_name: str = "", extension: str = ".txt") -> str:
        """The path of a file of this profiler, with everything in its name that tells it from others."""
        rank = None if self._local_rank is None else str(self._local_rank)
        name = "-".join(part for part in (self._stage, self.filename, rank, action_name) if part) + extension
        # Actions contain what file systems do not take.
        return os.path.join(self.dirpath or "", re.sub(r'[/\\:*?"<>|]', "_", name))

    def _report(self, sections: Mapping[str, str]) -> str:
        """One text from parts with headings; a part without heading is set apart by an empty line."""
        lines = [f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"]
        rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
        for heading, body in sections.items():
            lines += [f"Profile stats for: {heading}{rank}" if heading else "", body]
        return "\n".join(lines) + "\n"


class PassThroughProfiler(Profiler):
    """Measures nothing; what the Trainer uses unless told otherwise."""

    active = False

    def start(self, action_name: str) -> None: ...
    def stop(self, action_name: str) -> None: ...

    def profile(self, action_name: str) -> AbstractContextManager[str]:  # type: ignore[override]
        return nullcontext(action_name)


def measured(profiler: Profiler, action_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself if nobody measures, else one that measures each call: decide once, before the loop."""
    if not profiler.active:
        return function

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action_name):
            return function(*args, **kwargs)

    return timed


class XLAProfiler(PassThroughProfiler):
    """Stands for the profiler of TPUs, which are not supported."""

    STEP_FUNCTIONS = {"validation_step", "test_step", "predict_step"}
    RECORD_FUNCTIONS = {"training_step", "backward", *STEP_FUNCTIONS}

    def __init__(self, port: int = 9012) -> None:
        self.port = port
        raise NotImplementedError('`XLAProfiler`: TPUs are not supported. Use `profiler="pytorch"` or another one.')
