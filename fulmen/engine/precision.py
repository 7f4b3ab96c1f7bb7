"""`Precision`: in which numbers the model computes. Fires no hooks; the loops call it where it matters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fulmen.engine.stochastic_rounding import float32_stand_ins, step_in_float32
from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.errors import InvalidChoiceError, MisconfigurationException
from fulmen.utilities.introspection import is_written_outside, num_positional, overrides_method, takes_argument
from fulmen.utilities.modules import total_norm

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch.nn import Module
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.utilities.types import GradClipAlgorithmType, LRSchedulerConfig

_LBFGS_REFUSED = (
    "`precision='{}'`: LBFGS evaluates the loss several times inside its step, {}. "
    "Use 'bf16-mixed' or '32-true', or another optimizer."
)


@lru_cache(maxsize=32)
def _closure_argument(step: Callable[..., Any]) -> str:
    """How a `step` function takes its closure: "by name", "by position", or "not at all"."""
    if takes_argument(step, "closure"):
        return "by name"
    return "by position" if num_positional(step) > 1 else "not at all"


def step_with_closure(optimizer: Optimizer, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
    """`optimizer.step(closure)`; where the optimizer takes none, the closure runs first."""
    if closure is None:
        return optimizer.step(**kwargs)
    kind = type(optimizer)
    way = _closure_argument(kind.step if hasattr(kind, "step") else optimizer.step)
    if way == "by name":
        return optimizer.step(closure=closure, **kwargs)
    if way == "by position":
        return optimizer.step(closure, **kwargs)
    outcome = closure()
    optimizer.step(**kwargs)
    return outcome


def _optimizes_manually(model: Module) -> bool:
    """Is it a `LightningModule` that calls its optimizers itself?"""
    return hasattr(model, "automatic_optimization") and not model.automatic_optimization


def check_finite_norm(norm: Tensor) -> None:
    """Raises a RuntimeError for a norm of gradients that is infinite or not a number (sync)."""
    if not bool(norm.isfinite()):
        what = f"The norm of the gradients is {float(norm)}, so they cannot be clipped."
        raise RuntimeError(f"{what} Look for the loss that diverged, or pass `error_if_nonfinite=False`.")


def convert_to_default_dtype(data: Any) -> Any:
    """Floating-point tensors of a collection in torch's default dtype."""
    dtype = torch.get_default_dtype()
    return apply_to_collection(data, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def clips_by_value(algorithm: str | GradClipAlgorithmType | None) -> bool:
    """Does the Trainer's ``gradient_clip_algorithm`` clamp each element, instead of the norm of all?"""
    return (algorithm.value if isinstance(algorithm, Enum) else algorithm) == "value"


class Precision:
    """Full precision, and the base of all others: every verb is one a subclass may override.

    The loops ask once per run which verbs are overridden; those that are not cost nothing per step.
    """

    precision: Any = "32-true"
    dtype: torch.dtype = torch.float32  # that the model computes in
    scaler: torch.amp.GradScaler | None = None  # of the loss
    skipped: Any = False  # was the last optimizer step left out, because its gradients were not finite?
    last_skip: Any = False  # the same, as a tensor where only the device knows
    replaces_layers = False  # does it put other layers into the model, so that a checkpoint holds what those store?

    @property
    def step_is_default(self) -> bool:
        """Whether applying the update is nothing but `optimizer.step()` after the gradients are finished."""
        return not overrides_method(self, "optimizer_step", Precision) and not self.decides_about_step

    @property
    def decides_about_step(self) -> bool:
        """Has a class of the user's a say in what is done between closure and step?"""
        return any(is_written_outside(self, name) for name in ("optimizer_step", "_wrap_closure", "_after_closure"))

    def check_device(self, device: torch.device) -> None:
        """Refuses a device that it does not run on."""

    def convert_module(self, module: Module) -> Module:
        """The module in the dtype of its weights."""
        return module

    def convert_input(self, data: Any) -> Any:
        """A batch in the dtype the model computes in."""
        return data

    def convert_forward_input(self, data: Any) -> Any:
        """Arguments of `forward` in the dtype it computes in, where a loop of the user's own calls the model."""
        return self.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """What the model returned, in the dtype that callers outside of the model expect."""
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Gives what is created inside its default dtype: here tensors, in `module_init_context` modules."""
        return nullcontext()

    module_init_context = tensor_init_context

    def forward_context(self) -> AbstractContextManager[Any]:
        """Entered around every forward."""
        return nullcontext()

    def train_step_context(self) -> AbstractContextManager[Any]:
        """Entered around the step of its name, like the three others."""
        return self.forward_context()

    val_step_context = test_step_context = predict_step_context = train_step_context

    def pre_backward(self, tensor: Tensor, module: Module) -> Tensor:
        """The loss that `backward` is called on."""
        return tensor

    def backward(
        self, tensor: Tensor, model: LightningModule, optimizer: Optimizer | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Backpropagates through the module's own `backward`."""
        model.backward(tensor, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: Module) -> Tensor:
        """The loss that is handed on after `backward`."""
        return tensor

    def watch_optimizer(self, optimizer: Optimizer) -> None:
        """An optimizer will be stepped by `optimizer_step`."""

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Takes the loss scale out of the gradients, before anybody looks at them."""

    def update_loss_scale(self) -> None:
        """Lets the loss scale grow or shrink by what was found since the last time; called when a batch is done."""

    def optimizer_step(
        self, optimizer: Optimizer, model: Module | None = None, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Any:
        """Runs the closure (forward, backward, finishing the gradients) and applies the update."""
        if closure is not None and self._finish_gradients is not None:
            closure = partial(self._wrap_closure, model, optimizer, closure)
        return step_with_closure(optimizer, closure, **kwargs)

    _finish_gradients: Callable[[], None] | None = None

    def use_finish(self, finish_gradients: Callable[[], None] | None) -> None:
        """What `_after_closure` does: None where the closure has done it."""
        self._finish_gradients = finish_gradients

    def _wrap_closure(self, model: Module | None, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """What an optimizer calls: the closure, and `_after_closure`."""
        outcome = closure()
        self._after_closure(model, optimizer)
        return outcome

    def _after_closure(self, model: Module | None, optimizer: Optimizer) -> None:
        """Finishes the gradients: unscaled, shown to `on_before_optimizer_step`, clipped."""
        if self._finish_gradients is not None:
            self._finish_gradients()

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str | GradClipAlgorithmType = "norm"
    ) -> Tensor | None:
        """Clips the gradients of the optimizer's parameters; 0 or less does nothing.

        Returns the norm before clipping, still on its device, if it had to be known.
        """
        if clip_val <= 0:
            return None
        if clips_by_value(gradient_clip_algorithm):
            self.clip_grad_by_value(optimizer, clip_val)
            return None
        return self.clip_grad_by_norm(optimizer, clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clamps every element to [-clip_val, clip_val]."""
        torch.nn.utils.clip_grad_value_(self.main_params(optimizer), clip_value=clip_val)

    def clip_grad_by_norm(
        self, optimizer: Optimizer, clip_val: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor | None:
        """Scales all gradients together so that their norm (L2, or of order `norm_type`) is at most `clip_val`."""
        return torch.nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val, norm_type, error_if_nonfinite)

    def main_params(self, optimizer: Optimizer) -> list[Tensor]:
        """The parameters the optimizer updates."""
        return [p for group in optimizer.param_groups for p in group["params"]]

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """The L2 norm of all gradients of an optimizer together, on their device."""
        return total_norm([p.grad for p in self.main_params(optimizer) if p.grad is not None])

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[LRSchedulerConfig]
    ) -> tuple[Module, list[Optimizer], list[LRSchedulerConfig]]:
        """Last word on the model and its optimizers before training."""
        return model, optimizers, lr_schedulers

    def state_context(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        """Entered where the state of an optimizer is loaded, which takes over the dtype of its parameters."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; empty for stateless precisions."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """After the states were collected; ``checkpoint`` may be changed."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before `load_state_dict`."""

    def teardown(self) -> None:
        """At the end of a run."""


class MixedPrecision(Precision):
    """Autocast around every forward, and for "16-mixed" a loss scaler.

    `skipped` says whether the scaler left the last step out, because gradients were not finite.

    Arguments:
        precision: "16-mixed" computes in float16, "bf16-mixed" in bfloat16; weights stay in float32.
        device: the type of the device, such as "cuda".
        scaler: for "16-mixed", instead of torch's own.

    Raises:
        ValueError: for another precision.
        InvalidChoiceError: for a scaler with "bf16-mixed".

    >>> MixedPrecision("bf16-mixed", "cpu").dtype
    torch.bfloat16
    """

    hold_scale = False

    def __init__(
        self, precision: Literal["16-mixed", "bf16-mixed"], device: str, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        if precision not in ("16-mixed", "bf16-mixed"):
            raise ValueError(f"`{precision=}` is not a mixed precision. Use '16-mixed' or 'bf16-mixed'.")
        if scaler is not None and precision == "bf16-mixed":
            what = "`MixedPrecision('bf16-mixed', scaler=...)`: gradients in bfloat16 do not underflow."
            raise InvalidChoiceError(f"{what} Leave `scaler` out, or use '16-mixed'.")
        self.precision: str = precision
        self.device = str(device).split(":")[0]
        self.dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        self.scaler = torch.amp.GradScaler(self.device) if precision == "16-mixed" and scaler is None else scaler
        self.last_skip: bool | Tensor = False
        self._skips: int | Tensor = 0
        self._steps = 0
        self._scale_update_due = False  # was there a step whose findings the scale does not show yet?
        self._unscaled: set[int] = set()  # ids of the optimizers whose gradients are, and wait for their step
        self._hooks: list[Any] = []

    @property
    def step_is_default(self) -> bool:
        return self.scaler is None and not self.decides_about_step

    def check_device(self, device: torch.device) -> None:
        if self.device not in (device.type, ""):
            what = f"The precision plugin autocasts on {self.device!r}, but the device is `{device}`."
            raise InvalidChoiceError(f"{what} Write `MixedPrecision({self.precision!r}, {device.type!r})`.")

    @property
    def skipped(self) -> bool:
        if not isinstance(self.last_skip, bool):
            # sync: a fused optimizer decides on the device; only who needs to know asks, such as LR schedulers per step
            self.last_skip = bool(self.last_skip.item())
        return self.last_skip

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[LRSchedulerConfig]
    ) -> tuple[Module, list[Optimizer], list[LRSchedulerConfig]]:
        for optimizer in optimizers:
            self.watch_optimizer(optimizer)
        self.hold_scale = False
        self.last_skip = False
        self._skips = 0
        self._steps = 0
        return model, optimizers, lr_schedulers

    def watch_optimizer(self, optimizer: Optimizer) -> None:
        if self.scaler is None:
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(_LBFGS_REFUSED.format("16-mixed", "a loss scaler allows one"))
        if hasattr(optimizer, "register_step_post_hook"):
            self._hooks.append(optimizer.register_step_post_hook(self._on_step))

    def convert_forward_input(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t)

    def convert_output(self, data: Any) -> Any:
        return convert_to_default_dtype(data)

    def hold_loss_scale(self) -> None:
        """Until the next run, the loss scale changes in `update_loss_scale` only.

        For several optimizers that take turns: gradients that wait for a step must be unscaled by the scale they were
        made with.
        """
        self.hold_scale = True

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        """The optimizer ran; of torch's, fused ones hold `found_inf` and may have changed nothing."""
        found_inf = optimizer.found_inf if hasattr(optimizer, "found_inf") else None
        self.last_skip = False if found_inf is None else found_inf

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.autocast_context_manager()

    def autocast_context_manager(self) -> AbstractContextManager[Any]:
        """What `forward_context` enters; a subclass may choose another."""
        # Without its cache, which keeps weights cast under `no_grad` for later use under gradients.
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)

    def pre_backward(self, tensor: Tensor, module: Module) -> Tensor:
        if self.scaler is None:
            return tensor
        if self._scale_update_due and not self.hold_scale:
            self.update_loss_scale()
        return self.scaler.scale(tensor)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        if self.scaler is not None and not self._is_unscaled(id(optimizer)):
            self.scaler.unscale_(optimizer)
            self._unscaled.add(id(optimizer))

    def _is_unscaled(self, key: int) -> bool:
        """Was the loss scale taken out of the gradients of that optimizer, here or by a subclass?"""
        states: dict[int, Any] = {} if self.scaler is None else self.scaler._per_optimizer_states
        return key in self._unscaled or (key in states and states[key]["stage"] is OptState.UNSCALED)

    def optimizer_step(
        self, optimizer: Optimizer, model: Module | None = None, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(_LBFGS_REFUSED.format("16-mixed", "a loss scaler allows one"))
        self.last_skip = False
        # `training_step` returned no loss: there are no gradients to apply
        loss = None if closure is None else self._wrap_closure(model, optimizer, closure)
        if closure is not None and loss is None and model is not None and not _optimizes_manually(model):
            return None
        # until `_on_step` says otherwise; one that takes no hooks is believed to step
        self.last_skip = hasattr(optimizer, "register_step_post_hook")
        outcome = self.scaler.step(optimizer, **kwargs)
        self._steps += 1
        self._skips = self._skips + self.last_skip
        self._scale_update_due = True
        self._unscaled.discard(id(optimizer))
        return outcome

    def update_loss_scale(self) -> None:
        if self.scaler is not None and (self._scale_update_due or self._unscaled):
            self.scaler.update()
            self._scale_update_due = False
            self._unscaled.clear()

    def skip_counts(self) -> tuple[int, int]:
        """How many steps the scaler skipped since `connect`, and of how many (sync with fused optimizers)."""
        return int(self._skips), self._steps

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        self.update_loss_scale()
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class HalfPrecision(Precision):
    """Weights, batches and computation in float16 ("16-true") or bfloat16 ("bf16-true"); updates are made in float32.

    `engine.stochastic_rounding` says how and why. Memory is that of the 16-bit weights, gradients and states, except that states
    of float16 weights have 32 bits.
    """

    def __init__(self, precision: Literal["16-true", "bf16-true"] = "16-true") -> None:
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
        self._steps = 0

    @property
    def step_is_default(self) -> bool:
        return False

    def convert_module(self, module: Module) -> Module:
        # Not `module.to(dtype)`, which makes complex numbers real; these stay as they are.
        if self.dtype == torch.float64:
            return module.double()
        return module.bfloat16() if self.dtype == torch.bfloat16 else module.half()

    def convert_input(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t)

    def convert_output(self, data: Any) -> Any:
        return convert_to_default_dtype(data)

    @contextmanager
    def forward_context(self) -> Generator[None]:
        """Tensors created inside have this dtype."""
        previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(previous)

    tensor_init_context = module_init_context = forward_context

    def optimizer_step(
        self, optimizer: Optimizer, model: Module | None = None, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Any:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(_LBFGS_REFUSED.format(self.precision, "which is made in float32"))
        outcome = None if closure is None else self._wrap_closure(model, optimizer, closure)
        step_in_float32(optimizer, seed=self.next_seed(), **kwargs)
        return outcome

    def next_seed(self) -> int:
        """The seed of the roundings of the next step; it depends on the number of steps alone."""
        self._steps += 1
        return self._steps << 16

    def state_context(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        """States that are loaded keep their 32 bits with float16 weights."""
        return float32_stand_ins(optimizer) if self.dtype == torch.float16 else nullcontext()

    def clip_grad_by_norm(
        self, optimizer: Optimizer, clip_val: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor | None:
        if norm_type != 2.0:
            return Precision.clip_grad_by_norm(self, optimizer, clip_val, norm_type, error_if_nonfinite)
        # A norm in float16 is infinite beyond 65,504, and clipping to it would erase the gradients.
        parameters = [p for p in self.main_params(optimizer) if p.grad is not None]
        norm = self.gradient_norm(optimizer)
        if error_if_nonfinite:
            check_finite_norm(norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps} if self._steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["steps"]


class DoublePrecision(HalfPrecision):
    """Everything in float64."""

    optimizer_step = Precision.optimizer_step
    clip_grad_by_norm = Precision.clip_grad_by_norm
    step_is_default = Precision.step_is_default

    def __init__(self) -> None:
        super().__init__()
        self.precision = "64-true"
        self.dtype = torch.float64
