"""`ProgressBar`, and `TerminalProgressBar`: what the bars that draw in a terminal have in common."""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import ceil, inf
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fulmen.callbacks.callback import Callback
from fulmen.metrics.values import count_elements
from fulmen.utilities.console import escape_unencodable
from fulmen.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

Init = TypeVar("Init", bound=Callable[..., None])

SECONDS_BETWEEN_REDRAWS = 0.1
SHORTEST_BAR = 8  # columns; where a line has no room for it, metrics stand on lines of their own below


def _constant(value: str) -> Any:
    """A property, which subclasses override, with this value."""
    return property(lambda self: value)


class ProgressBar(Callback):
    """Base class for progress bars of your own: override the hooks in which you draw.

    Only rank 0 has a bar; on others `disable` is called in `setup`.

    Examples:
        >>> class Dots(ProgressBar):
        ...     def disable(self):
        ...         self.is_enabled = False
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         if self.is_enabled:
        ...             print(".", end="")
    """

    only_shows = True
    is_enabled: Any = True
    _trainer: Trainer | None = None
    _current_eval_dataloader_idx: int | None = None
    _peeking = False  # redraws do not wait for values that have not arrived from the device yet

    @property
    def trainer(self) -> Trainer:
        """The trainer of the run; a TypeError before there is one."""
        if self._trainer is None:
            raise TypeError(f"`{type(self).__name__}` is not attached to a trainer yet; pass it in `callbacks=[...]`.")
        return self._trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def enable(self) -> None:
        """Draw from now on."""
        raise NotImplementedError

    def disable(self) -> None:
        """Draw nothing from now on."""
        raise NotImplementedError

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the bar; arguments are those of the built-in function."""
        builtins.print(*args, **kwargs)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What is shown beside the bar; called only when it is redrawn. Override it to add, change or drop values."""
        logged = trainer.book.arrived_bar_metrics() if self._peeking else trainer.progress_bar_metrics
        versions = list(dict.fromkeys(logger.version for logger in trainer.loggers if logger.version not in (None, "")))
        if not versions:
            return dict(logged)
        if "v_num" in logged:
            what = "`self.log('v_num', prog_bar=True)` overwrites what the bar shows as `v_num`."
            rank_zero_warn(f"{what} Log it under another name, or override `get_metrics`.")
        version = versions[0] if len(versions) == 1 else "_".join(map(str, versions))
        return {"v_num": version[-4:] if isinstance(version, str) else version, **logged}

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether this is another loader than at the last call."""
        changed = self._current_eval_dataloader_idx != dataloader_idx
        self._current_eval_dataloader_idx = dataloader_idx
        return changed

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget the loader: the next call of `has_dataloader_changed` says True."""
        self._current_eval_dataloader_idx = None

    sanity_check_description: str = _constant("Sanity Checking")
    train_description: str = _constant("Training")
    validation_description: str = _constant("Validation")
    test_description: str = _constant("Testing")
    predict_description: str = _constant("Predicting")

    # Batches of an epoch or of the current loader; inf when nobody knows.
    total_train_batches = property(lambda self: self._train_batches())
    total_val_batches_current_dataloader = property(lambda self: self._current_size(self._val_batches))
    total_test_batches_current_dataloader = property(lambda self: self._current_size(self.trainer.num_test_batches))
    total_predict_batches_current_dataloader = property(
        lambda self: self._current_size(self.trainer.num_predict_batches)
    )

    @property
    def total_val_batches(self) -> int | float:
        """Validation batches of all loaders in this epoch; 0 in epochs without validation."""
        trainer = self.trainer
        every = self.trainer.check_val_every_n_epoch
        skipped = trainer.state.fn == "fit" and every and (trainer.current_epoch + 1) % every
        return 0 if skipped and not trainer.sanity_checking else sum(self._val_batches)

    def _train_batches(self) -> int | float:
        """As many as the loader has, or as `max_steps` leaves."""
        trainer = self.trainer
        progress = trainer.progress
        if trainer.max_steps == -1:
            return trainer.num_training_batches
        steps_per_batch = max(len(trainer.optimizers), 1)
        batches = ceil((trainer.max_steps - progress.steps) / steps_per_batch) * trainer.accumulate_grad_batches
        begun = progress.batch % trainer.accumulate_grad_batches if batches > 0 else 0
        return min(trainer.num_training_batches, progress.batch - begun + max(batches, 0))

    @property
    def _val_batches(self) -> list[float]:
        return self.trainer.num_sanity_val_batches if self.trainer.sanity_checking else self.trainer.num_val_batches

    def _current_size(self, sizes: list[float]) -> int | float:
        return sizes[self._current_eval_dataloader_idx or 0] if sizes else inf


@dataclass
class Track:
    """How far the work is that one bar stands for."""

    kind: str  # "train", "sanity_check", "validation", "test" or "predict"
    name: str
    total: float = inf
    loader: int = 0
    loaders: int = 1
    done: int = 0
    drawn: int = 0
    first: int = 0  # where `started` was taken: a resumed epoch does not begin at 0
    started: float = field(default_factory=monotonic)

    def begin_loader(self, loader: int, loaders: int, total: float) -> None:
        """The next of several loaders; the clock goes on: the speed is that of all loaders together."""
        self.loader = loader
        self.loaders = loaders
        self.total = total
        self.first -= self.done
        self.done = self.drawn = 0

    def leave_out(self, seconds: float) -> None:
        """Work stood still for so long; its speed shall not suffer."""
        self.started += seconds

    seconds = property(lambda self: monotonic() - self.started)
    rate = property(lambda self: (self.done - self.first) / max(self.seconds, 1e-9), doc="Batches per second.")


class TerminalProgressBar(ProgressBar):
    """Decides when to redraw; subclasses only draw.

    Per batch this costs an assignment and a look at the clock. Where there is no terminal, a line is printed per epoch.
    While the bar of training is open, one of validation may be below it.
    """

    monitors: ClassVar[bool] = True  # so that the last state of an epoch has what the module logs at its end

    _has_terminal: Callable[[], bool]  # can a line be drawn again and again?
    _open_bar: Callable[[str], None]  # makes a bar of a kind, without drawing it
    _begin_track: Callable[[Track], None]  # an open bar starts on an epoch or a loader: name and total change
    _update_count: Callable[[Track], None]  # brings the number on a bar up to date, without drawing it
    _keep_line: Callable[[Track], Callable[[], None]]  # what writes a finished epoch, as it is now, above its bar
    _show_track: Callable[[Track, dict[str, Any] | None], None]  # draws a bar; None leaves its metrics as they are
    _close_bar: Callable[[str], None]  # takes a bar away, or leaves it as it stands

    _seconds_between_redraws: float = SECONDS_BETWEEN_REDRAWS
    _batches_between_redraws: int = 1
    _enabled = True
    _line_per_epoch = False  # stays above the bar, which is used again
    _redraw_at = inf  # while nothing is drawn
    _train: Any = None  # a `Track` while there is training, and so below
    _evaluation: Any = None

    refresh_rate = property(lambda self: self._refresh_rate)
    is_enabled = property(lambda self: self._enabled and self._refresh_rate > 0)
    is_disabled = property(lambda self: not self.is_enabled)
    _drawing = property(lambda self: self._redraw_at < inf)

    def __init__(self, refresh_rate: int, leave: bool) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._leave = leave

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False
        self._redraw_at = inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._redraw_at = 0.0 if self.is_enabled and self._has_terminal() else inf

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        tracks = self._evaluation, self._train
        self._train = self._evaluation = None
        for track in filter(None, tracks):
            self._finish_track(track)

    def _finish_track(self, track: Track) -> None:
        self._update_count(track)
        self._close_bar(track.kind)

    on_train_end = on_exception = teardown

    def _draw_track(self, track: Track, metrics: dict[str, Any] | None = None) -> None:
        track.drawn = track.done
        self._show_track(track, metrics)
        self._redraw_at = monotonic() + self._seconds_between_redraws

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = self._train
        keep = self._leave_track(last) if last and last.done else None
        if self._train is None:
            self._open_bar("train")
        done = trainer.progress.batch  # not 0 when a run resumes inside an epoch
        name = f"Epoch {trainer.current_epoch}"
        self._train = Track("train", name, self.total_train_batches, done=done, drawn=done, first=done)
        self._begin_track(self._train)
        if keep:
            keep()
        if self._drawing and not (last and last.seconds < SECONDS_BETWEEN_REDRAWS):
            self._draw_track(self._train)

    def _leave_track(self, last: Track) -> Callable[[], None] | None:
        """Closes the bar of a finished epoch, or says how to write its line above the bar that is used again."""
        if self._leave:
            self._finish_track(last)
            self._train = None
        elif self._line_per_epoch and self._drawing:
            return self._keep_line(last)
        return None

    on_train_start = on_train_epoch_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        track = self._train
        track.done = batch_idx + 1
        if monotonic() >= self._redraw_at and track.done - track.drawn >= self._batches_between_redraws:
            self._draw_training(trainer, pl_module, exactly=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled:
            self._draw_training(trainer, pl_module, exactly=True)

    def _draw_training(self, trainer: Trainer, pl_module: LightningModule, exactly: bool) -> None:
        self._peeking = not exactly
        metrics = {name: _as_number(value) for name, value in self.get_metrics(trainer, pl_module).items()}
        self._peeking = False
        show = self._draw_track if self._drawing else print_line
        show(self._train, metrics)

    def _start_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = trainer.stage.value
        kind = "validation" if stage == "validate" else stage
        self._open_bar(kind)
        self._evaluation = Track(kind, self._describe(kind))
        self._begin_loader(trainer, 0)
        if self._drawing and not self._train:
            self._draw_track(self._evaluation)

    def _describe(self, kind: str) -> str:
        if kind == "test":
            return self.test_description
        if kind == "predict":
            return self.predict_description
        return self.validation_description if kind == "validation" else self.sanity_check_description

    def _begin_loader(self, trainer: Trainer, dataloader_idx: int) -> None:
        self.has_dataloader_changed(dataloader_idx)
        track = self._evaluation
        if track.kind == "test":
            sizes = trainer.num_test_batches
        else:
            sizes = trainer.num_predict_batches if track.kind == "predict" else self._val_batches
        track.begin_loader(dataloader_idx, len(sizes), self._current_size(sizes))
        self._begin_track(track)

    def _end_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        track = self._evaluation
        self._evaluation = None
        self.reset_dataloader_idx_tracker()
        if self._drawing and (not self._train or track.seconds > SECONDS_BETWEEN_REDRAWS):
            self._draw_track(track)
        self._finish_track(track)
        if self.is_enabled and not self._drawing and not self._train and track.kind != "sanity_check":
            print_line(track, {})

    on_sanity_check_start = on_test_start = on_predict_start = _start_evaluation
    on_sanity_check_end = on_test_end = on_predict_end = _end_evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return self._begin_loader(trainer, 0)  # its length is known only now
        if self._train and self._drawing and self._train.drawn != self._train.done:
            self._draw_training(trainer, pl_module, exactly=False)
        self._start_evaluation(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        seconds = self._evaluation.seconds
        self._end_evaluation(trainer, pl_module)
        if self._train:
            self._train.leave_out(seconds)
            if self._drawing:
                self._draw_training(trainer, pl_module, exactly=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx != self._current_eval_dataloader_idx:
            self._begin_loader(trainer, dataloader_idx)
        track = self._evaluation
        track.done = batch_idx + 1
        if monotonic() >= self._redraw_at and track.done - track.drawn >= self._batches_between_redraws:
            self._draw_track(track)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def leaves_lines(init: Init) -> Init:
    """Unless `leave` is passed, a line stays for each epoch: False means that none shall, True that its bar shall."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: TerminalProgressBar, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._line_per_epoch = "leave" not in signature.bind(self, *args, **kwargs).arguments

    return wrapper  # type: ignore[return-value]


def wrap_items(items: Sequence[str], delimiter: str, width: int, length: Callable[[str], int] = len) -> list[str]:
    """Joins items to lines that are not longer than `width`; only an item that is longer itself is cut."""
    lines: list[str] = []
    for item in items:
        if lines and length(lines[-1] + delimiter + item) <= width:
            lines[-1] += delimiter + item
            continue
        while length(item) > width > 0:
            count = next(n for n in range(min(len(item), width), 0, -1) if n == 1 or length(item[:n]) <= width)
            lines.append(item[:count])
            item = item[count:]
        lines.append(item)
    return lines


def _as_number(value: Any) -> Any:
    """A number instead of a tensor or array that holds one; an override of `get_metrics` may give them."""
    if not hasattr(value, "item") or count_elements(value) != 1:
        return value
    return value.item()  # sync: only for what the override itself left on a device


def print_line(track: Track, metrics: dict[str, Any]) -> None:
    """Where nothing can be drawn: one line when an epoch is over."""
    time = f"{track.seconds:.1f} s" if track.seconds < 60 else timedelta(seconds=round(track.seconds))
    values = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in metrics.items()
    ]
    batches = track.done - min(track.first, 0)
    unit = "batch" if batches == 1 else "batches"
    line = f"{track.name}: {', '.join([f'{batches} {unit} in {time}', f'{track.rate:.2f} it/s', *values])}"
    print(escape_unencodable(line, sys.stdout), flush=True)
