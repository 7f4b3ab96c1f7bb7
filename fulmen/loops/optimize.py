"""One training batch: forward, backward and step. `optimization_kinds.py` has what several optimizers and manual ones need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from inspect import isgenerator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fulmen.engine.precision import MixedPrecision, Precision
from fulmen.engine.strategy import Strategy
from fulmen.hooks import nothing
from fulmen.loops.accumulation import AccumulationWindow, DistributedWindow, PostReduceWindow, read_output
from fulmen.loops.dataloading import bind_step
from fulmen.loops.join import shadow_step
from fulmen.module import LightningModule
from fulmen.optimizers import NoOptimizer
from fulmen.profilers.profiler import measured
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import overrides_method, returns_nothing, takes_argument
from fulmen.utilities.modules import scale_gradients
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn, warn_once

if TYPE_CHECKING:
    from fulmen.loops.hook_plan import HookPlan
    from fulmen.loops.progress import Progress
    from fulmen.profilers.profiler import Profiler
    from fulmen.trainer import Trainer

NO_OUTPUTS: dict[str, Any] = {}
PATIENCE = 8  # windows in which every batch may be without a loss at the beginning of a run


class Optimization:
    """What all ways of optimizing share: the bound `training_step`, and backward with its hooks."""

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress) -> None:
        self.trainer = trainer
        self.hooks = hooks
        self.progress = progress
        self.book = trainer.book
        self.strategy = trainer.strategy
        self.join = trainer.fit_loop.join
        self.loss_factor = 1.0  # in manual optimization
        self.module: LightningModule = trainer.lightning_module
        self.name = f"`{type(self.module).__name__}.training_step`"
        self.precision = self.strategy.precision_plugin
        self.training_step: Callable[[Any, int], Any] = bind_step(trainer, "training_step", ("batch", "batch_idx"))
        self.context = self.strategy.step_context("training_step")
        self.after_step = overrides_method(self.strategy, "post_training_step", Strategy)
        self.step_is_bare = self.context is None and not self.after_step  # is there nothing around `training_step`?
        self.checked = False  # the first output is looked at closely, later ones only by type
        self.stepped = True  # whether the last batch ended with an optimizer step
        self.unscale = overrides_method(self.precision, "unscale_gradients", Precision)
        self.mixed = isinstance(self.precision, MixedPrecision)
        self.precision_decides = self.precision.decides_about_step
        self.precision.use_finish(nothing if self.precision_decides else None)
        self.overrides_backward = overrides_method(self.module, "backward", LightningModule)
        # The default way of the whole machine: then `loss.backward()` is all there is between the hooks.
        verbs = ("backward", "pre_backward", "post_backward")
        parts = ((self.strategy, Strategy), (self.precision, Precision))
        self.plain_backward = not any(overrides_method(part, verb, base) for part, base in parts for verb in verbs)
        self.backward_is_default = self.plain_backward and not self.overrides_backward
        self.strategy.use_backward(self.backward_with_hooks)
        for optimizer in trainer.lightning_optimizers:
            optimizer.enter_run(self.run_optimizer, self.module, self.strategy)

    turns: Sequence[AutomaticOptimization] = ()  # one for each optimizer that the framework steps

    def has_begun_backward(self, batch_idx: int) -> bool:
        """Does an open accumulation window hold a part of the gradients of the batch that runs?"""
        return any(turn.window.held and turn.window.expected == turn.batches_left(batch_idx) for turn in self.turns)

    def waiting_optimizers(self) -> list[Any]:
        """The optimizers whose gradients wait for a later batch."""
        return [turn.optimizer for turn in self.turns if turn.window_open or turn.window.held]

    def window_states(self) -> list[dict[str, Any]]:
        """What a checkpoint holds of accumulation windows, by optimizer."""
        return [turn.window_state() for turn in self.turns]

    def load_window_states(self, stepped: bool, states: Sequence[Mapping[str, Any]]) -> None:
        """Continues from what `window_states` gave, after a batch that ended with a step or not."""
        self.stepped = stepped
        for turn, state in zip(self.turns, states):
            turn.load_window_state(state)

    direct = False  # does the optimizer step without a closure?
    outputs_unread = False  # will nobody look at the outputs of a batch?
    forward_only = False  # do batches only go through the module?

    def set_forward_only(self, forward_only: bool) -> None:
        """Lets batches only go through the module: nothing goes backward or steps, not in manual optimization either.

        The last batch of such an epoch counts as a step, as the module is another one than at the step before.
        """
        if forward_only and not self.forward_only:
            self._run_learning = self.run
            self.run = self._run_forward  # type: ignore[method-assign]
        elif self.forward_only and not forward_only:
            self.run = self._run_learning  # type: ignore[method-assign]
        self.forward_only = forward_only
        for turn in self.turns:
            if turn is not self:
                turn.set_forward_only(forward_only)

    def _run_forward(self, batch: Any, batch_idx: int) -> Any:
        """One batch through `training_step` alone."""
        self.book.hook = "training_step"
        with (self.context or nullcontext)(), self.strategy.no_backward_sync(self.strategy.model):
            output = self.training_step(batch, batch_idx)
            if isgenerator(output):
                output = {"losses": list(output)}
        feed = self.trainer.fit_loop.feed
        self.stepped = feed is not None and feed.is_last
        self.progress.steps += self.stepped
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        return output if isinstance(output, Mapping) else {}

    def open_epoch(self, hooks: HookPlan) -> None:
        """Callbacks may have changed, and loaders."""
        self.hooks = hooks
        self.outputs_unread = self.direct and hooks.on_train_batch_end is nothing
        self.join = self.trainer.fit_loop.join
        self.loss_factor = 1.0

    def run_training_step(self, batch: Any, batch_idx: int) -> Any:
        """`training_step` with what the strategy puts around it."""
        with (self.context or nullcontext)():
            output = self.training_step(batch, batch_idx)
        if self.after_step:
            self.strategy.post_training_step()
        return output

    def backward_with_hooks(self, loss: Tensor, optimizer: Optimizer | None = None, *args: Any, **kwargs: Any) -> None:
        """What stands between the strategy's `pre_backward` and `post_backward`."""
        if self.forward_only:
            return
        book = self.book
        if self.loss_factor != 1.0:
            loss = loss * self.loss_factor
        self.hooks.on_before_backward(loss)
        previous = book.hook
        book.hook = "backward"
        self.precision.backward(loss, self.module, optimizer, *args, **kwargs)
        book.hook = previous
        self.hooks.on_after_backward()

    def unscale_if_seen(self, optimizer: Optimizer, seen: bool = False) -> None:
        """Takes the loss scale out of the gradients. A fused optimizer does it itself, unless somebody looks before."""
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not fused or seen or self.hooks.on_before_optimizer_step is not nothing:
            self.precision.unscale_gradients(optimizer)

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch. Returns what `on_train_batch_end` gets as `outputs`."""
        raise NotImplementedError

    def measure_batches(self, profiler: Profiler) -> None:
        """Lets a profiler time each batch."""
        self.run = measured(profiler, "run_training_batch", self.run)  # type: ignore[method-assign]

    def skipped_optimizers(self) -> list[Any]:
        """The optimizers that changed nothing at the last step. With a fused one under a loss scaler this waits (sync)."""
        return []

    def report_skipped_steps(self) -> None:
        """After training: says how many steps the loss scaler left out."""
        skips, steps = self.precision.skip_counts() if isinstance(self.precision, MixedPrecision) else (0, 0)
        if skips:
            what = f"The loss scaler skipped {skips} of {steps} optimizer steps: their gradients were not finite."
            rank_zero_info(f"{what} Learning-rate schedulers did not advance with them.")

    def drop_step(self, optimizer: Optimizer) -> None:
        """Drops the gradients of an optimizer: its next step, if it is made at all, changes nothing."""
        optimizer.zero_grad(set_to_none=True)

    def run_optimizer(self, optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """What `LightningOptimizer.step` does during this run."""
        if self.forward_only:
            return closure() if closure is not None else None
        if closure is None and self.book.hook == "training_step":
            what = (
                "`optimizer.step()` was called in `training_step` with automatic optimization, which makes a step too."
            )
            warn_once(f"{what} Leave it out, or set `self.automatic_optimization = False` in `__init__`.")
        return self.strategy.optimizer_step(optimizer, closure or nothing, self.module, **kwargs)


class NotYetOptimizing(Optimization):
    """Stands for the optimization until a run makes one: nothing is accumulated, and nothing was skipped."""

    def __init__(self) -> None:
        self.stepped = True

    def report_skipped_steps(self) -> None:
        pass


class AutomaticOptimization(Optimization):
    """Forward, backward and step when the framework owns the optimizer."""

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress, index: int = 0) -> None:
        super().__init__(trainer, hooks, progress)
        self.index = index
        self.optimizer = trainer.optimizers[index]
        self.turns = (self,)
        self.several = trainer.world_size > 1
        gradients_of = lambda: self.precision.main_params(self.optimizer)  # noqa: E731
        shared = PostReduceWindow if self.strategy.defers_gradient_reduction else DistributedWindow
        self.window: AccumulationWindow = AccumulationWindow()
        if self.several:
            self.window = shared(self.strategy, gradients_of)
        self.window_open = False  # whether there are gradients that wait for a step which later batches belong to
        self.verb = "returned"
        module = self.module
        # A batch without a loss is left out; a run without any is a forgotten `return`.
        self.expects_loss = progress.batches == 0 and not isinstance(self.optimizer, NoOptimizer)
        self.expects_loss &= not takes_argument(module.training_step, "dataloader_iter", explicit=True)
        self.windows_without_loss = 0
        self.overrides_zero_grad = overrides_method(module, "optimizer_zero_grad", LightningModule)
        self.overrides_clipping = overrides_method(module, "configure_gradient_clipping", LightningModule)
        overrides_step = overrides_method(module, "optimizer_step", LightningModule) or trainer.profiler.active
        self.direct = steps_directly(self.optimizer, self.strategy) and not overrides_step
        label = f"[LightningModule]{type(module).__name__}.optimizer_step"
        self.optimizer_step = measured(trainer.profiler, label, module.optimizer_step)
        self.dropped = False  # did the step, or the turn, of the last batch change nothing?
        strategy_checks = self.several or overrides_method(self.strategy, "check_gradients", Strategy)
        check = self.strategy.check_gradients if strategy_checks else self.check_gradients
        self.finish_gradients = self.with_first_check(check)  # type: ignore[method-assign]
        # Arguments of backward that keep gradients to this optimizer's parameters.
        self.backward_inputs: dict[str, Any] = {}
        self.closure_result: Any = None
        self.closure_ran = False

    def window_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the accumulation window."""
        return {"open": self.window_open or bool(self.window.held), **self.window.state_dict()}

    def load_window_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `window_state` gave."""
        self.window_open = state["open"]
        self.window.load_state_dict(state)

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch. Returns what `on_train_batch_end` gets as `outputs`."""
        opens = not self.window_open or batch_idx == 0
        self.stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.progress.is_last_batch
        self.window_open = not self.stepped
        if self.join.uneven:
            self.window.count_active(opens, self.join.exhausted, self.join.num_active)
        if not self.stepped and not self.strategy.handles_gradient_accumulation:
            with self.strategy.no_backward_sync(self.strategy.model):
                return self.forward_backward(batch, batch_idx, opens)
        if self.direct:
            outputs = self.forward_backward(batch, batch_idx, opens)
            self.finish_gradients()
            self.optimizer.step()
        else:
            outputs = self.step_with_closure(batch, batch_idx, opens)
        # Counted after the optimizer returns: a step the loss scaler skipped still counts, as loggers expect.
        self.progress.steps += 1
        return outputs

    def batches_left(self, batch_idx: int) -> int:
        """How many batches this one and those after it in its accumulation window should be."""
        length = self.trainer.accumulate_grad_batches
        if self.progress.is_last_batch:
            return 1
        return int(min(length - batch_idx % length, max(self.trainer.num_training_batches - batch_idx, 1)))

    def forward_backward(self, batch: Any, batch_idx: int, opens: bool) -> Any:
        if self.join.exhausted:
            return self.run_shadow_step(batch, batch_idx, opens)
        self.book.hook = "training_step"
        # waits for nothing: the loss stays on the device, only its type is looked at
        bare = self.step_is_bare
        output = self.training_step(batch, batch_idx) if bare else self.run_training_step(batch, batch_idx)
        if type(output) is Tensor and self.checked:
            loss: Tensor | None = output
            extra: Mapping[str, Any] = NO_OUTPUTS
            weight = None
        else:
            loss, extra, weight = self.read_output(output)
        if opens:
            self.clear_gradients(batch_idx)
        if loss is None:
            self.check_missing_loss()
            return {**extra}
        if self.trainer.accumulate_grad_batches > 1 or weight is not None or self.join.partial:
            loss = self.window.scale_loss(loss, weight, self.batches_left(batch_idx))
        if self.backward_is_default:
            self.hooks.on_before_backward(loss)
            loss.backward(**self.backward_inputs)
            self.hooks.on_after_backward()
        else:
            self.run_overridden_backward(loss)
        if self.outputs_unread:
            return NO_OUTPUTS
        self.closure_result = loss.detach()
        return {**extra, "loss": self.closure_result}

    def read_output(self, output: Any) -> tuple[Tensor | None, Mapping[str, Any], Any]:
        """The loss, other outputs and the weight that `training_step` returned; checked closely until one had a loss."""
        check = not self.checked and not self.overrides_backward
        loss, extra, weight = read_output(output, self.name, check, self.verb)
        self.checked = self.checked or loss is not None
        return loss, extra or NO_OUTPUTS, weight

    def check_missing_loss(self) -> None:
        """After a batch without a loss.

        Raises:
            RuntimeError: if gradients are exchanged after it. An optimizer may sit out a batch in all processes, but not
                the one whose backward exchanges gradients.
        """
        if self.several and (not self.backward_inputs or self.window.held):
            raise RuntimeError(self.missing_loss_message())
        if not self.checked and self.stepped and self.expects_loss:
            self.check_for_any_loss()

    def run_overridden_backward(self, loss: Tensor) -> None:
        """Backward where the module, the strategy or the precision has a version of its own."""
        if not self.plain_backward:
            self.strategy.backward(loss, self.optimizer, **self.backward_inputs)
            return
        self.hooks.on_before_backward(loss)
        self.book.hook = "backward"
        self.module.backward(loss, **self.backward_inputs)
        self.hooks.on_after_backward()

    def run_shadow_step(self, batch: Any, batch_idx: int, opens: bool) -> Any:
        """This rank has no batch. Its gradients of 0 are reduced with those of others, and those of its window so far."""
        if opens:
            self.clear_gradients(batch_idx)
        loss = None if self.backward_inputs else self.strategy.zero_loss()
        if loss is None:
            # The step of others exchanges more than gradients, so this one runs as well, on a batch it had.
            with shadow_step(self.module, self.context):
                output = self.training_step(batch, batch_idx)
            given, _, _ = read_output(output, self.name, False, self.verb)
            if given is None:
                raise RuntimeError(self.missing_loss_message())
            loss = given * 0
        self.window.scale_loss(loss, 0, self.batches_left(batch_idx)).backward(**self.backward_inputs)
        self.closure_result = loss.detach()
        return {}

    def clear_gradients(self, batch_idx: int) -> None:
        """A window begins."""
        self.window.held = 0
        self.closure_result = None
        self.dropped = False
        self.hooks.on_before_zero_grad(self.optimizer)
        if self.overrides_zero_grad:
            self.book.hook = "optimizer_zero_grad"
            self.module.optimizer_zero_grad(self.progress.epochs, batch_idx, self.optimizer)
        else:
            self.optimizer.zero_grad()

    def finish_gradients(self) -> None:
        """Gradients are complete: those of one batch of the window's size, unscaled, shown to the hooks, clipped."""
        trainer = self.trainer
        if self.window.held and (factor := self.window.gradient_factor()) is not None:
            scale_gradients(self.precision.main_params(self.optimizer), factor)
        clips = self.overrides_clipping or trainer.gradient_clip_val
        if self.unscale and (self.direct or self.closure_result is not None):
            self.unscale_if_seen(self.optimizer, seen=bool(clips))
        self.hooks.on_before_optimizer_step(self.optimizer)
        if clips:
            self.book.hook = "configure_gradient_clipping"
            self.module.configure_gradient_clipping(
                self.optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )

    def with_first_check(self, check: Callable[[], None]) -> Callable[[], None]:
        """`finish_gradients`, the first time after a look at which gradients have come."""

        def check_and_finish() -> None:
            del self.finish_gradients
            check()
            self.finish_gradients()

        return check_and_finish

    def check_gradients(self) -> None:
        """After the first backward: an optimizer whose parameters it did not reach changes nothing."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        unreached = all(parameter.grad is None for parameter in parameters)
        if self.checked and unreached and not isinstance(self.optimizer, NoOptimizer):
            what = f"No parameter of the `{type(self.optimizer).__name__}` has a gradient after the first backward:"
            why = "the loss does not depend on them, or the layers were replaced after `configure_optimizers`."
            rank_zero_warn(f"{what} {why} Make layers in `__init__` or `configure_model`.")

    def missing_loss_message(self) -> str:
        where = f"on rank {self.trainer.global_rank} of {self.trainer.world_size}"
        what = f"{self.name} {self.verb} None {where}, for a batch after which gradients are exchanged."
        why = "The other processes would wait for them, or step without."
        return f"{what} {why} Return a loss of 0 that depends on the weights, `0 * loss`, or (loss, 0): a weight of 0."

    def check_for_any_loss(self) -> None:
        """After a window without a loss, when none had one yet.

        Raises:
            MisconfigurationException: if the code of the step can return nothing else, or has not for a while.
        """
        self.windows_without_loss += 1
        certain = returns_nothing(self.module.training_step)
        if not certain and self.windows_without_loss < PATIENCE and not self.progress.is_last_batch:
            return
        what = f"{self.name} {self.verb} `None` for every batch so far: there is no loss, and nothing was learned."
        fix = "End it with `return loss`. None is for a batch that is to be left out now and then."
        raise MisconfigurationException(
            f"{what} {fix} If you step the optimizer yourself, set `self.automatic_optimization = False` in `__init__`."
        )

    def step_with_closure(self, batch: Any, batch_idx: int, opens: bool) -> Any:
        """The inverted form: the optimizer (or the user) decides when forward and backward run."""
        outputs: Any = {}
        self.closure_ran = False

        def closure() -> Any:
            nonlocal outputs
            if self.closure_ran and (self.backward_inputs or not opens):
                raise MisconfigurationException(self.single_evaluation_message())
            self.closure_ran = True
            with torch.enable_grad():  # the step that calls this may run without
                outputs = self.forward_backward(batch, batch_idx, opens)
            if not self.precision_decides:
                self.finish_gradients()
            return self.closure_result

        if self.precision_decides:
            self.precision.use_finish(lambda: self.finish_gradients())
        self.book.hook = "optimizer_step"
        wrapped = self.trainer.lightning_optimizers[self.index]
        self.optimizer_step(self.progress.epochs, batch_idx, wrapped, closure)
        if self.mixed and not self.backward_inputs:
            self.precision.update_loss_scale()
        if not self.closure_ran:
            raise MisconfigurationException(
                f"`{type(self.module).__name__}.optimizer_step` did not run the closure. "
                "The closure hasn't been executed: forward and backward are inside it, so nothing was learned. "
                "Call `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` when skipping a step."
            )
        return outputs

    def single_evaluation_message(self) -> str:
        """What is said to an optimizer that wants its closure a second time, where that would give other gradients."""
        name = type(self.optimizer).__name__
        if self.backward_inputs:
            why = f"{self.name} is a generator, which gives each of its losses once."
        else:
            why = "Gradients of earlier batches, accumulated for the same step, belong to the first evaluation alone."
        fix = "Use an optimizer that evaluates once, or one optimizer, a plain step and `accumulate_grad_batches=1`."
        return f"{name} evaluates the loss several times per step. {why} {fix}"

    def skipped_optimizers(self) -> list[Any]:
        return [self.optimizer] if self.dropped or self.precision.skipped else []

    def drop_step(self, optimizer: Optimizer) -> None:
        super().drop_step(optimizer)
        self.dropped = True
        self.window_open = False


def steps_directly(optimizer: Optimizer, strategy: Strategy) -> bool:
    """Whether `optimizer.step()` after the backward is the same as `optimizer.step(closure)`.

    It is for the optimizers of `torch.optim`, which call the closure first and once, except LBFGS; and only if neither
    the strategy, the precision nor a hook on the optimizer wants to see the closure.
    """
    return (
        type(optimizer).__module__.startswith("torch.optim")
        and not isinstance(optimizer, torch.optim.LBFGS)
        and hasattr(optimizer, "_optimizer_step_pre_hooks")
        and not optimizer._optimizer_step_pre_hooks
        and not overrides_method(strategy, "optimizer_step", Strategy)
        and strategy.precision_plugin.step_is_default
    )
