"""Averages of weights over training: `StochasticWeightAveraging`, `WeightAveraging` and `EMAWeightAveraging`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from inspect import isgenerator
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR

from fulmen.callbacks.callback import Callback
from fulmen.engine.dtensor import gather_full
from fulmen.utilities.errors import MisconfigurationException, suggestion
from fulmen.utilities.modules import local_part, set_module_flags, spread_like
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import LRSchedulerConfig, TrainerFn

if TYPE_CHECKING:
    from fulmen.loops.fit import FitLoop
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

    AverageFn = Callable[[Tensor, Tensor, Tensor], Tensor]
    MultiAverageFn = Callable[[list[Tensor], list[Tensor], Tensor], None]

# Elements that are averaged in one go: bounds the memory for what a formula computes in between.
CHUNK = 2**26


class Average:
    """Values kept beside those of a module's parameters and buffers, in their order; in float32 where those are half.

    There are none before the first update. Between `show` and `hide` the module has them, and `current` what it had.
    Of tensors that are spread over processes, each process has its part.

    Arguments:
        device: where the values are; None is where each tensor of the module is.
        buffers: average the buffers too. Else theirs are copies, as of the last update.
        strategy: knows how a checkpoint holds tensors that are spread.
    """

    def __init__(self, module: Module, device: Any, buffers: bool, strategy: Any) -> None:
        self.module, self.device, self.strategy = module, device, strategy
        self.count = 0  # updates so far
        self.values: list[Tensor] | None = None
        self.current: list[Tensor] | None = None
        found: dict[int, Tensor] = {}
        # Where each tensor is found, not the tensor: an assignment `self.buffer = ...` replaces it.
        self.slots: list[tuple[dict[str, Any], str]] = []
        for kind in ("_parameters", "_buffers"):
            for owner in (getattr(part, kind) for part in module.modules()):
                for name, tensor in owner.items():
                    if tensor is not None and id(tensor) not in found:
                        found[id(tensor)] = tensor
                        self.slots.append((owner, name))
            if kind == "_parameters":
                self.num_parameters = len(self.slots)
        self.num_averaged = len(self.slots) if buffers else self.num_parameters
        # While a layer computes, its parameters stand where these are.
        self.spread = {i: tensor for i, tensor in enumerate(found.values()) if hasattr(tensor, "to_local")}
        index = {key: i for i, key in enumerate(found)}
        named = Module.state_dict(module, keep_vars=True)  # the class's: an override may know no `keep_vars`
        self.names = {name: index[id(tensor)] for name, tensor in named.items() if id(tensor) in index}

    def live(self) -> list[Tensor]:
        """The tensors of the module, or what this process has of them."""
        tensors = [owner[name] for owner, name in self.slots]
        for i, tensor in self.spread.items():
            tensors[i] = local_part(tensor.detach())
        return tensors

    def parameters(self) -> list[Tensor]:
        """The values of the module's parameters."""
        return (self.values or [])[: self.num_parameters]

    @torch.no_grad()
    def load(self, values: Sequence[Tensor] | None) -> None:
        """Takes copies of these values, one per tensor of the module."""
        if values is None:
            self.values = None
            return
        placed: list[Tensor] = []
        chunks: dict[Any, list[int]] = {}
        elements = 0
        for i, (tensor, value) in enumerate(zip(self.live(), values)):
            dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
            own = torch.empty_like(tensor, dtype=dtype, device=self.device or tensor.device).copy_(local_part(value))
            placed.append(own)
            if i < self.num_averaged:
                key = (own.device, own.dtype, tensor.device, tensor.dtype, elements // CHUNK)
                chunks.setdefault(key, []).append(i)
                elements += own.numel()
        self.values, self.chunks = placed, [(key[:2] == key[2:4], members) for key, members in chunks.items()]

    def load_named(self, state: Mapping[str, Any]) -> None:
        """Takes the values from a state dict of the module; what it lacks is taken from the module."""
        values = self.live()
        for name, i in self.names.items():
            values[i] = state.get(name, values[i])
        self.load(values)

    @torch.no_grad()
    def update(self, formula: MultiAverageFn) -> None:
        """Lets the module's values count once more; the first time, they are the average."""
        live, values, count = self.live(), self.values, torch.tensor(self.count)
        self.count += 1
        if values is None:
            self.load(live)
            return
        for alike, members in self.chunks:
            averaged, current = [values[i] for i in members], [live[i] for i in members]
            if not alike:  # sync: if the average is on another device
                current = [tensor.to(own.device, own.dtype) for own, tensor in zip(averaged, current)]
            formula(averaged, current, count)
        _copy(values[self.num_averaged :], live[self.num_averaged :])

    @torch.no_grad()
    def show(self) -> None:
        """Puts the average into the module, if there is one, until `hide`."""
        if self.values is not None and self.current is None:
            live = self.live()
            self.current = [t.detach().to(self.device or t.device, copy=True) for t in live]
            _copy(live, self.values)

    @torch.no_grad()
    def hide(self) -> None:
        """Puts back, to the bit, what `show` replaced."""
        if self.current is not None:
            _copy(self.live(), self.current)
            self.current = None

    def put_into(self, state: Any, tensors: list[Tensor] | None) -> Any:
        """A copy of a state dict of the module that has these tensors instead of the module's; all processes call it."""
        state = copy(state)
        if tensors is not None:
            named = {name: spread_like(tensors[i], self.spread.get(i)) for name, i in self.names.items()}
            saved = self.strategy.state_to_save(named)
            state.update({name: value for name, value in saved.items() if name in state})
        return state

    def retire(self) -> None:
        """Training is over: frees the memory of devices. What was spread over processes is whole on the first one."""
        self.device, keep = torch.device("cpu"), self.strategy.is_global_zero

        def on_cpu(tensors: list[Tensor] | None) -> list[Tensor] | None:
            if tensors is not None and self.spread:
                tensors = [
                    gather_full(spread_like(tensor, self.spread.get(i)), keep) for i, tensor in enumerate(tensors)
                ]
                tensors = tensors if keep else None
            return tensors and [tensor.cpu() for tensor in tensors]

        self.values, self.current, self.spread = on_cpu(self.values), on_cpu(self.current), {}


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def equally(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """`averaged + (current - averaged) / (num_averaged + 1)`: all updates count the same."""
    change = torch._foreach_div(torch._foreach_sub(current, averaged), int(num_averaged) + 1)
    torch._foreach_copy_(averaged, torch._foreach_add(change, averaged))


def exponentially(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor, decay: float) -> None:
    """`decay * averaged + (1 - decay) * current`: the older an update is, the less it counts."""
    new = torch._foreach_mul(current, 1 - decay)
    if averaged[0].is_floating_point() or averaged[0].is_complex():
        torch._foreach_mul_(averaged, decay)
        torch._foreach_add_(averaged, new)
    else:  # counters
        torch._foreach_copy_(averaged, torch._foreach_add(new, torch._foreach_mul(averaged, decay)))


def one_by_one(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor, avg_fn: AverageFn) -> None:
    """Applies the formula for one tensor to each of them."""
    for own, tensor in zip(averaged, current):
        own.copy_(avg_fn(own, tensor.detach(), num_averaged))


class WeightAveraging(Callback):
    """Follows the weights with an average, validates with it, and leaves it in the module when training ends.

    The average follows each optimizer step that `should_update` names, unless it was left out, by a loss scaler or a
    `NonFiniteGuard`. Before the first there is no average: validation and checkpoints are of the weights themselves.

    A checkpoint has the average in "state_dict", and in "current_model_state" the weights that training goes on with.
    For weights in float16 or bfloat16, the average is kept and stored in float32, as it would stand still otherwise:
    small changes are lost to rounding. Validation runs with it rounded to the dtype of the weights.

    Arguments:
        device: where the average is; by default, where the weights are. Otherwise each update waits for a copy.
        use_buffers: average the buffers as well, such as statistics of batch norm. Else they are as of the last update.
        avg_fn: gives the new average of a tensor from `(averaged, current, num_averaged)`, element by element, as each
            process has only a part of what is spread; by default all updates count equally.
        multi_avg_fn: the same for a list of tensors, changed in place.
    """

    def __init__(
        self, device: torch.device | str | int | None = None, use_buffers: bool = True, *,
        avg_fn: AverageFn | None = None, multi_avg_fn: MultiAverageFn | None = None,
    ) -> None:  # fmt: skip
        if avg_fn is not None and multi_avg_fn is not None:
            what = f"`{type(self).__name__}` received `avg_fn` and `multi_avg_fn`, two formulas for one average."
            raise ValueError(f"{what} Keep one of them.")
        self._device = torch.device(device) if isinstance(device, str) else device
        self._use_buffers = use_buffers
        self._formula = multi_avg_fn or (partial(one_by_one, avg_fn=avg_fn) if avg_fn is not None else equally)
        self._average: Average | None = None
        self._stored: tuple[Any, int] | None = None  # average and number of updates, from a checkpoint
        self._resumed = False
        self._progress: Any = None  # the counters of the run
        self._latest_update_step = 0  # steps that the average has seen, followed or not

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the average follows after this step, or at the end of this epoch (both from 0); override it to choose.

        The answer must depend on the arguments only, or a resumed run is another run.
        """
        return step_idx is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            kinds = (WeightAveraging, StochasticWeightAveraging)
            names = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, kinds)]
            if len(names) > 1:  # each would take the other's average for the weights
                what = f"`callbacks` holds {', '.join(names)}, and a module can be replaced by one average only."
                raise MisconfigurationException(f"{what} Keep one of them.")
            self._average, self._stored, self._resumed, self._latest_update_step = None, None, False, 0
        elif self._average is not None and self._average.module is not pl_module:
            self._average = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now all layers exist, on the device and in the dtype of the run.
        self._average = Average(pl_module, self._device, self._use_buffers, trainer.strategy)
        self._progress = trainer.fit_loop.progress
        self._take_stored()

    def _take_stored(self) -> None:
        if self._average is not None and self._stored is not None:
            (state, self._average.count), self._stored = self._stored, None
            if self._average.count > 0:
                self._average.load_named(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:
            self._follow(trainer)  # the file may have been written after a step, and before the average followed
        else:
            self._latest_update_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._follow(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._average.update(self._formula)  # type: ignore[union-attr]

    def _follow(self, trainer: Trainer) -> None:
        """One update for the steps since the last look, if one of them is due."""
        latest, steps = self._latest_update_step, self._progress.steps
        if steps == latest:
            return
        self._latest_update_step = steps
        if not any(self.should_update(step_idx=step) for step in range(latest, steps)):
            return
        # sync: only where a loss scaler leaves the decision to a fused optimizer
        skipped = steps - latest == 1 and trainer.strategy.precision_plugin.skipped
        if not skipped and len(trainer.fit_loop.optimization.idle()) < len(trainer.optimizers):
            self._average.update(self._formula)  # type: ignore[union-attr]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None and trainer.state.fn == TrainerFn.FITTING:
            self._average.show()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None and trainer.state.fn == TrainerFn.FITTING:
            self._average.hide()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What the module had is kept, so that a checkpoint written after fit can be resumed exactly.
        self._average.show()  # type: ignore[union-attr]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._average.show()  # a run that was resumed after its last epoch did not train
            self._average.retire()

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step, self._resumed = state_dict["latest_update_step"], True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (average := self._average) is None:
            rank_zero_info(f"`{type(self).__name__}`: this checkpoint is not of a training run, and has no average.")
            return
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = average.put_into(state, average.current)
        checkpoint["state_dict"] = average.put_into(state, average.values)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(average.count)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        name = f"`{type(self).__name__}`"
        if trainer.state.fn != TrainerFn.FITTING:
            rank_zero_info(f"{name}: without training, only the weights in the checkpoint's `state_dict` are loaded.")
        elif "current_model_state" not in checkpoint:
            rank_zero_warn(f"{name}: the checkpoint was saved without an average. It starts from the weights in there.")
        else:
            # `state_dict`, the average, is in the module already.
            current = {"state_dict": checkpoint["current_model_state"]}
            trainer.strategy.load_model_state_dict(current, strict=pl_module.strict_loading)
            average = trainer.strategy.state_from_checkpoint(checkpoint["state_dict"])
            self._stored = average, int(checkpoint["averaging_state"]["n_averaged"])
            self._take_stored()

    def weights_to_save(self, state_dict: Any) -> Any:
        """What a file of weights only holds: the average, which validation saw."""
        return state_dict if self._average is None else self._average.put_into(state_dict, self._average.values)

    def weights_state(self) -> dict[str, Any]:
        """All that makes up the average, as live references: copy it to come back to it with `load_weights_state`."""
        values, count = (None, 0) if self._average is None else (self._average.values, self._average.count)
        return {"average": values, "n_averaged": count}

    def load_weights_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `weights_state` gave, during the same run. Steps made until now are not followed."""
        if self._average is not None:
            self._average.load(state["average"])
            self._average.count, self._latest_update_step = state["n_averaged"], self._progress.steps

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_average": None, "_stored": None, "_progress": None}  # of a run and its process


class EMAWeightAveraging(WeightAveraging):
    """A `WeightAveraging` in which older weights count less: ``average = decay * average + (1 - decay) * weights``.

    Arguments:
        update_every_n_steps: with 3, the average follows the steps 0, 3, 6, ...; with 0, none.
        update_starting_at_step: the first step that may be followed.
        update_starting_at_epoch: from this epoch on, the average also follows the end of each epoch.
    """

    def __init__(
        self, device: torch.device | str | int | None = None, use_buffers: bool = True, decay: float = 0.999,
        update_every_n_steps: int = 1, update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not 0 <= decay <= 1:
            what = f"`EMAWeightAveraging(decay={decay})`: it is the share of the average that is kept."
            raise ValueError(f"{what} Use a number between 0 and 1, such as 0.999.")
        super().__init__(device, use_buffers, multi_avg_fn=partial(exponentially, decay=decay), **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        every, first = self.update_every_n_steps, self.update_starting_at_step or 0
        if step_idx is not None and every > 0 and step_idx >= first and step_idx % every == 0:
            return True
        first_epoch = self.update_starting_at_epoch
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch


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
        annealing_epochs, annealing_strategy: over how many epochs, and along which curve, "cos" or "linear".
        avg_fn: gives the new average of a tensor from `(averaged, current, num_averaged)`; by default all count equally.
        device: where the average is; None is where the weights are.
    """

    def __init__(
        self, swa_lrs: float | list[float], swa_epoch_start: int | float = 0.8, annealing_epochs: int = 10,
        annealing_strategy: str = "cos", avg_fn: AverageFn | None = None,
        device: torch.device | str | None = torch.device("cpu"),  # noqa: B008
    ) -> None:  # fmt: skip
        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        start, kind = swa_epoch_start, type(swa_epoch_start)
        if not rates or not all(isinstance(rate, float) and rate > 0 for rate in rates):
            raise _refused("swa_lrs", swa_lrs, "a positive float, or a list of them")
        if not (kind is int and start >= 1) and not (kind is float and 0 <= start <= 1):
            raise _refused("swa_epoch_start", start, "an integer of 1 or more, or a float between 0 and 1")
        if type(annealing_epochs) is not int or annealing_epochs < 0:
            raise _refused("annealing_epochs", annealing_epochs, "an integer of 0 or more")
        if annealing_strategy not in ("cos", "linear"):
            near = suggestion(str(annealing_strategy), ("cos", "linear"))
            raise _refused("annealing_strategy", annealing_strategy, "'cos' or 'linear'", near)
        if avg_fn is not None and not callable(avg_fn):
            raise _refused("avg_fn", avg_fn, "a function of (averaged, current, num_averaged)")
        if device is not None and not isinstance(device, (torch.device, str)):
            raise _refused("device", device, "a `torch.device` or the name of one")
        self._swa_lrs, self._swa_epoch_start, self._device = swa_lrs, swa_epoch_start, device
        self._annealing_epochs, self._annealing_strategy = annealing_epochs, annealing_strategy
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
        self._limit, self._learning = Replaced(), Replaced()  # to make room for that epoch, and in it

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
            self._forget_run()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers, configs, limit = len(trainer.optimizers), len(trainer.lr_scheduler_configs), trainer.max_epochs
        if optimizers != 1 or configs > 1:
            what = f"`configure_optimizers` returned {optimizers} optimizers and {configs} schedulers."
            why = "`StochasticWeightAveraging` puts one scheduler in the place of another"
            raise MisconfigurationException(f"{what} {why}. Return one optimizer and at most one scheduler.")
        rates, groups = self._swa_lrs, len(trainer.optimizers[0].param_groups)
        if isinstance(rates, list) and len(rates) < groups:
            raise _refused("swa_lrs", rates, f"one number, or a list of {groups}, one for each group of parameters")
        if limit == -1:
            limit = None
        if limit is None and isinstance(self._swa_epoch_start, float):
            what = f"`StochasticWeightAveraging(swa_epoch_start={self._swa_epoch_start})` is a part of `max_epochs`,"
            raise MisconfigurationException(f"{what} and there is no limit. Use an integer, or set `max_epochs`.")
        self._max_epochs = inf if limit is None else limit
        if limit is not None and self.pl_module_contains_batch_norm(pl_module):
            self._limit.put(trainer, "max_epochs", limit + 1)
        self._average = Average(pl_module, self._device, False, trainer.strategy)
        if self._stored.get("n_averaged"):
            self.n_averaged = torch.tensor(self._stored["n_averaged"])
            self._average.load_named(self._stored["average_model_state"])
        if self._stored.get("scheduler_state"):  # the scheduler that the checkpoint has the state of
            self._scheduler = put_swalr(trainer, self._swa_lrs, self._annealing_epochs, self._annealing_strategy)
        self._measured, self._stored = self._stored.get("momenta", {}), {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measuring = self._measuring and trainer.current_epoch == self.swa_end + 1
        if self._measuring:  # resumed inside that epoch, with what was measured until then
            set_module_flags(pl_module, self._measured)
            self.momenta = as_means(pl_module)
            only_forward(trainer, self._learning)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, average = trainer.current_epoch, self._average
        assert average is not None
        if self.swa_start <= epoch <= self.swa_end:
            if self._scheduler is None:
                self._scheduler = put_swalr(trainer, self._swa_lrs, self._annealing_epochs, self._annealing_strategy)
                trainer.fit_loop.schedulers.any = True
            if epoch > self._latest_update_epoch:
                if average.values is None:
                    average.load(average.live())
                    self.n_averaged = torch.tensor(0)
                self.update_parameters(average, pl_module, self.n_averaged, self._avg_fn)
                self._latest_update_epoch = epoch
        elif epoch == self.swa_end + 1 and average.values is not None:
            self.transfer_weights(average, pl_module)
            self.reset_batch_norm_and_save_state(pl_module)
            only_forward(trainer, self._learning)
            self._measuring = True

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self._learning.undo()
        self.reset_momenta()
        self._measuring = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, last = "`StochasticWeightAveraging`", trainer.current_epoch - 1
        if self._transfer_if_complete(trainer, pl_module) and self.pl_module_contains_batch_norm(pl_module):
            what = f"{name}: training was stopped before the statistics of batch norm were measured for the mean."
            rank_zero_warn(f"{what} Call `torch.optim.swa_utils.update_bn(loader, model)`.")
        elif last < self.swa_end < inf:
            what = f"{name}: training ended after epoch {last}, and the mean is complete after epoch {self.swa_end}."
            rank_zero_warn(f"{what} The module keeps its own weights. Let training reach `max_epochs`.")
        self._limit.undo()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._transfer_if_complete(trainer, pl_module)  # a run that was resumed after its last epoch did not train
        self._limit.undo()
        if self._average is not None:
            self._average.retire()

    def _transfer_if_complete(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Puts the mean into the module if the last epoch is over, and none followed that measured statistics."""
        complete = trainer.current_epoch - 1 == self.swa_end or self.swa_end == inf
        if not complete or self._average is None or self._average.values is None:
            return False
        self.transfer_weights(self._average, pl_module)
        return True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._learning.undo()
        self.reset_momenta()
        self._limit.undo()

    def reset_batch_norm_and_save_state(self, pl_module: Module) -> None:
        """Statistics start again, as means over all batches, until `reset_momenta`."""
        self.momenta = self.momenta or as_means(pl_module)
        for layer in self.momenta:
            layer.reset_running_stats()

    def reset_momenta(self) -> None:
        """Statistics are moving means again."""
        for layer, momentum in self.momenta.items():
            layer.momentum = momentum
        self.momenta = {}

    @staticmethod
    @torch.no_grad()
    def update_parameters(average_model: Any, model: Module, n_averaged: Any, avg_fn: AverageFn) -> None:
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
    def transfer_weights(src_pl_module: Any, dst_pl_module: Module) -> None:
        """Copies the parameters of one module into those of the other."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters()):
            target.copy_(source)  # sync: if they are on different devices

    def state_dict(self) -> dict[str, Any]:
        average, weights = self._average, None
        if average is not None:  # before the first update the weights themselves: readers of such files expect some
            weights = average.put_into(average.module.state_dict(), average.values)
        return {
            "n_averaged": 0 if self.n_averaged is None else int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._scheduler is None else self._scheduler.state_dict(),
            "average_model_state": weights,
            "measuring": self._measuring,
            "momenta": {} if average is None else self._paths_of_momenta(average.module),
        }

    def _paths_of_momenta(self, module: Module) -> dict[str, float | None]:
        named = module.named_modules()
        return {f"{path}.momentum": self.momenta[part] for path, part in named if part in self.momenta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored, self._latest_update_epoch = state_dict, state_dict["latest_update_epoch"]
        self._measuring = state_dict.get("measuring", False)

    def weights_state(self) -> dict[str, Any]:
        """All that makes up the average, as live references: copy it to come back to it with `load_weights_state`."""
        values = None if self._average is None else self._average.values
        return {"average": values, "n_averaged": self.n_averaged, "latest_update_epoch": self._latest_update_epoch}

    def load_weights_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `weights_state` gave, during the same run."""
        if self._average is not None:
            self._average.load(state["average"])
            self.n_averaged = None if state["n_averaged"] is None else state["n_averaged"].clone()
            self._latest_update_epoch = state["latest_update_epoch"]

    def __getstate__(self) -> dict[str, Any]:
        of_run = {"_average": None, "_scheduler": None, "_limit": Replaced(), "_learning": Replaced()}
        return {**vars(self), **of_run, "_stored": {}, "momenta": {}}  # of a run and its process


class Replaced(list[tuple[Any, str, Any]]):
    """Attributes that have another value for a while: owner, name, value before."""

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replaces one."""
        self.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """All are as they were."""
        while self:
            setattr(*self.pop())


def put_swalr(trainer: Trainer, rates: Any, epochs: int, strategy: Any) -> SWALR:
    """The scheduler of the last epochs, in the place of the module's."""
    configs, name = trainer.lr_scheduler_configs, "`StochasticWeightAveraging`"
    if configs:
        old, kind = configs[0], type(configs[0].scheduler).__name__
        if (old.interval, old.frequency) != ("epoch", 1):
            every = f"every {old.frequency} {old.interval}(s)"
            rank_zero_warn(f"{name}: {kind} was stepped {every}, and SWALR, in its place, is once per epoch.")
        rank_zero_info(f"{name} puts SWALR in the place of the scheduler {kind}.")
    scheduler = SWALR(trainer.optimizers[0], rates, epochs, strategy)
    configs[:] = [LRSchedulerConfig(scheduler)]  # in place: the loop holds this list
    return scheduler


def as_means(module: Module) -> dict[_BatchNorm, float | None]:
    """Lets statistics of batch norm be means over all batches, except in eval mode. Returns the momenta they had."""
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = {layer: layer.momentum for layer in layers if layer.training and layer.track_running_stats}
    for layer in momenta:
        layer.momentum = None
    return momenta


def only_forward(trainer: Trainer, replaced: Replaced) -> None:
    """From now on, batches go through the module and nothing learns from them."""
    if not replaced:
        replaced.put(trainer.fit_loop.optimization, "run", partial(forward, trainer.fit_loop))
        # With manual optimization, `training_step` itself goes backward and steps.
        replaced.put(trainer.strategy, "run_backward", lambda *_, **__: None)
        for optimizer in trainer.lightning_optimizers:
            replaced.put(optimizer, "_run_step", _only_closure)


def forward(loop: FitLoop, batch: Any, batch_idx: int) -> Any:
    """Stands in for the optimization of a batch: `training_step` alone. The last batch counts as a step."""
    optimization, strategy = loop.optimization, loop.trainer.strategy
    loop.trainer.book.hook = "training_step"
    context = optimization.context or nullcontext
    with context(), strategy.no_backward_sync(strategy.model):
        output = optimization.training_step(batch, batch_idx)
        if isgenerator(output):
            output = {"losses": list(output)}
    # The module is another one than at the last step: a checkpoint of it is not the one that was written then.
    optimization.stepped = loop.feed.is_last  # type: ignore[union-attr]
    loop.progress.steps += int(optimization.stepped)
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    return output if isinstance(output, Mapping) else {}


def _only_closure(optimizer: Any, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
    return closure() if closure is not None else None


def _refused(argument: str, value: Any, allowed: str, hint: str = "") -> MisconfigurationException:
    return MisconfigurationException(f"`StochasticWeightAveraging({argument}={value!r})`: it must be {allowed}.{hint}")
