"""`StochasticWeightAveraging`: the last epochs at a constant learning rate, and the mean of their weights."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.weight_averaging import Average, WeightAveraging, refuse_two_averages
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.modules import set_module_flags
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import LRSchedulerConfig

if TYPE_CHECKING:
    from fulmen.callbacks.weight_averaging import AverageFn
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


class StochasticWeightAveraging(Callback):
    """Trains the last epochs with a constant learning rate, and leaves the mean of their weights in the module.

    From `swa_start` on, the weights at the start of each epoch are averaged, and torch's `SWALR` is the scheduler. Does
    the module have batch norm, one more epoch without backward and steps measures its statistics anew, as
    `torch.optim.swa_utils.update_bn` does; layers in eval mode keep theirs. For checkpoints and loggers it counts as
    one step. For weights in float16 or bfloat16, the average is kept in float32. Method and defaults:
    https://arxiv.org/abs/1803.05407

    Arguments:
        swa_lrs: the learning rate that is annealed to, or a list with one for each parameter group.
        swa_epoch_start: the first epoch, from 1, or the part of `max_epochs` before it.
        annealing_epochs: over how many epochs the learning rate is annealed to `swa_lrs`.
        annealing_strategy: along which curve: "cos" or "linear".
        avg_fn: gives the new average of a tensor from `(averaged, current, num_averaged)`; by default all count equally.
        device: where the average is; None is where the weights are.
    """

    def __init__(
        self, swa_lrs: float | list[float], swa_epoch_start: int | float = 0.8, annealing_epochs: int = 10,
        annealing_strategy: str = "cos", avg_fn: AverageFn | None = None,
        device: torch.device | str | None = torch.device("cpu"),  # noqa: B008
    ) -> None:  # fmt: skip
        _check_arguments(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy)
        if avg_fn is not None and not callable(avg_fn):
            raise _wrong_argument("avg_fn", avg_fn, "a function of (averaged, current, num_averaged)")
        if device is not None and not isinstance(device, (torch.device, str)):
            raise _wrong_argument("device", device, "a `torch.device` or the name of one")
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._device = device
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy = annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._max_epochs: float = 0  # without the epoch that measures statistics
        self.momenta: dict[_BatchNorm, float | None] = {}
        self._forget_run()

    def _forget_run(self) -> None:
        """As before a run."""
        self.n_averaged: Tensor | None = None
        self._latest_update_epoch = -1
        self._average: Average | None = None
        self._scheduler: Any = None
        self._stored: dict[str, Any] = {}
        self._measured: dict[str, Any] = {}  # the momenta of layers whose statistics are being measured
        self._measuring = False  # is this the epoch that measures statistics?
        self._limit: int | None = None  # `max_epochs` of the Trainer, while it is one more for that epoch

    @property
    def swa_start(self) -> int:
        """The first epoch, from 0, at whose start weights are averaged."""
        start = self._swa_epoch_start
        return max(int(self._max_epochs * start if isinstance(start, float) else start) - 1, 0)

    @property
    def swa_end(self) -> int | float:
        """The last epoch at whose start weights are averaged; infinite without `max_epochs`."""
        return self._max_epochs - 1

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: Module) -> bool:
        """Whether there are statistics to measure at the end."""
        return any(isinstance(module, _BatchNorm) for module in pl_module.modules())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            name = type(trainer.strategy).__name__
            if name.startswith(("FSDP", "DeepSpeed", "ModelParallel")):
                what = f"`StochasticWeightAveraging` needs the whole weights on each process, and `{name}` splits them."
                raise MisconfigurationException(f"{what} Use another strategy, or remove the callback.")
            refuse_two_averages([c for c in trainer.callbacks if c is self or isinstance(c, WeightAveraging)])
            self._forget_run()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_optimizers(trainer, self._swa_lrs)
        limit = trainer.max_epochs
        if limit == -1:
            limit = None
        if limit is None and isinstance(self._swa_epoch_start, float):
            what = f"`StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start})` is a part of `max_epochs`,"
            raise MisconfigurationException(f"{what} and there is no limit. Use an integer, or set `max_epochs`.")
        self._max_epochs = inf if limit is None else limit
        if limit is not None and self.pl_module_contains_batch_norm(pl_module):
            self._limit = limit
            trainer.max_epochs = limit + 1
        self._average = Average(pl_module, self._device, False, trainer.strategy)
        if self._stored.get("n_averaged"):
            self.n_averaged = torch.tensor(self._stored["n_averaged"])
            self._average.load_named(self._stored["average_model_state"], self._stored["n_averaged"])
        if self._stored.get("scheduler_state"):  # the scheduler that the checkpoint has the state of
            self._scheduler = _replace_scheduler(
                trainer, self._swa_lrs, self._annealing_epochs, self._annealing_strategy
            )
        self._measured = self._stored.get("momenta", {})
        self._stored = {}

    def _restore_limit(self, trainer: Trainer) -> None:
        """`max_epochs` as it was."""
        if self._limit is not None:
            trainer.max_epochs = self._limit
            self._limit = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring = self._measuring and trainer.current_epoch == self.swa_end + 1
        if self._measuring:  # resumed inside that epoch, with what was measured until then
            set_module_flags(pl_module, self._measured)
            self.momenta = use_cumulative_means(pl_module)
            trainer.optimization.set_forward_only(True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        average = self._average
        assert average is not None
        if self.swa_start <= epoch <= self.swa_end:
            if self._scheduler is None:
                self._scheduler = _replace_scheduler(
                    trainer, self._swa_lrs, self._annealing_epochs, self._annealing_strategy
                )
            if epoch > self._latest_update_epoch:
                if average.values is None or self.n_averaged is None:
                    average.load(average.live_tensors(), 0)
                    self.n_averaged = torch.tensor(0)
                self.update_parameters(average, pl_module, self.n_averaged, self._avg_fn)
                self._latest_update_epoch = epoch
        elif epoch == self.swa_end + 1 and average.values is not None:
            self.transfer_weights(average, pl_module)
            self.reset_batch_norm_and_save_state(pl_module)
            trainer.optimization.set_forward_only(True)
            self._measuring = True

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.optimization.set_forward_only(False)
        self.reset_momenta()
        self._measuring = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = "`StochasticWeightAveraging`"
        last = trainer.current_epoch - 1
        if self._transfer_if_complete(trainer, pl_module) and self.pl_module_contains_batch_norm(pl_module):
            what = f"{name}: training was stopped before the statistics of batch norm were measured for the mean."
            rank_zero_warn(f"{what} Call `torch.optim.swa_utils.update_bn(loader, model)`.")
        elif last < self.swa_end < inf:
            what = f"{name}: training ended after epoch {last}, and the mean is complete after epoch {self.swa_end}."
            rank_zero_warn(f"{what} The module keeps its own weights. Let training reach `max_epochs`.")
        self._restore_limit(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._transfer_if_complete(trainer, pl_module)  # a run that was resumed after its last epoch did not train
        self._restore_limit(trainer)
        if self._average is not None:
            self._average.move_to_cpu()

    def _transfer_if_complete(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Puts the mean into the module if the last epoch is over, and none followed that measured statistics."""
        complete = trainer.current_epoch - 1 == self.swa_end or self.swa_end == inf
        if not complete or self._average is None or self._average.values is None:
            return False
        self.transfer_weights(self._average, pl_module)
        return True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.optimization.set_forward_only(False)
        self.reset_momenta()
        self._restore_limit(trainer)

    def reset_batch_norm_and_save_state(self, pl_module: Module) -> None:
        """Statistics start again, as means over all batches, until `reset_momenta`."""
        self.momenta = self.momenta or use_cumulative_means(pl_module)
        for layer in self.momenta:
            layer.reset_running_stats()

    def reset_momenta(self) -> None:
        """Statistics are moving means again."""
        for layer, momentum in self.momenta.items():
            layer.momentum = momentum
        self.momenta = {}

    @staticmethod
    @torch.no_grad()
    def update_parameters(
        average_model: Module | Average, model: Module, n_averaged: Tensor, avg_fn: AverageFn
    ) -> None:
        """Lets the parameters of ``model`` count once more in those of ``average_model``, and counts ``n_averaged`` up."""
        for averaged, parameter in zip(average_model.parameters(), model.parameters()):
            current = parameter.detach().to(averaged.device, averaged.dtype)  # sync: if on another device
            averaged.copy_(current if n_averaged == 0 else avg_fn(averaged.detach(), current, n_averaged))
        n_averaged += 1

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """The mean over one value more."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    @staticmethod
    @torch.no_grad()
    def transfer_weights(src_pl_module: Module | Average, dst_pl_module: Module) -> None:
        """Copies the parameters of one module into those of the other."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters()):
            target.copy_(source)  # sync: if they are on different devices

    def state_dict(self) -> dict[str, Any]:
        average = self._average
        weights = None
        if average is not None:  # before the first update the weights themselves: readers of such files expect some
            weights = average.put_into_copy(average.module.state_dict(), average.values)
        return {
            "n_averaged": 0 if self.n_averaged is None else int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._scheduler is None else self._scheduler.state_dict(),
            "average_model_state": weights,
            "measuring": self._measuring,
            "momenta": {} if average is None else _momenta_by_path(average.module, self.momenta),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._measuring = state_dict.get("measuring", False)

    def weights_state(self) -> dict[str, Any]:
        """All that makes up the average, as live references: copy it to come back to it with `load_weights_state`."""
        values = None if self._average is None else self._average.values
        return {"average": values, "n_averaged": self.n_averaged, "latest_update_epoch": self._latest_update_epoch}

    def load_weights_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `weights_state` gave, during the same run."""
        if self._average is not None:
            self._average.load(state["average"], self._average.count)
            self.n_averaged = None if state["n_averaged"] is None else state["n_averaged"].clone()
            self._latest_update_epoch = state["latest_update_epoch"]

    def __getstate__(self) -> dict[str, Any]:
        of_run = {"_average": None, "_scheduler": None, "_limit": None}
        return {**vars(self), **of_run, "_stored": {}, "momenta": {}}  # of a run and its process


def _check_arguments(
    swa_lrs: float | list[float], swa_epoch_start: int | float, annealing_epochs: int, annealing_strategy: str
) -> None:
    rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
    if not rates or not all(isinstance(rate, float) and rate > 0 for rate in rates):
        raise _wrong_argument("swa_lrs", swa_lrs, "a positive float, or a list of them")
    if not _is_epoch_or_part(swa_epoch_start):
        expected = "an integer of 1 or more, or a float between 0 and 1"
        raise _wrong_argument("swa_epoch_start", swa_epoch_start, expected)
    if type(annealing_epochs) is not int or annealing_epochs < 0:
        raise _wrong_argument("annealing_epochs", annealing_epochs, "an integer of 0 or more")
    if annealing_strategy not in ("cos", "linear"):
        near = suggest_name(str(annealing_strategy), ("cos", "linear"))
        raise _wrong_argument("annealing_strategy", annealing_strategy, "'cos' or 'linear'", near)


def _is_epoch_or_part(start: int | float) -> bool:
    """Is it the number of an epoch, from 1, or a part of all epochs?"""
    return start >= 1 if type(start) is int else type(start) is float and 0 <= start <= 1


def _check_optimizers(trainer: Trainer, rates: float | list[float]) -> None:
    """Raises if there is not one optimizer with a rate for each group, and at most one scheduler."""
    optimizers = len(trainer.optimizers)
    configs = len(trainer.lr_scheduler_configs)
    if optimizers != 1 or configs > 1:
        what = f"`configure_optimizers` returned {optimizers} optimizers and {configs} schedulers."
        why = "`StochasticWeightAveraging` puts one scheduler in the place of another"
        raise MisconfigurationException(f"{what} {why}. Return one optimizer and at most one scheduler.")
    groups = len(trainer.optimizers[0].param_groups)
    if isinstance(rates, list) and len(rates) < groups:
        raise _wrong_argument("swa_lrs", rates, f"one number, or a list of {groups}, one for each group of parameters")


def _replace_scheduler(trainer: Trainer, rates: float | list[float], epochs: int, strategy: Any) -> SWALR:
    """Puts torch's `SWALR` in the place of the module's scheduler, and returns it."""
    if configs := trainer.lr_scheduler_configs:
        old = configs[0]
        kind = type(old.scheduler).__name__
        if (old.interval, old.frequency) != ("epoch", 1):
            what = f"`StochasticWeightAveraging`: {kind} was stepped every {old.frequency} {old.interval}(s)"
            rank_zero_warn(f"{what}, and SWALR, in its place, is once per epoch.")
        rank_zero_info(f"`StochasticWeightAveraging` puts SWALR in the place of the scheduler {kind}.")
    scheduler = SWALR(trainer.optimizers[0], rates, epochs, strategy)  # type: ignore[arg-type]
    trainer.replace_lr_schedulers([LRSchedulerConfig(scheduler)])
    return scheduler


def _momenta_by_path(module: Module, momenta: dict[_BatchNorm, float | None]) -> dict[str, float | None]:
    named = module.named_modules()
    return {f"{path}.momentum": momenta[part] for path, part in named if part in momenta}


def use_cumulative_means(module: Module) -> dict[_BatchNorm, float | None]:
    """Lets statistics of batch norm be means over all batches, except in eval mode. Returns the momenta they had."""
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = {layer: layer.momentum for layer in layers if layer.training and layer.track_running_stats}
    for layer in momenta:
        layer.momentum = None
    return momenta


def _wrong_argument(argument: str, value: object, allowed: str, hint: str = "") -> MisconfigurationException:
    return MisconfigurationException(f"`StochasticWeightAveraging({argument}={value!r})`: it must be {allowed}.{hint}")
