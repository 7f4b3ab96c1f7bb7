"""`Precision`: in which numbers the model computes. Fires no hooks; the loops call it where it matters."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import overridden

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch.nn import Module
    from torch.optim import Optimizer

    from fulmen.utilities.types import GradClipAlgorithmType


class Precision:
    """Full precision, and the base of all others: every verb is one a subclass may override.

    The loops ask once per run which verbs are overridden; those that are not cost nothing per step.
    """

    precision: Any = "32-true"

    @property
    def plain_step(self) -> bool:
        """Whether applying the update is nothing but `optimizer.step()` after the gradients are finished."""
        return not overridden(self, "optimizer_step", Precision)

    def convert_module(self, module: Module) -> Module:
        """The module in the dtype of its weights."""
        return module

    def convert_input(self, data: Any) -> Any:
        """A batch in the dtype the model computes in."""
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

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        """The loss that `backward` is called on."""
        return tensor

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Backpropagates through the module's own `backward`."""
        model.backward(tensor, *args, **kwargs)

    def post_backward(self, tensor: Tensor, module: Any) -> Tensor:
        """The loss that is handed on after `backward`."""
        return tensor

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Takes the loss scale out of the gradients, before anybody looks at them."""

    def optimizer_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Runs the closure (forward, backward, finishing the gradients) and applies the update."""
        return optimizer.step(closure=closure, **kwargs)

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str | GradClipAlgorithmType = "norm"
    ) -> None:
        """Clips the gradients of the optimizer's parameters; 0 or less does nothing."""
        by_value = getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm) == "value"
        if clip_val > 0:
            (self.clip_grad_by_value if by_value else self.clip_grad_by_norm)(optimizer, clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clamps every element to [-clip_val, clip_val]."""
        torch.nn.utils.clip_grad_value_(self.main_params(optimizer), clip_value=clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scales all gradients together so that their L2 norm is at most `clip_val`."""
        torch.nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val)

    def main_params(self, optimizer: Optimizer) -> list[Tensor]:
        """The parameters the optimizer updates."""
        return [p for group in optimizer.param_groups for p in group["params"]]

    def connect(self, model: Module, optimizers: list, lr_schedulers: list) -> tuple[Module, list, list]:
        """Last word on the model and its optimizers before training."""
        return model, optimizers, lr_schedulers

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; empty for stateless precisions."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""

    def teardown(self) -> None:
        """At the end of a run."""


class MixedPrecision(Precision):
    """Autocast for a ``device`` type around every forward; for "16-mixed" a ``scaler``, by default torch's own."""

    def __init__(self, precision: Literal["16-mixed", "bf16-mixed"], device: str, scaler: Any = None) -> None:
        if precision not in ("16-mixed", "bf16-mixed"):
            raise ValueError(f"`{precision=}` is not a mixed precision. Use '16-mixed' or 'bf16-mixed'.")
        if scaler is not None and precision == "bf16-mixed":
            what = "`MixedPrecision('bf16-mixed', scaler=...)`: gradients in bfloat16 do not underflow."
            raise MisconfigurationException(f"{what} Leave `scaler` out, or use '16-mixed'.")
        self.precision, self.device = precision, str(device).split(":")[0]
        self.dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        self.scaler = torch.amp.GradScaler(self.device) if precision == "16-mixed" and scaler is None else scaler

    @property
    def plain_step(self) -> bool:
        return self.scaler is None and not overridden(self, "optimizer_step", MixedPrecision)

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        return tensor if self.scaler is None else self.scaler.scale(tensor)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        # Fused optimizers unscale inside their own step: doing it here as well would divide twice.
        if self.scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            self.scaler.unscale_(optimizer)

    def optimizer_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, torch.optim.LBFGS):
            what = "`precision='16-mixed'`: LBFGS evaluates the loss several times per step, a loss scaler allows one."
            raise MisconfigurationException(f"{what} Use 'bf16-mixed' or '32-true', or another optimizer.")
        # `training_step` returned no loss: there are no gradients to apply
        if closure() is None and getattr(model, "automatic_optimization", True):
            return None
        outcome = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return outcome

    def clip_gradients(self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        if clip_val > 0 and self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            what = f"The fused {type(optimizer).__name__} unscales gradients inside its step, too late for clipping."
            raise RuntimeError(f"{what} Create it with `fused=False`, or use 'bf16-mixed'.")
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)


class HalfPrecision(Precision):
    """Weights, batches and computation in float16 or bfloat16."""

    def __init__(self, precision: Literal["16-true", "bf16-true"] = "16-true") -> None:
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16

    def convert_module(self, module: Module) -> Module:
        return module.to(dtype=self.dtype)

    def convert_input(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t)

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


class DoublePrecision(HalfPrecision):
    """Everything in float64."""

    def __init__(self) -> None:
        self.precision, self.dtype = "64-true", torch.float64
