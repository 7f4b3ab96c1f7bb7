"""`LearningRateFinder`: tries rising learning rates, and suggests the one at which the loss falls fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from fulmen.callbacks.callback import Callback
from fulmen.optimizers import NoOptimizer, set_learning_rate
from fulmen.utilities.arguments import lightning_hasattr, lightning_setattr
from fulmen.utilities.errors import MisconfigurationException, _TunerExitException, suggest_name
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import STEP_OUTPUT

log = logging.getLogger(__name__)

MODES = ("linear", "exponential")
RATE_NAMES = ("lr", "learning_rate")  # of attributes, in the order in which they are looked for
SMOOTHING = 0.98  # how much of the mean over earlier losses stays at each step


class LearningRateCurve:
    """The losses that were met while the learning rate rose. `Tuner.lr_find` returns it.

    Args:
        mode: how rates rise: "exponential" or "linear".
        lr_min: the first rate.
        lr_max: the last rate.
        num_training: number of rates.

    Attributes:
        results: "lr", the rates that were tried, and "loss", the smoothed loss at each of them.

    Examples:
        >>> curve = LearningRateCurve("exponential", lr_min=1e-3, lr_max=1.0, num_training=4)
        >>> curve.results = {"lr": [0.001, 0.01, 0.1, 1.0], "loss": [1.0, 0.9, 0.3, 5.0]}
        >>> curve.suggestion(skip_begin=0, skip_end=1)
        0.001
    """

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        if mode not in MODES:
            raise ValueError(f"`mode` should be either of {MODES}, and is {mode!r}.{suggest_name(str(mode), MODES)}")
        self.mode = mode
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.num_training = num_training
        self.results: dict[str, Any] = {}
        self._total_batch_idx = 0  # of the last batch, counted from the start of the search
        self._optimal_idx: int | None = None

    def rates(self) -> list[float]:
        """All rates of the search, in order."""
        begin = self.lr_min
        end = self.lr_max
        parts = [step / self.num_training for step in range(2, self.num_training + 1)]
        if self.mode == "linear":
            return [begin, *(begin + part * (end - begin) for part in parts)]
        return [begin, *(begin * (end / begin) ** part for part in parts)]

    def record_losses(self, losses: list[float], num_batches: int) -> None:
        """Takes over what a search met: a loss for each of the first rates."""
        self.results = {"lr": self.rates()[: len(losses)], "loss": losses}
        self._total_batch_idx = num_batches - 1

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss falls fastest, seen over the rate: the one to begin training with.

        Args:
            skip_begin: so many of the first rates are left out, at which little moves.
            skip_end: so many of the last ones, at which the loss diverges.

        Returns:
            None, with an error in the log, if fewer than two finite losses are left.
        """
        losses = self.results["loss"]
        kept = [at for at in range(skip_begin, len(losses) - skip_end) if isfinite(losses[at])]
        if len(kept) < 2:
            self._optimal_idx = None
            log.error(
                f"Failed to compute suggestion for learning rate: of {len(losses)} losses, {len(kept)} are finite and not "
                f"left out by `skip_begin={skip_begin}` and `skip_end={skip_end}`, and two are needed. Try more rates, or "
                "smaller ones."
            )
            return None
        rates = torch.tensor([self.results["lr"][at] for at in kept])
        (slopes,) = torch.gradient(torch.tensor([losses[at] for at in kept]), spacing=[rates])
        self._optimal_idx = kept[int(slopes.argmin())]
        rate: float = self.results["lr"][self._optimal_idx]
        return rate

    def plot(self, suggest: bool = False, show: bool = False, ax: Axes | None = None) -> Figure | SubFigure | None:
        """Draws the loss over the learning rate with matplotlib.

        Args:
            suggest: mark the suggested rate with a red point.
            show: open a window, or show it in the notebook.
            ax: where to draw; a new figure by default.

        Raises:
            MisconfigurationException: if matplotlib is not installed.
        """
        if not is_installed("matplotlib"):
            what = "`plot` draws with `matplotlib`, which is not installed."
            raise MisconfigurationException(f"{what} Run `pip install matplotlib`, or look at `results`.")
        pyplot = import_optional("matplotlib.pyplot", "to plot learning rates")
        axes: Any = pyplot.subplots()[1] if ax is None else ax
        rates = self.results["lr"]
        losses = self.results["loss"]
        axes.plot(rates, losses)
        if self.mode == "exponential":
            axes.set_xscale("log")
        axes.set_xlabel("Learning rate")
        axes.set_ylabel("Loss")
        if suggest and self.suggestion() is not None and self._optimal_idx is not None:
            at = self._optimal_idx
            axes.plot(rates[at], losses[at], markersize=10, marker="o", color="red")
        if show:
            pyplot.show()
        figure: Figure | SubFigure | None = axes.figure
        return figure


_LRFinder = LearningRateCurve  # its name in the API


class LearningRateFinder(Callback):
    """Tries rising learning rates before training, and continues with the one at which the loss fell fastest.

    One optimizer step is made with each rate, on the batches of training and without validation. Then everything is as
    it was: weights, optimizer, counters, loaders, random numbers. Other callbacks, loggers and schedulers rest meanwhile.
    With several processes, the loss is the mean over them. `Tuner.lr_find` does the same without training afterwards.

    Args:
        min_lr: the first rate.
        max_lr: the last one.
        num_training_steps: how many rates are tried.
        mode: how they rise: by the same factor ("exponential") or the same amount ("linear").
        early_stop_threshold: the search ends when the smoothed loss is larger than the best by this factor, or no number;
            None tries all rates.
        update_attr: let the attribute of the module or its datamodule that has the learning rate, and the optimizer, have
            the suggested one.
        attr_name: that attribute, if it is not `lr` or `learning_rate`, on the module, in its `hparams`, or on the
            datamodule.

    Raises:
        ValueError: for an unknown mode, or numbers that make no range.
        AttributeError: in `fit`, if `update_attr` and there is no such attribute.
        MisconfigurationException: in `fit`, if there is not one optimizer.

    Examples:
        To search again at the start of some epochs, override two hooks:

        >>> class FinetuneFinder(LearningRateFinder):
        ...     milestones = (0, 5, 10)
        ...     def on_fit_start(self, trainer, pl_module):
        ...         pass
        ...     def on_train_epoch_start(self, trainer, pl_module):
        ...         if trainer.current_epoch in self.milestones:
        ...             self.lr_find(trainer, pl_module)
    """

    SUPPORTED_MODES = MODES
    tunes = True

    def __init__(
        self, min_lr: float = 1e-8, max_lr: float = 1, num_training_steps: int = 100, mode: str = "exponential",
        early_stop_threshold: float | None = 4.0, update_attr: bool = True, attr_name: str = "",
    ) -> None:  # fmt: skip
        mode = mode.lower()
        self._curve = LearningRateCurve(mode, min_lr, max_lr, num_training_steps)
        if num_training_steps < 1:
            raise ValueError(
                f"`num_training_steps={num_training_steps!r}` must be at least 1: so many rates are tried."
            )
        if not 0 <= min_lr < max_lr or (min_lr == 0 and mode == "exponential"):
            what = f"`min_lr={min_lr!r}` and `max_lr={max_lr!r}` are no range of learning rates for `mode={mode!r}`:"
            raise ValueError(f"{what} the first must be positive (or 0, in mode 'linear'), and the second larger.")
        if early_stop_threshold is not None and early_stop_threshold <= 0:
            what = f"`early_stop_threshold={early_stop_threshold!r}` is no factor of the best loss."
            raise ValueError(f"{what} Use a number above 1, or None to try all rates.")
        self._early_stop_threshold = early_stop_threshold
        self._update_attr = update_attr
        self._attr_name = attr_name
        self._early_exit = False
        self.optimal_lr: LearningRateCurve | None = None
        self.suggested_rate: float | None = None  # that was set, if one was

    def end_run_after_search(self) -> None:
        """Lets the run end when the search is over, as `Tuner` wants it."""
        self._early_exit = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lr_find(trainer, pl_module)

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches now; for hooks of subclasses, between two batches of training.

        The result is in `optimal_lr`; None in a `fast_dev_run`.
        """
        self.optimal_lr = None
        if trainer.fast_dev_run:
            rank_zero_warn("Skipping learning rate finder since `fast_dev_run` is enabled.")
        else:
            self._search_rates(trainer, pl_module)
        if self._early_exit:
            raise _TunerExitException

    def _search_rates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = _find_rate_attribute(pl_module, self._attr_name) if self._update_attr else ""
        optimizer = _only_optimizer(trainer)
        made_with = self._curve
        curve = LearningRateCurve(made_with.mode, made_with.lr_min, made_with.lr_max, made_with.num_training)
        sweep = RateSweep(optimizer, curve.rates(), self._early_stop_threshold, _open_bar(trainer, curve.num_training))
        try:
            with trainer.open_trials([sweep], limit_val_batches=0) as trials:
                batches_before = trainer.progress.batches
                trials.run_loop()
                num_batches = trainer.progress.batches - batches_before
        finally:
            sweep.close_bar()
        if trials.interrupted:
            return
        count = len(sweep.losses)
        if count < curve.num_training:
            why = "the loss diverged" if sweep.diverged else "there were no more batches"
            rank_zero_info(f"The search for a learning rate ended after {count} of {curve.num_training} steps: {why}.")
        curve.record_losses(sweep.losses, num_batches)
        self.optimal_lr = curve
        self.suggested_rate = curve.suggestion() if self._update_attr else None
        if self.suggested_rate is not None:
            lightning_setattr(pl_module, name, self.suggested_rate)
            set_learning_rate(optimizer, trainer.lr_scheduler_configs, self.suggested_rate)
            rank_zero_info(f"Learning rate set to {self.suggested_rate}")

    def apply_suggestion(self, module: LightningModule) -> None:
        """Sets the attribute where the search was made in other processes; where it was made here, it has it already."""
        if self.suggested_rate is not None:
            lightning_setattr(module, _find_rate_attribute(module, self._attr_name), self.suggested_rate)


class RateSweep(Callback):
    """Gives each optimizer step the next rate, and notes the loss of its batch.

    Args:
        threshold: see `early_stop_threshold` of `LearningRateFinder`.
        bar: shows how many steps are done; None shows nothing.
    """

    def __init__(self, optimizer: Optimizer, rates: list[float], threshold: float | None, bar: Any = None) -> None:
        self.optimizer = optimizer
        self.rates = rates
        self.losses: list[float] = []  # smoothed
        self.diverged = False
        self._threshold = threshold
        self._bar = bar
        self._mean = 0.0
        self._best: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        set_learning_rate(self.optimizer, (), self.rates[len(self.losses)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.optimization.stepped:
            return
        loss, interrupted = _loss_of_all(trainer, outputs)
        self.losses.append(float("nan") if loss is None else self._smooth_loss(loss))
        if self._bar is not None:
            self._bar.update()
        if self.diverged or interrupted or len(self.losses) == len(self.rates):
            trainer.should_stop = True

    def _smooth_loss(self, loss: float) -> float:
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        smoothed = self._mean / (1 - SMOOTHING ** (len(self.losses) + 2))
        if self._threshold is not None:
            self.diverged = not isfinite(smoothed) or (self._best is not None and smoothed > self._limit(self._best))
        if self._best is None or smoothed < self._best:
            self._best = smoothed
        return smoothed

    def _limit(self, best: float) -> float:
        """Above this the loss has diverged; losses may be negative."""
        assert self._threshold is not None
        return self._threshold * best if best > 0 else best + (self._threshold - 1) * abs(best)

    def close_bar(self) -> None:
        """The search is over."""
        if self._bar is not None:
            self._bar.close()


def _loss_of_all(trainer: Trainer, outputs: STEP_OUTPUT) -> tuple[float | None, bool]:
    """The loss of the batch, as a mean over the ranks that have one; and whether any of them was told to end."""
    given = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    loss = None if given is None else float(given)  # sync: whether to go on depends on it
    interrupted = trainer.signals.pending is not None
    if trainer.world_size == 1:
        return loss, interrupted
    strategy = trainer.strategy
    own = torch.tensor([loss or 0.0, loss is not None, interrupted], dtype=torch.float64, device=strategy.root_device)
    with strategy.allow_collectives():
        total, count, told = strategy.reduce(own, reduce_op="sum").tolist()
    return total / count if count else None, bool(told)


def _find_rate_attribute(module: LightningModule, name: str) -> str:
    """The name of the attribute that holds the learning rate."""
    if name and not lightning_hasattr(module, name):
        what = f"`attr_name={name!r}` was given for the learning rate, but could not find this as a field in"
        raise AttributeError(f"{what} `model`, `model.hparams`, or the datamodule.{suggest_name(name, vars(module))}")
    found = [name] if name else [known for known in RATE_NAMES if lightning_hasattr(module, known)]
    if not found:
        what = f"The learning rate that was found has no place to go: `{type(module).__name__}` or its `hparams`"
        fix = "Name another one with `attr_name`, or only look: `update_attr=False`."
        raise AttributeError(f"{what} should have one of these fields: {RATE_NAMES}. {fix}")
    return found[0]


def _only_optimizer(trainer: Trainer) -> Optimizer:
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        what = f"`configure_optimizers` returned {len(optimizers)} optimizers, and the learning rate finder"
        raise MisconfigurationException(f"{what} only works with single optimizer. Search for each of them by itself.")
    if isinstance(optimizers[0], NoOptimizer):
        what = "`configure_optimizers` returned None: there is no learning rate to search for."
        raise MisconfigurationException(f"{what} Return an optimizer.")
    return optimizers[0]


def _open_bar(trainer: Trainer, total: int) -> Any:
    """A bar of its own, where the run would have one."""
    bar = trainer.progress_bar_callback
    if bar is None or not bar.is_enabled or not trainer.is_global_zero or not is_installed("tqdm"):
        return None
    tqdm: Callable[..., Any] = import_optional("tqdm.auto", "to show the search").tqdm
    return tqdm(desc="Finding best initial lr", total=total)
