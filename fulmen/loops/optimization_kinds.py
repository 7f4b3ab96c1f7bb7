"""The other kinds of optimization, several optimizers in turn and manual; and which kind a module asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fulmen.engine.precision import MixedPrecision
from fulmen.loops.join import shadow_step
from fulmen.loops.optimize import NO_OUTPUTS, AutomaticOptimization, Optimization, steps_directly
from fulmen.module import LightningModule
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import is_generator, takes_argument

if TYPE_CHECKING:
    from fulmen.loops.hook_plan import HookPlan
    from fulmen.loops.progress import Progress
    from fulmen.trainer import Trainer


class Turn(AutomaticOptimization):
    """One of several optimizers: its `training_step` is what the generator yields for it."""

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress, index: int) -> None:
        super().__init__(trainer, hooks, progress, index)
        self.verb = "yielded"
        self.context = None
        self.step_is_bare = not self.after_step
        self.skipped: Any = False  # did the loss scaler skip the last step? The precision knows of the very last only

    def take(self, output: Any, batch: Any, batch_idx: int) -> Any:
        """One turn with what was yielded for it; without a loss, the optimizer rests."""
        if batch_idx == 0:
            self.window_open = False  # an epoch that ended early leaves gradients behind
        parameters = [p for p in self.precision.main_params(self.optimizer) if p.requires_grad]
        no_loss = output is None or (isinstance(output, Mapping) and output.get("loss", 0) is None) or not parameters
        closes = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.progress.is_last_batch
        self.dropped = no_loss and not (self.window_open and closes)
        if self.dropped:
            self.stepped = False
            return NO_OUTPUTS
        self.backward_inputs = {"inputs": parameters}
        self.training_step = lambda *_: None if no_loss else output
        outputs = self.run(batch, batch_idx)
        self.skipped = self.precision.last_skip
        return outputs


class AlternatingOptimization(Optimization):
    """Several optimizers that take turns: `training_step` is a generator and yields one loss for each, in order.

    What stands before a `yield` runs before the step that its loss leads to, what stands behind it after that step. Only
    the optimizer's own parameters get gradients. An optimizer whose loss is None sits the batch out.
    """

    turns: Sequence[Turn]

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress) -> None:
        super().__init__(trainer, hooks, progress)
        parts = trainer, hooks, progress
        self.turns = [Turn(*parts, index) for index in range(len(trainer.optimizers))]
        if self.overrides_backward and not takes_argument(self.module.backward, "inputs", explicit=False):
            raise MisconfigurationException(
                f"`{type(self.module).__name__}.backward` takes no argument `inputs`, with which a generator "
                "`training_step` keeps the gradients of a loss to its optimizer's parameters. "
                "Define `def backward(self, loss, *args, **kwargs)` and hand them on to `loss.backward`."
            )
        owners = [id(p) for turn in self.turns for p in self.precision.main_params(turn.optimizer)]
        self.shares = len(set(owners)) < len(owners)
        if isinstance(self.precision, MixedPrecision):
            self.precision.hold_loss_scale()  # until all have taken their turns

    def open_epoch(self, hooks: HookPlan) -> None:
        super().open_epoch(hooks)
        for turn in self.turns:
            turn.open_epoch(hooks)

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch, one turn of each optimizer. Returns what `on_train_batch_end` gets as `outputs`."""
        if self.shares and self.trainer.accumulate_grad_batches > 1:
            what = "A parameter belongs to two optimizers, and gradients are accumulated over several batches."
            raise MisconfigurationException(f"{what} The two losses would mix. Use `accumulate_grad_batches=1`.")
        losses = iter(self.training_step(batch, batch_idx))
        self.stepped = False
        outputs: dict[str, Any] = {"losses": []}
        for turn in self.turns:
            given = turn.take(self.next_output(losses, turn), batch, batch_idx)
            self.stepped = self.stepped or turn.stepped
            outputs["losses"].append(given.get("loss"))
            outputs.update((key, value) for key, value in given.items() if key != "loss")
        self.finish_generator(losses)
        if self.mixed:
            self.precision.update_loss_scale()
        there = [loss for loss in outputs["losses"] if loss is not None]
        return {**outputs, "loss": sum(there)} if there else outputs

    def next_output(self, losses: Iterator[Any], turn: Turn) -> Any:
        """What the generator yields for this turn; it runs on from its last `yield`."""
        self.book.hook = "training_step"
        try:
            if self.context is None:
                return next(losses)
            with self.context():
                return next(losses)
        except StopIteration:
            raise self.wrong_number_of_losses(f"yielded {turn.index}") from None

    def finish_generator(self, losses: Iterator[Any]) -> None:
        """Runs what stands behind the last `yield`."""
        self.book.hook = "training_step"
        for _ in losses:
            raise self.wrong_number_of_losses(f"yielded more than {len(self.turns)}")

    def wrong_number_of_losses(self, what: str) -> MisconfigurationException:
        names = [type(turn.optimizer).__name__ for turn in self.turns]
        why = f"`configure_optimizers` returned {len(names)} optimizers {names}, and each gets one loss, in this order"
        return MisconfigurationException(f"{self.name} {what} losses. {why}. Yield None for one that sits a batch out.")

    def skipped_optimizers(self) -> list[Any]:
        return [turn.optimizer for turn in self.turns if turn.dropped or bool(turn.skipped)]

    def drop_step(self, optimizer: Optimizer) -> None:
        for turn in self.turns:
            if turn.optimizer is optimizer:
                turn.drop_step(optimizer)


class ManualOptimization(Optimization):
    """`training_step` does everything itself; steps are counted and get the hooks and the precision."""

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress) -> None:
        super().__init__(trainer, hooks, progress)
        if is_generator(self.module.training_step):
            what = f"{self.name} is a generator, which manual optimization would never start."
            raise MisconfigurationException(
                f"{what} Call `self.manual_backward` instead of `yield`, or leave `automatic_optimization` on."
            )
        self.made: list[Any] = []  # the optimizers that stepped in the last batch

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch. Returns what `on_train_batch_end` gets as `outputs`."""
        self.made = []
        self.book.hook = "training_step"
        if self.join.uneven:
            self.loss_factor = 0.0 if self.join.exhausted else self.trainer.world_size / self.join.num_active
        output = None
        if self.join.exhausted:
            self.run_shadow_step(batch, batch_idx)
        elif self.step_is_bare:
            output = self.training_step(batch, batch_idx)
        else:
            output = self.run_training_step(batch, batch_idx)
        if self.mixed:
            self.precision.update_loss_scale()
        if output is None:
            return {}
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if isinstance(output, Mapping):
            loss = output.get("loss")
            # What callbacks keep of it must not keep the graph.
            return {**output, "loss": loss.detach()} if isinstance(loss, Tensor) else output
        raise MisconfigurationException(
            f"{self.name} returned a {type(output).__name__}. With manual optimization, return the loss, a dict, or nothing."
        )

    def run_shadow_step(self, batch: Any, batch_idx: int) -> None:
        """This rank has no batch, and takes part in what the others exchange."""
        with shadow_step(self.module, self.context):
            self.training_step(batch, batch_idx)
        if self.after_step:
            self.strategy.post_training_step()

    def run_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        if self.forward_only:
            return super().run_optimizer(optimizer, closure)

        def run_closure() -> Any:
            with torch.enable_grad():  # the step that calls this may run without
                result = closure() if closure is not None else None
            if self.unscale:
                self.unscale_if_seen(optimizer)
            self.hooks.on_before_optimizer_step(optimizer)
            return result

        if steps_directly(optimizer, self.strategy) and closure is None:
            run_closure()
            result = optimizer.step(**kwargs)
        else:
            result = self.strategy.optimizer_step(optimizer, run_closure, self.module, **kwargs)
        self.progress.steps += 1
        self.made.append(optimizer)
        return result

    def waiting_optimizers(self) -> list[Any]:
        """The optimizers that did not step in the last batch: their gradients may wait for a later one."""
        return [optimizer for optimizer in self.trainer.optimizers if not any(optimizer is each for each in self.made)]


def optimization_for(trainer: Trainer, hooks: HookPlan, progress: Progress) -> Optimization:
    """The way of optimizing that the module asks for.

    Raises:
        RuntimeError: for several optimizers and one loss.
    """
    kind = _optimization_type(trainer.lightning_module, len(trainer.optimizers))
    optimization = kind(trainer, hooks, progress)
    optimization.measure_batches(trainer.profiler)
    return optimization


def _optimization_type(module: LightningModule, num_optimizers: int) -> type[Optimization]:
    if not module.automatic_optimization:
        return ManualOptimization
    if is_generator(module.training_step):
        return AlternatingOptimization
    if num_optimizers > 1:
        raise RuntimeError(
            f"`configure_optimizers` returned {num_optimizers} optimizers with automatic optimization. "
            "Which of them a loss is for is not known. `yield` one loss for each in `training_step`, in their order; or "
            "use manual optimization: `self.automatic_optimization = False` in `__init__`, and step them yourself."
        )
    return AutomaticOptimization
