"""`NonFiniteGuard`: finds a loss or a gradient that is not finite, and stops, skips the step, or goes back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.callbacks.callback import Callback
from fulmen.engine.precision import MixedPrecision
from fulmen.metrics.logbook import capture_sums
from fulmen.metrics.torchmetrics_state import capture_metrics
from fulmen.storage.filesystem import atomic_write, ensure_dir
from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.modules import capture_buffers, local_part
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.types import TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

POLICIES = ("stop", "skip", "rollback")
# Halved so often, a loss scale of any use is below one: gradients that are still not finite are so by themselves.
SKIPS_OF_A_DEAD_RUN = 24


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not finite. ``fault`` says where."""

    def __init__(self, message: str, fault: Fault | None = None) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass
class Fault:
    """Where something was not finite; plain values, kept in checkpoints."""

    epoch: int
    batch_idx: int
    step: int  # `trainer.global_step` before the step that was, or would have been, made with it
    loss: bool  # was the loss itself not finite?
    parameter: str | None = None  # of those whose gradient is not finite, the nearest to the loss
    num_parameters: int = 0  # how many there are of them
    rank: int | None = None  # whose batch it was; None for one process

    def __str__(self) -> str:
        where = f"epoch {self.epoch}, batch {self.batch_idx}, step {self.step}"
        where += "" if self.rank is None else f", rank {self.rank}"
        found = ["the loss"] if self.loss else []
        if self.parameter is not None:
            more = f" (and of {self.num_parameters - 1} more)" if self.num_parameters > 1 else ""
            found.append(f"the gradient of `{self.parameter}`{more}")
        verb = "are" if len(found) + self.num_parameters > 2 else "is"
        return f"{where}: {' and '.join(found)} {verb} not finite"


@dataclass
class _Check:
    """A check made on the device that nobody has read yet."""

    epoch: int
    batch_idx: int
    step: int
    bad: Tensor  # one bool, on the device
    names: Sequence[str] = ()  # of the parameters in `each`; none for a loss
    each: Tensor | None = None


class NonFiniteGuard(Callback):
    """Finds a loss or a gradient that is not finite, and stops, skips the step, or goes back.

    Every loss and every gradient is checked on the device; the answers are read once per ``every_n_steps`` steps, before
    validation, and before a checkpoint is written, so that neither sees a broken model. Under a loss scaler gradients may
    overflow, which the scaler answers; then losses are checked, and that steps are made at all.

    Args:
        policy: ``"stop"`` raises `NonFiniteError`, which names the step, the batch and the parameter. ``"skip"`` leaves out the
            step; this has to be known before it, so the answer is read at each. ``"rollback"`` returns to the weights,
            optimizers and schedulers of the last reading, kept in memory, and continues with the next batch. Under both,
            buffers, metrics and the values of the epoch are as if the batches of that step had not been there.
        every_n_steps: optimizer steps between two readings, each of which waits for the device once.
        max_in_a_row: so many faults, with nothing good in between, end the run under every policy.
        dirpath: folder where batches that were skipped or rolled back are written (``torch.load`` reads them). The batches
            since the last reading are kept alive for that.

    Raises:
        MisconfigurationException: an unknown ``policy``, or a number below 1.
        NonFiniteError: in a run, as said above.

    Examples:
        >>> NonFiniteGuard("skip").every_n_steps
        1
    """

    def __init__(
        self, policy: str = "stop", every_n_steps: int = 50, max_in_a_row: int = 5, dirpath: str | None = None
    ) -> None:
        if policy not in POLICIES:
            known = f"`NonFiniteGuard(policy={policy!r})`: the policies are {', '.join(map(repr, POLICIES))}."
            raise MisconfigurationException(known + suggest_name(str(policy), POLICIES))
        for name, value in (("every_n_steps", every_n_steps), ("max_in_a_row", max_in_a_row)):
            if type(value) is not int or value < 1:
                raise MisconfigurationException(f"`NonFiniteGuard({name}={value!r})`: use a whole number from 1 on.")
        self.policy = policy
        self.max_in_a_row = max_in_a_row
        self.dirpath = dirpath
        self.every_n_steps = 1 if policy == "skip" else every_n_steps
        self._forget_run()
        self._checks: list[_Check] = []
        self._batches: dict[int, Any] = {}
        self._good_state: dict[str, Any] = {}
        self._take_out: list[Callable[[], None]] = []  # of buffers, metrics and sums: what came since the last step
        self._step_dropped = False  # was the step of this batch skipped?
        self._in_a_row = 0
        self._at = (0, 0)
        self._read_at_step = 0
        self._counted = (0, 0)  # skips and steps of a loss scaler at the last reading
        self._names: dict[int, str] = {}

    def _forget_run(self) -> None:
        self.quarantine: list[Fault] = []  # what was skipped or rolled back

    # ------------------------------------------------------------------ looking, without waiting

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = {id(p): name for name, p in pl_module.named_parameters()}
        self._read_at_step = trainer.global_step
        self._in_a_row = 0
        self._counted = (0, 0)
        self._drop_checks()
        self._remember_good_state(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._at = trainer.current_epoch, batch_idx
        if not self._take_out and self.policy != "stop":
            parts = capture_buffers(pl_module), capture_metrics(pl_module), capture_sums(trainer.book)
            self._take_out = [*parts]
        if self.dirpath is not None:
            self._batches[batch_idx] = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # waits for nothing, like all that is looked at here: the answer stays on the device
        self._checks.append(_Check(*self._at, trainer.global_step, ~torch.isfinite(loss.detach()).all()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        scaled = trainer.precision_plugin.scaler is not None
        parameters = [] if scaled else [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None and p.grad.numel() > 0]
        if parameters:
            # The largest element is finite only if all are; a sum of squares may overflow without a fault.
            each = ~torch.stack(_largest_elements([local_part(p.grad) for p in parameters])).isfinite()
            if any(hasattr(p, "to_local") for p in parameters):  # the fault may be in the part of another process
                each = trainer.strategy.reduce(each.float(), reduce_op="max").bool()
            names = [self._names.get(id(p), "a parameter outside of the module") for p in parameters]
            self._checks.append(_Check(*self._at, trainer.global_step, each.any(), names, each))
        if self.policy == "skip":
            self._skip_if_faulty(trainer, optimizer)

    def _skip_if_faulty(self, trainer: Trainer, optimizer: Optimizer) -> None:
        fault = self._read_checks(trainer)
        if fault is not None:
            trainer.optimization.drop_step(optimizer)
            self._undo_accumulated()
            self._step_dropped = True
            self._put_aside(fault, "its step is skipped")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._step_dropped:
            self._undo_accumulated()  # once more: a step of manual optimization goes on after that of its optimizer
            self._step_dropped = False
        if trainer.global_step - self._read_at_step >= self.every_n_steps and trainer.optimization.stepped:
            self._check_pending(trainer)

    # ------------------------------------------------------------------ reading

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._may_have_faults(trainer) and trainer.optimization.stepped:
            self._check_pending(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_pending(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (
            self._may_have_faults(trainer)
            and trainer.state.status == TrainerStatus.RUNNING
            and self._check_pending(trainer)
        ):
            # Weights were put back in place; what was collected as values before is collected again.
            strategy = trainer.strategy
            checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]

    def _may_have_faults(self, trainer: Trainer) -> bool:
        """May there be something to read, in this process or in others?"""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return bool(self._checks) or (training and trainer.world_size > 1)

    def _undo_accumulated(self) -> None:
        """Takes out of buffers, metrics and sums what the batches since the last step added."""
        for take_out in self._take_out:
            take_out()

    def _check_pending(self, trainer: Trainer) -> bool:
        """Reads what was looked at and acts on it. True if the model was rolled back."""
        self._refuse_dead_scale(trainer)
        self._read_at_step = trainer.global_step
        fault = self._read_checks(trainer)
        if fault is None:
            self._drop_checks()
            self._remember_good_state(trainer)
            return False
        if self.policy == "skip":  # a loss without a step, in a window that is still open
            self._undo_accumulated()
            self._take_out = []
            self._put_aside(fault, "its gradients are dropped")
            return False
        self._roll_back(trainer)
        self._put_aside(fault, "the model is back where it was at the last check, and training continues")
        return True

    def _read_checks(self, trainer: Trainer) -> Fault | None:
        """The first fault since the last reading.

        Raises:
            NonFiniteError: for the policy "stop", or if there were too many in a row.
        """
        looks = self._checks
        self._checks = []
        # sync: the one transfer of a reading
        flags = torch.stack([look.bad.to(looks[0].bad.device) for look in looks]).tolist() if looks else []
        several = trainer.world_size > 1
        strategy = trainer.strategy
        if not (strategy.reduce_boolean_decision(True in flags, all=False) if several else True in flags):
            self._in_a_row = 0 if looks else self._in_a_row
            return None
        fault = self._first_fault(looks, flags) if True in flags else None
        if several:  # all leave out the step for what one has found
            fault = None if fault is None else replace(fault, rank=trainer.global_rank)
            fault = min(filter(None, strategy.exchange_objects(fault)), key=lambda found: not found.loss)
        assert fault is not None
        self._in_a_row += 1
        if self.policy == "stop":
            fix = "The last checkpoint is from before it. `NonFiniteGuard(policy='skip')` or 'rollback' would continue."
            raise NonFiniteError(f"In {fault}. {fix}", fault)
        if self._in_a_row > self.max_in_a_row:
            self._roll_back(trainer)
            what = f"{self._in_a_row} faults in a row, the last in {fault}. Then it is not the batches:"
            fix = "Lower the learning rate, clip gradients, or look at the loss; `max_in_a_row` allows more."
            raise NonFiniteError(f"{what} {fix}", fault)
        return fault

    @staticmethod
    def _first_fault(looks: list[_Check], flags: list[bool]) -> Fault:
        first = looks[flags.index(True)]
        same_step = (look for look in looks[flags.index(True) :] if look.each is not None and look.step == first.step)
        bad: list[str] = []
        if (gradients := next(same_step, None)) is not None and gradients.each is not None:
            each = gradients.each.tolist()  # sync: once a fault
            bad = [name for name, is_bad in zip(gradients.names, each) if is_bad]
        return Fault(
            first.epoch, first.batch_idx, first.step, loss=first.each is None,
            parameter=bad[-1] if bad else None, num_parameters=len(bad),
        )  # fmt: skip

    def _refuse_dead_scale(self, trainer: Trainer) -> None:
        """Under a loss scaler: raises when no step is made any more, whatever the scale."""
        precision = trainer.precision_plugin
        if not isinstance(precision, MixedPrecision):
            return
        skips, steps = precision.skip_counts()  # sync with fused optimizers, once per reading
        if steps - self._counted[1] < SKIPS_OF_A_DEAD_RUN:
            return
        if skips - self._counted[0] == steps - self._counted[1]:
            what = f"The loss scaler has skipped {steps - self._counted[1]} steps in a row: gradients are not finite,"
            epoch, batch_idx = self._at
            fix = "Use `precision='32-true'` to see which with `NonFiniteGuard`, or 'bf16-mixed', which needs no scale."
            raise NonFiniteError(f"{what} whatever the scale (epoch {epoch}, batch {batch_idx}). {fix}")
        self._counted = skips, steps

    # ------------------------------------------------------------------ the last good state

    def _remember_good_state(self, trainer: Trainer) -> None:
        """Keeps a copy of all that a step changes, where it is: device memory for device tensors."""
        self._take_out = []
        if self.policy == "rollback":
            self._good_state = deepcopy(_live_state(trainer))

    def _roll_back(self, trainer: Trainer) -> None:
        self._undo_accumulated()
        self._take_out = []  # taken anew with the next batch, which may be one of another epoch
        if not self._good_state:
            return
        precision = trainer.precision_plugin
        live = _live_state(trainer)
        with torch.no_grad():
            for name, tensor in live["weights"].items():
                tensor.copy_(self._good_state["weights"][name])
        for optimizer, state in zip(trainer.optimizers, self._good_state["optimizers"]):
            with precision.state_context(optimizer):
                optimizer.load_state_dict(deepcopy(state))
            trainer.optimization.drop_step(optimizer)
        for config, state in zip(trainer.lr_scheduler_configs, self._good_state["schedulers"]):
            config.scheduler.load_state_dict(deepcopy(state))
        if self._good_state["precision"]:
            precision.load_state_dict(deepcopy(self._good_state["precision"]))
        for callback, state in zip(_weight_following_callbacks(trainer), self._good_state["followers"]):
            callback.load_weights_state(deepcopy(state))

    def _drop_checks(self) -> None:
        self._checks = []
        self._batches.clear()

    def _put_aside(self, fault: Fault, consequence: str) -> None:
        self.quarantine.append(fault)
        kept = ""
        if self.dirpath is not None and fault.batch_idx in self._batches:
            path = os.path.join(self.dirpath, f"epoch={fault.epoch}-batch={fault.batch_idx}.pt")
            batch = move_data_to_device(self._batches[fault.batch_idx], torch.device("cpu"))
            ensure_dir(self.dirpath)
            atomic_write(path, lambda file: torch.save(batch, file))
            kept = f" The batch is in {path}."
        rank_zero_warn(f"In {fault}: {consequence}.{kept}")
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"quarantine": [asdict(fault) for fault in self.quarantine]} if self.quarantine else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.quarantine = [Fault(**fault) for fault in state_dict["quarantine"]]


def _live_state(trainer: Trainer) -> dict[str, Any]:
    """References to all that a training step changes."""
    weights = trainer.lightning_module.state_dict()
    return {
        "weights": {name: value for name, value in weights.items() if isinstance(value, Tensor)},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "followers": [callback.weights_state() for callback in _weight_following_callbacks(trainer)],
    }


def _weight_following_callbacks(trainer: Trainer) -> list[Any]:
    """Callbacks whose state is made from the weights, such as their average."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "weights_state")]


def _largest_elements(tensors: list[Any]) -> list[Tensor]:
    """The largest absolute element of each, NaN if there is one."""
    if any(tensor.is_sparse for tensor in tensors):
        tensors = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]  # a process may hold no part
    return list(torch._foreach_norm(tensors, inf))
