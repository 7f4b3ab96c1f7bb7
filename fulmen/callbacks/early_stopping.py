"""`EarlyStopping`: ends training when a logged value has stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fulmen.callbacks.callback import Callback
from fulmen.metrics.logbook import explain_missing_metric
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.rank_zero import log, rank_prefixed_message, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


class EarlyStoppingReason(Enum):
    """Which rule ended training."""

    NOT_STOPPED, STOPPING_THRESHOLD, DIVERGENCE_THRESHOLD, PATIENCE_EXHAUSTED, NON_FINITE_METRIC = range(5)


class EarlyStopping(Callback):
    """Ends training once a logged value has stopped getting better.

    It sets ``trainer.should_stop`` after a training epoch, or after a validation when that does not run once per epoch. All
    ranks stop together as soon as one of them wants to. The trainer still completes ``min_epochs`` and ``min_steps``; if
    the value has recovered by then, training continues.

    Args:
        monitor: name of the logged value, as in ``self.log("val_loss", ...)``.
        min_delta: the least change that counts as an improvement; its sign does not matter.
        patience: checks without improvement after which training ends; 0 means the same as 1.
        verbose: say each improvement, and why training ends.
        mode: ``"min"`` if smaller values are better, ``"max"`` if larger ones are.
        strict: a ``monitor`` that nobody logged is an error; else it is ignored, with a warning if ``verbose``.
        check_finite: also end training when the value becomes NaN or infinite.
        stopping_threshold: end training as soon as the value is better than this.
        divergence_threshold: end training as soon as the value is worse than this.
        check_on_train_epoch_end: check after training epochs (True) or after validations (False); None decides by how
            often validation runs.
        log_rank_zero_only: with ``verbose``, only rank 0 speaks.

    Raises:
        MisconfigurationException: ``mode`` is neither ``"min"`` nor ``"max"``.
        TypeError: ``patience`` is not a number.
        RuntimeError: in a run, if ``strict`` and nobody logged ``monitor``.

    Examples:
        >>> stopping = EarlyStopping("val_loss", patience=5)
        >>> stopping.mode, stopping.patience, stopping.wait_count
        ('min', 5, 0)
    """

    monitors = True
    mode_dict: ClassVar[dict[str, Callable[[Any, Any], torch.Tensor]]] = {"min": torch.lt, "max": torch.gt}
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    def __init__(
        self, monitor: str, min_delta: float = 0.0, patience: int = 3, verbose: bool = False, mode: str = "min",
        strict: bool = True, check_finite: bool = True, stopping_threshold: float | None = None,
        divergence_threshold: float | None = None, check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        if mode not in self.mode_dict:
            raise MisconfigurationException(f"`EarlyStopping(mode={mode!r})` is not known. Use 'min' or 'max'.")
        given: Any = patience
        if not isinstance(given, Real):
            raise TypeError(f"`EarlyStopping(patience={patience!r})` must be a number of checks, such as 3.")
        self.monitor = monitor
        self.mode = mode
        self.strict = strict
        self.verbose = verbose
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self._check_on_train_epoch_end = self._given_check = check_on_train_epoch_end
        self._forget_run()

    def _forget_run(self) -> None:
        self.wait_count = self.stopped_epoch = 0
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._requests_stop = False  # for an end, as of the last check
        self._set_should_stop = False  # did it set `trainer.should_stop`, and nobody before it?

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[[Any, Any], torch.Tensor]:
        """``monitor_op(a, b)``: is ``a`` better than ``b``?"""
        return self.mode_dict[self.mode]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._requests_stop = self._set_should_stop = False
        if self._given_check is None:
            once_per_epoch = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
            once_per_epoch = once_per_epoch and trainer.val_check_time_s is None
            self._check_on_train_epoch_end = once_per_epoch or not trainer.enable_validation

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._check_on_train_epoch_end:
            self._check_monitor(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._check_on_train_epoch_end:
            self._check_monitor(trainer)

    def _check_monitor(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            self._complain_of_missing(trainer)
            return
        # sync: the rules need the number
        reason, told = self._apply_rules(torch.as_tensor(metrics[self.monitor]).detach().cpu().squeeze())
        stop = reason is not EarlyStoppingReason.NOT_STOPPED
        if stop:
            self.stopping_reason = reason
            self.stopping_reason_message = told
        rank = trainer.global_rank if trainer.world_size > 1 else None
        if told and self.verbose:
            self._say(told, rank)
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            self._requests_stop = True
            self._set_should_stop = self._set_should_stop or not trainer.should_stop
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
        elif self._requests_stop:
            self._withdraw_request(trainer)

    def _say(self, told: str, rank: int | None) -> None:
        if not (rank and self.log_rank_zero_only):
            log.info(rank_prefixed_message(told, None if self.log_rank_zero_only else rank))

    def _complain_of_missing(self, trainer: Trainer) -> None:
        """Nobody logged what is monitored."""
        asked_by = f"`{type(self).__name__}(monitor={self.monitor!r})`"
        message = explain_missing_metric(trainer.book, asked_by, self.monitor, trainer.callback_metrics)
        if self.strict:
            raise RuntimeError(message)
        if self.verbose:
            rank_zero_warn(message, category=RuntimeWarning)

    def _withdraw_request(self, trainer: Trainer) -> None:
        """Training went on below `min_epochs` or `min_steps`, and there is no reason to stop any more."""
        self._requests_stop = False
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message = None
        alike = trainer.early_stopping_callbacks
        if any(callback._set_should_stop for callback in alike) and not any(
            callback._requests_stop for callback in alike
        ):
            trainer.should_stop = False  # what nobody else asked for
            for callback in alike:
                callback._set_should_stop = False

    def still_stops(self, metrics: Mapping[str, Any]) -> bool:
        """Would the run that is resumed have ended by the arguments of today, too? If not, its end is taken back.

        Args:
            metrics: the values at that end.
        """
        before = self.stopping_reason
        none = EarlyStoppingReason.NOT_STOPPED
        value = metrics.get(self.monitor)
        stops = before is not none
        if before is EarlyStoppingReason.PATIENCE_EXHAUSTED:
            stops = self.wait_count >= self.patience
        elif stops and value is not None:  # sync: once, as a run is resumed
            stops = self._apply_thresholds(torch.as_tensor(value).detach().cpu().squeeze())[0] is not none
        self._requests_stop = self._set_should_stop = stops
        if not stops:
            self.stopping_reason = none
            self.stopping_reason_message = None
            self.stopped_epoch = 0
        return stops

    def _apply_thresholds(self, current: torch.Tensor) -> tuple[EarlyStoppingReason, str | None]:
        """Applies the rules that need no other value."""
        reason = EarlyStoppingReason
        is_better = self.monitor_op
        name = f"`{self.monitor}`"
        stop_at = self.stopping_threshold
        diverged_at = self.divergence_threshold
        better = self.order_dict[self.mode]
        worse = self.order_dict["max" if self.mode == "min" else "min"]
        best = f"the best score was {self.best_score:.3f}"
        if self.check_finite and not torch.isfinite(current):
            return reason.NON_FINITE_METRIC, f"Monitored metric {name} = {current} is not finite; {best}."
        if stop_at is not None and is_better(current, stop_at):
            return reason.STOPPING_THRESHOLD, f"Stopping threshold reached: {name} = {current} {better} {stop_at}."
        if diverged_at is not None and is_better(-current, -diverged_at):
            told = f"Divergence threshold reached: {name} = {current} {worse} {diverged_at}."
            return reason.DIVERGENCE_THRESHOLD, told
        return reason.NOT_STOPPED, None

    def _apply_rules(self, current: torch.Tensor) -> tuple[EarlyStoppingReason, str | None]:
        """Applies all rules in their order; also counts, and remembers the best value."""
        reason = EarlyStoppingReason
        is_better = self.monitor_op
        name = f"`{self.monitor}`"
        alone, told = self._apply_thresholds(current)
        if alone is not reason.NOT_STOPPED:
            return alone, told
        if is_better(current - self.min_delta, self.best_score):
            gain = abs(self.best_score - current)
            by = f" by {gain:.3f} (`min_delta` is {abs(self.min_delta)})" if gain.isfinite() else ""
            self.best_score = current.clone()
            self.wait_count = 0
            return reason.NOT_STOPPED, f"{name} improved{by}; the best value is {current:.3f} now."
        self.wait_count += 1
        if self.wait_count < self.patience:
            return reason.NOT_STOPPED, None
        best = f"the best score was {self.best_score:.3f}"
        told = f"Monitored metric {name} did not improve in {self.wait_count} checks; {best}."
        return reason.PATIENCE_EXHAUSTED, told

    def state_dict(self) -> dict[str, Any]:
        state = {
            "wait_count": self.wait_count, "stopped_epoch": self.stopped_epoch, "best_score": self.best_score,
            "stopping_reason_message": self.stopping_reason_message,
        }  # fmt: skip
        # `patience` is there for those who read it; a resumed run takes the one of its script.
        return {**state, "patience": self.patience, "stopping_reason": self.stopping_reason.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = state_dict["best_score"]
        # Files of older versions do not say why training stopped.
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
