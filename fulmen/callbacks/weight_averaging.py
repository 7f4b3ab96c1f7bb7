"""Averages of weights that follow each step: `WeightAveraging` and `EMAWeightAveraging`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from fulmen.callbacks.callback import Callback
from fulmen.engine.dtensor import gather_full
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import local_part, spread_like
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

    AverageFn = Callable[[Tensor, Tensor, Tensor], Tensor]
    MultiAverageFn = Callable[[list[Tensor], list[Tensor], Tensor], None]

# Elements that are averaged in one go: bounds the memory for what a formula computes in between.
CHUNK = 2**26


class Average:
    """Values kept beside those of a module's parameters and buffers, in their order; in float32 where those are half.

    There are none before the first update. Between `swap_in` and `swap_out` the module has them, and `current` what it had.
    Of tensors that are spread over processes, each process has its part.

    Arguments:
        device: where the values are; None is where each tensor of the module is.
        buffers: average the buffers too. Else theirs are copies, as of the last update.
        strategy: knows how a checkpoint holds tensors that are spread.
    """

    def __init__(
        self, module: Module, device: torch.device | int | str | None, buffers: bool, strategy: Strategy
    ) -> None:
        self.module = module
        self.device = device
        self.strategy = strategy
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

    def live_tensors(self) -> list[Tensor]:
        """The tensors of the module, or what this process has of them."""
        tensors = [owner[name] for owner, name in self.slots]
        for i, tensor in self.spread.items():
            tensors[i] = local_part(tensor.detach())
        return tensors

    def parameters(self) -> list[Tensor]:
        """The values of the module's parameters."""
        return (self.values or [])[: self.num_parameters]

    @torch.no_grad()
    def load(self, values: Sequence[Tensor] | None, count: int) -> None:
        """Takes copies of these values, one per tensor of the module, as those after so many updates."""
        self.count = count
        if values is None:
            self.values = None
            return
        placed: list[Tensor] = []
        chunks: dict[Any, list[int]] = {}
        elements = 0
        for i, (tensor, value) in enumerate(zip(self.live_tensors(), values)):
            dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
            own = torch.empty_like(tensor, dtype=dtype, device=self.device or tensor.device).copy_(local_part(value))
            placed.append(own)
            if i < self.num_averaged:
                key = (own.device, own.dtype, tensor.device, tensor.dtype, elements // CHUNK)
                chunks.setdefault(key, []).append(i)
                elements += own.numel()
        self.values = placed
        self.chunks = [(key[:2] == key[2:4], members) for key, members in chunks.items()]

    def load_named(self, state: Mapping[str, Any], count: int) -> None:
        """Takes the values after so many updates from a state dict of the module; what it lacks, from the module."""
        self.count = count
        if count == 0:
            return
        values = self.live_tensors()
        for name, i in self.names.items():
            values[i] = state.get(name, values[i])
        self.load(values, count)

    @torch.no_grad()
    def update(self, formula: MultiAverageFn) -> None:
        """Lets the module's values count once more; the first time, they are the average."""
        live = self.live_tensors()
        values = self.values
        count = torch.tensor(self.count)
        self.count += 1
        if values is None:
            self.load(live, self.count)
            return
        for alike, members in self.chunks:
            averaged = [values[i] for i in members]
            current = [live[i] for i in members]
            if not alike:  # sync: if the average is on another device
                current = [tensor.to(own.device, own.dtype) for own, tensor in zip(averaged, current)]
            formula(averaged, current, count)
        _copy_tensors(values[self.num_averaged :], live[self.num_averaged :])

    @torch.no_grad()
    def swap_in(self) -> None:
        """Puts the average into the module, if there is one, until `swap_out`."""
        if self.values is not None and self.current is None:
            live = self.live_tensors()
            self.current = [t.detach().to(self.device or t.device, copy=True) for t in live]
            _copy_tensors(live, self.values)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Puts back, to the bit, what `swap_in` replaced."""
        if self.current is not None:
            _copy_tensors(self.live_tensors(), self.current)
            self.current = None

    def put_into_copy(self, state: Any, tensors: list[Tensor] | None) -> Any:
        """A copy of a state dict of the module that has these tensors instead of the module's; all processes call it."""
        state = copy(state)
        if tensors is not None:
            named = {name: spread_like(tensors[i], self.spread.get(i)) for name, i in self.names.items()}
            saved = self.strategy.state_to_save(named)
            state.update({name: value for name, value in saved.items() if name in state})
        return state

    def move_to_cpu(self) -> None:
        """Training is over: frees the memory of devices. What was spread over processes is whole on the first one."""
        self.device = torch.device("cpu")
        keep = self.strategy.is_global_zero

        def on_cpu(tensors: list[Tensor] | None) -> list[Tensor] | None:
            if tensors is not None and self.spread:
                whole = [gather_full(spread_like(tensor, self.spread.get(i)), keep) for i, tensor in enumerate(tensors)]
                tensors = [tensor for tensor in whole if tensor is not None] if keep else None
            return tensors and [tensor.cpu() for tensor in tensors]

        self.values = on_cpu(self.values)
        self.current = on_cpu(self.current)
        self.spread = {}


def _copy_tensors(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def average_equally(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """`averaged + (current - averaged) / (num_averaged + 1)`: all updates count the same."""
    change = torch._foreach_div(torch._foreach_sub(current, averaged), int(num_averaged) + 1)
    torch._foreach_copy_(averaged, torch._foreach_add(change, averaged))


def average_exponentially(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor, decay: float) -> None:
    """`decay * averaged + (1 - decay) * current`: the older an update is, the less it counts."""
    new = torch._foreach_mul(current, 1 - decay)
    if averaged[0].is_floating_point() or averaged[0].is_complex():
        torch._foreach_mul_(averaged, decay)
        torch._foreach_add_(averaged, new)
    else:  # counters
        torch._foreach_copy_(averaged, torch._foreach_add(new, torch._foreach_mul(averaged, decay)))


def average_each(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor, avg_fn: AverageFn) -> None:
    """Applies the formula for one tensor to each of them."""
    for own, tensor in zip(averaged, current):
        own.copy_(avg_fn(own, tensor.detach(), num_averaged))


def refuse_two_averages(callbacks: Sequence[Callback]) -> None:
    """Raises if there are several callbacks that average: each would take the other's average for the weights."""
    if len(callbacks) > 1:
        names = ", ".join(type(callback).__name__ for callback in callbacks)
        what = f"`callbacks` holds {names}, and a module can be replaced by one average only."
        raise MisconfigurationException(f"{what} Keep one of them.")


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
        self._formula = multi_avg_fn or (
            partial(average_each, avg_fn=avg_fn) if avg_fn is not None else average_equally
        )
        self._progress: Any = None  # the counters of the run
        self._forget_run()

    def _forget_run(self) -> None:
        """As before a run."""
        self._average: Average | None = None
        self._stored: tuple[Any, int] | None = None  # average and number of updates, from a checkpoint
        self._resumed = False
        self._latest_update_step = 0  # steps that the average has seen, followed or not

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the average follows after this step, or at the end of this epoch (both from 0); override it to choose.

        The answer must depend on the arguments only, or a resumed run is another run.
        """
        return step_idx is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_two_averages([callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)])
            self._forget_run()
        elif self._average is not None and self._average.module is not pl_module:
            self._average = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now all layers exist, on the device and in the dtype of the run.
        self._average = Average(pl_module, self._device, self._use_buffers, trainer.strategy)
        self._progress = trainer.progress
        self._load_stored()

    def _load_stored(self) -> None:
        if self._average is not None and self._stored is not None:
            self._average.load_named(*self._stored)
            self._stored = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:
            self._update_if_due(trainer)  # the file may have been written after a step, and before the average followed
        else:
            self._latest_update_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._update_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._average.update(self._formula)  # type: ignore[union-attr]

    def _update_if_due(self, trainer: Trainer) -> None:
        """One update for the steps since the last look, if one of them is due."""
        latest = self._latest_update_step
        steps = self._progress.steps
        if steps == latest:
            return
        self._latest_update_step = steps
        if not any(self.should_update(step_idx=step) for step in range(latest, steps)):
            return
        # sync: only where a loss scaler leaves the decision to a fused optimizer
        skipped = steps - latest == 1 and trainer.strategy.precision_plugin.skipped
        if not skipped and len(trainer.optimization.skipped_optimizers()) < len(trainer.optimizers):
            self._average.update(self._formula)  # type: ignore[union-attr]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None and trainer.state.fn == TrainerFn.FITTING:
            self._average.swap_in()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None and trainer.state.fn == TrainerFn.FITTING:
            self._average.swap_out()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What the module had is kept, so that a checkpoint written after fit can be resumed exactly.
        self._average.swap_in()  # type: ignore[union-attr]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._average.swap_in()  # a run that was resumed after its last epoch did not train
            self._average.move_to_cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_update_step = state_dict["latest_update_step"]
        self._resumed = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (average := self._average) is None:
            rank_zero_info(f"`{type(self).__name__}`: this checkpoint is not of a training run, and has no average.")
            return
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = average.put_into_copy(state, average.current)
        checkpoint["state_dict"] = average.put_into_copy(state, average.values)
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
            self._load_stored()

    def weights_to_save(self, state_dict: Any) -> Any:
        """What a file of weights only holds: the average, which validation saw."""
        return state_dict if self._average is None else self._average.put_into_copy(state_dict, self._average.values)

    def weights_state(self) -> dict[str, Any]:
        """All that makes up the average, as live references: copy it to come back to it with `load_weights_state`."""
        average = self._average
        return {
            "average": None if average is None else average.values,
            "n_averaged": 0 if average is None else average.count,
        }

    def load_weights_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `weights_state` gave, during the same run. Steps made until now are not followed."""
        if self._average is not None:
            self._average.load(state["average"], state["n_averaged"])
            self._latest_update_step = self._progress.steps

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
        super().__init__(device, use_buffers, multi_avg_fn=partial(average_exponentially, decay=decay), **kwargs)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        every = self.update_every_n_steps
        first = self.update_starting_at_step or 0
        if step_idx is not None and every > 0 and step_idx >= first and step_idx % every == 0:
            return True
        first_epoch = self.update_starting_at_epoch
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch
