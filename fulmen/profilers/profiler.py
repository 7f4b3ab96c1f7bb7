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

from fulmen.utilities.errors import explain
from fulmen.utilities.filesystem import ensure_dir, get_filesystem
from fulmen.utilities.rank_zero import rank_zero_info


class Profiler(ABC):
    """Measures named actions between `start` and `stop`.

    The Trainer names its own: ``run_training_batch``, ``[LightningModule]Net.on_train_start``,
    ``[Callback]Timer.on_fit_end`` and so on. Your code adds more with
    ``with self.trainer.profiler.profile("augmentation"): …``.

    Args:
        dirpath: where files go; the Trainer's log folder if None.
        filename: the report goes to ``<dirpath>/<stage>-<filename>.txt`` (with the rank before the ending when there
            are several processes); to the log if None.
    """

    active = True
    """False tells the Trainer that it need not name its actions at all."""

    def __init__(self, dirpath: str | os.PathLike | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self.module: torch.nn.Module | None = None
        """The module of the run, set by the Trainer before `setup`."""
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
        """Measure a block of code."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """The report as text."""
        return ""

    def describe(self) -> None:
        """Append the report to the file, or log it. The Trainer does this at the end of fit, validate, test, predict."""
        text = self.summary()
        if not text:
            return
        if self.filename and self.dirpath:
            ensure_dir(self.dirpath)
            path = self._path()
            with get_filesystem(path).open(path, "a") as file:
                file.write(text)
        else:
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
        parts = [part for part in (self._stage, self.filename, rank, action_name) if part]
        # Actions contain what file systems do not take.
        name = re.sub(r'[/\\:*?"<>|]', "_", "-".join(parts) + extension)
        return os.path.join(self.dirpath or "", name)

    def _report(self, sections: Mapping[str, str]) -> str:
        """One text from parts with headings; a part without heading is set apart by an empty line."""
        lines = [f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"]
        for heading, body in sections.items():
            rank = "" if self._local_rank is None else f" rank: {self._local_rank}"
            lines += [f"Profile stats for: {heading}{rank}" if heading else "", body]
        return "\n".join(lines) + "\n"


class PassThroughProfiler(Profiler):
    """Measures nothing; what the Trainer uses unless told otherwise."""

    active = False

    def start(self, action_name: str) -> None:
        pass

    def stop(self, action_name: str) -> None:
        pass

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


class XLAProfiler(Profiler):
    """Stands for the profiler of TPUs, which are not supported."""

    STEP_FUNCTIONS = {"validation_step", "test_step", "predict_step"}
    RECORD_FUNCTIONS = {"training_step", "backward", "validation_step", "test_step", "predict_step"}

    def __init__(self, port: int = 9012) -> None:
        self.port = port
        what = "`XLAProfiler` is not supported, and neither are TPUs."
        raise NotImplementedError(explain(what, fix='Use `profiler="pytorch"`, "simple" or "advanced".'))

    def start(self, action_name: str) -> None: ...

    def stop(self, action_name: str) -> None: ...
