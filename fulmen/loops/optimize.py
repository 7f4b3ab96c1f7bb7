"""One training batch: forward, backward and step, when the framework owns the optimizer and when the user does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.engine.precision import Precision
from fulmen.engine.strategy import Strategy
from fulmen.loops.dispatch import nothing
from fulmen.loops.loading import bound_step
from fulmen.module import LightningModule
from fulmen.profilers.profiler import measured
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import num_positional, overridden
from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from fulmen.loops.dispatch import HookPlan
    from fulmen.loops.progress import Progress
    from fulmen.trainer import Trainer

_NO_OUTPUTS: dict[str, Any] = {}


class Optimization:
    """What automatic and manual optimization share: the bound `training_step`, and backward with its hooks."""

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress) -> None:
        self.trainer, self.hooks, self.progress = trainer, hooks, progress
        self.book, self.strategy = trainer.book, trainer.strategy
        self.module: LightningModule = trainer.lightning_module
        self.precision = self.strategy.precision_plugin
        step = bound_step(trainer, "training_step")
        takes_one = num_positional(self.module.training_step) == 1
        self.training_step = (lambda batch, _: step(batch)) if takes_one else step
        self.context = self.strategy.step_context("training_step")
        self.after_step = overridden(self.strategy, "post_training_step", Strategy)
        self.checked = False  # the first output is looked at closely, later ones only by type
        self.stepped = True  # whether the last batch ended with an optimizer step
        self.unscale = overridden(self.precision, "unscale_gradients", Precision)
        self.own_backward = overridden(self.module, "backward", LightningModule)
        # The default way of the whole machine: then `loss.backward()` is all there is between the hooks.
        verbs = ("backward", "pre_backward", "post_backward")
        parts = ((self.strategy, Strategy), (self.precision, Precision))
        self.plain_backward = not any(overridden(part, verb, base) for part, base in parts for verb in verbs)
        self.strategy.run_backward = self.backward_with_hooks
        for optimizer in trainer.lightning_optimizers:
            optimizer._run_step = self.run_optimizer
            optimizer._module = self.module
            optimizer._sync_context = lambda: self.strategy.no_backward_sync(self.strategy.model)

    def set_hooks(self, hooks: HookPlan) -> None:
        """A fresh plan, because callbacks may have changed."""
        self.hooks = hooks

    def forward(self, batch: Any, batch_idx: int) -> Any:
        """`training_step`, inside the precision's context if it has one. Kept out of the fast path's frames."""
        assert self.context is not None
        with self.context():
            return self.training_step(batch, batch_idx)

    def backward_with_hooks(self, loss: Tensor, optimizer: Any = None, *args: Any, **kwargs: Any) -> None:
        """What stands between the strategy's `pre_backward` and `post_backward`."""
        book = self.book
        self.hooks.on_before_backward(loss)
        previous, book.hook = book.hook, "backward"
        self.precision.backward(loss, self.module, optimizer, *args, **kwargs)
        book.hook = previous
        self.hooks.on_after_backward()

    def run_optimizer(self, optimizer: Any, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        """What `LightningOptimizer.step` does during this run."""
        raise NotImplementedError


class AutomaticOptimization(Optimization):
    """Forward, backward and step when the framework owns the optimizer."""

    def __init__(self, trainer: Trainer, hooks: HookPlan, progress: Progress) -> None:
        super().__init__(trainer, hooks, progress)
        if len(trainer.optimizers) > 1:
            raise RuntimeError(
                f"`configure_optimizers` returned {len(trainer.optimizers)} optimizers with automatic optimization. "
                "Which of them a loss is for is known only with manual optimization. "
                "Set `self.automatic_optimization = False` in `__init__` and step them in `training_step`."
            )
        self.optimizer = trainer.optimizers[0]
        module = self.module
        self.own_zero_grad = overridden(module, "optimizer_zero_grad", LightningModule)
        self.own_clipping = overridden(module, "configure_gradient_clipping", LightningModule)
        own_step = overridden(module, "optimizer_step", LightningModule) or trainer.profiler.active
        self.direct = steps_directly(self.optimizer, self.strategy) and not own_step
        label = f"[LightningModule]{type(module).__name__}.optimizer_step"
        self.optimizer_step = measured(trainer.profiler, label, module.optimizer_step)
        self.closure_result: Any = None
        self.closure_ran = False

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch. Returns what `on_train_batch_end` gets as `outputs`."""
        window = self.trainer.accumulate_grad_batches
        self.stepped = (batch_idx + 1) % window == 0 or self.progress.is_last_batch
        if not self.stepped and not self.strategy.handles_gradient_accumulation:
            with self.strategy.no_backward_sync(self.strategy.model):
                return self.forward_backward(batch, batch_idx)
        if self.direct:
            outputs = self.forward_backward(batch, batch_idx)
            self.finish_gradients()
            self.optimizer.step()
        else:
            outputs = self.step_with_closure(batch, batch_idx)
        # Counted after the optimizer returns: a step the loss scaler skipped still counts, as loggers expect.
        self.progress.steps += 1
        return outputs

    def forward_backward(self, batch: Any, batch_idx: int) -> Any:
        hooks, book, window = self.hooks, self.book, self.trainer.accumulate_grad_batches
        book.hook = "training_step"
        # waits for nothing: the loss stays on the device, only its type is looked at
        output = self.training_step(batch, batch_idx) if self.context is None else self.forward(batch, batch_idx)
        if self.after_step:
            self.strategy.post_training_step()
        loss, extra = (output, None) if type(output) is Tensor and self.checked else self.read_output(output)
        if window > 1 and loss is not None:
            loss = loss / window
        if batch_idx % window == 0:
            hooks.on_before_zero_grad(self.optimizer)
            if self.own_zero_grad:
                book.hook = "optimizer_zero_grad"
                self.module.optimizer_zero_grad(self.progress.epochs, batch_idx, self.optimizer)
            else:
                self.optimizer.zero_grad()
        if loss is None:
            self.closure_result = None
            return {} if extra is None else extra
        if not self.plain_backward:
            self.strategy.backward(loss, self.optimizer)
        else:
            hooks.on_before_backward(loss)
            if self.own_backward:
                book.hook = "backward"
                self.module.backward(loss)
            else:
                loss.backward()
            hooks.on_after_backward()
        if self.direct and hooks.on_train_batch_end is nothing:
            return _NO_OUTPUTS  # nobody will look at it
        self.closure_result = loss.detach()
        return {"loss": self.closure_result} if extra is None else {**extra, "loss": self.closure_result}

    def finish_gradients(self) -> None:
        """Gradients are complete: unscaled, shown to the hooks, clipped."""
        if self.unscale:
            self.precision.unscale_gradients(self.optimizer)
        self.hooks.on_before_optimizer_step(self.optimizer)
        trainer = self.trainer
        if self.own_clipping or trainer.gradient_clip_val:
            self.book.hook = "configure_gradient_clipping"
            self.module.configure_gradient_clipping(
                self.optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )

    def step_with_closure(self, batch: Any, batch_idx: int) -> Any:
        """The inverted form: the optimizer (or the user) decides when forward and backward run."""
        outputs: Any = {}
        self.closure_ran = False

        def closure() -> Any:
            nonlocal outputs
            self.closure_ran = True
            outputs = self.forward_backward(batch, batch_idx)
            self.finish_gradients()
            return self.closure_result

        self.book.hook = "optimizer_step"
        self.optimizer_step(self.progress.epochs, batch_idx, self.trainer.lightning_optimizers[0], closure)
        if not self.closure_ran:
            raise MisconfigurationException(
                f"`{type(self.module).__name__}.optimizer_step` did not run the closure. "
                "The closure hasn't been executed: forward and backward are inside it, so nothing was learned. "
                "Call `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` when skipping a step."
            )
        return outputs

    def run_optimizer(self, optimizer: Any, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        return self.strategy.optimizer_step(optimizer, closure or nothing, self.module, **kwargs)

    def read_output(self, output: Any) -> tuple[Tensor | None, Mapping[str, Any] | None]:
        """(loss, other outputs) of what `training_step` returned.

        Raises:
            MisconfigurationException: for anything that is no loss, no dict with a loss and not None.
        """
        name = f"`{type(self.module).__name__}.training_step`"
        if output is None:
            warn_once(f"{name} returned `None`: there is no loss, the batch is skipped.")
            return None, None
        if isinstance(output, Tensor):
            loss, extra = output, None
        elif isinstance(output, Mapping):
            if "loss" not in output:
                what = f"{name} returned a dict without the key 'loss' (keys: {sorted(map(str, output))})."
                raise MisconfigurationException(f'{what} Return {{"loss": loss, ...}}, or None to skip the batch.')
            loss, extra = output["loss"], {k: v for k, v in output.items() if k != "loss"}
            if loss is None:
                return None, extra
        else:
            raise MisconfigurationException(
                f"{name} returned a {type(output).__name__}: {str(output)[:80]}. Return the loss as a tensor, a dict "
                "that has it under 'loss', or None to skip the batch."
            )
        if not self.checked and not self.own_backward:
            _check_loss(loss, name)
        self.checked = True
        return loss, extra


class ManualOptimization(Optimization):
    """`training_step` does everything itself; steps are counted and get the hooks and the precision."""

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch. Returns what `on_train_batch_end` gets as `outputs`."""
        self.book.hook = "training_step"
        output = self.training_step(batch, batch_idx) if self.context is None else self.forward(batch, batch_idx)
        if self.after_step:
            self.strategy.post_training_step()
        if output is None:
            return {}
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if isinstance(output, Mapping):
            return output
        raise MisconfigurationException(
            f"`{type(self.module).__name__}.training_step` returned a {type(output).__name__}. With manual optimization, "
            "return the loss, a dict, or nothing."
        )

    def run_optimizer(self, optimizer: Any, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        def finish() -> Any:
            result = closure() if closure is not None else None
            if self.unscale:
                self.precision.unscale_gradients(optimizer)
            self.hooks.on_before_optimizer_step(optimizer)
            return result

        if steps_directly(optimizer, self.strategy) and closure is None:
            finish()
            result = optimizer.step(**kwargs)
        else:
            result = self.strategy.optimizer_step(optimizer, finish, self.module, **kwargs)
        self.progress.steps += 1
        return result


def steps_directly(optimizer: Any, strategy: Any) -> bool:
    """Whether `optimizer.step()` after the backward is the same as `optimizer.step(closure)`.

    It is for the optimizers of `torch.optim`, which call the closure first and once, except LBFGS; and only if neither
    the strategy, the precision nor a hook on the optimizer wants to see the closure.
    """
    return (
        type(optimizer).__module__.startswith("torch.optim")
        and not isinstance(optimizer, torch.optim.LBFGS)
        and not getattr(optimizer, "_optimizer_step_pre_hooks", None)
        and not overridden(strategy, "optimizer_step", Strategy)
        and strategy.precision_plugin.plain_step
    )


def _check_loss(loss: Any, name: str) -> None:
    """Raises the error autograd would raise later, in words of the training loop."""
    if not isinstance(loss, Tensor):
        problem, fix = f"a {type(loss).__name__} instead of a tensor", "Return the loss as a tensor."
    elif loss.numel() != 1:
        problem, fix = f"a tensor of shape {tuple(loss.shape)}", "Reduce it to one number, e.g. with `.mean()`."
    elif not loss.is_floating_point():
        problem, fix = f"a tensor of dtype {loss.dtype}", "Compute the loss from floating-point outputs."
    elif not loss.requires_grad:
        problem = "a tensor without gradient"
        fix = "Remove `.detach()`, `.item()` or `no_grad` on its way, and check that parameters require gradients."
    else:
        return
    what = f"{name} returned {problem} as the loss. Backward needs one differentiable number."
    raise MisconfigurationException(f"{what} {fix}")
