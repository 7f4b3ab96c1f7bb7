"""Tensors sharded over processes (`DTensor`): their full value, norms, loss scaling, and the precision that uses them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fulmen.engine import collectives
from fulmen.engine.precision import HalfPrecision, MixedPrecision, Precision, check_finite_norm
from fulmen.engine.stochastic_rounding import stochastic_round
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import full_tensor, is_dtensor, local_part, scale_gradients, spread_like, total_norm

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

SUPPORTED_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


def gather_full(value: T, keep: bool) -> T | Tensor | None:
    """The full tensor on the CPU, or None without ``keep``; a collective. What is no `DTensor` comes back as it is.

    Arguments:
        keep: does this process need it?
    """
    if not is_dtensor(value):
        return value if keep else None
    full = full_tensor(value.detach())
    return full.cpu() if keep else None


def shard_like(full: Tensor, like: DTensor) -> Tensor:
    """This process's shard of a full tensor, sharded like the `DTensor` ``like``; without a collective."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return spread_like(full[tuple(slice(start, start + size) for start, size in zip(offset, shape))], like)


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all elements together, the same on all processes, in at least float32.

    One sum travels for each way of spreading, however many tensors there are.
    """
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key: Any = None
        if is_dtensor(gradient):
            spread = [dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()]
            key = gradient.device_mesh, tuple(spread)
        groups.setdefault(key, []).append(local_part(gradient))
    squares = []
    for key, parts in groups.items():
        square = total_norm(parts).square()
        for dim in key[1] if key is not None else ():
            group = key[0].get_group(dim)
            travelling = square.to(collectives.comm_device(torch.device(key[0].device_type), group))
            dist.all_reduce(travelling, group=group)
            square = travelling.to(parts[0].device)
        squares.append(square)
    return (
        torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt() if squares else torch.zeros(())
    )


class ShardedGradScaler(torch.amp.GradScaler):
    """Torch's loss scaler for gradients that are spread over processes: what one of them finds counts for all."""

    def _unscale_grads_(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        # Parts of 16 bits are fine here: parameters of 16 bits whose update is made in float32 have them.
        parts = []
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            part = local_part(parameter).detach()
            part.grad = local_part(parameter.grad)
            parts.append(part)
        found = super()._unscale_grads_(
            SimpleNamespace(param_groups=[{"params": parts}]),  # type: ignore[arg-type]
            inv_scale, found_inf, allow_fp16,
        )  # fmt: skip
        # A process without gradients takes part too.
        device = next(iter(found), found_inf.device)
        votes = [value.to(device) for value in found.values()] or [torch.zeros_like(found_inf)]
        worst = torch.stack(votes).amax(dim=0).to(collectives.comm_device(found_inf.device))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        for value in found.values():
            value.copy_(worst)
        return found


class FSDPPrecision(MixedPrecision):
    """The numbers of a model whose parameters are spread over processes.

    With mixed precision, weights travel and are used in 16 bits, operations are autocast, and gradients are averaged in
    float32. Batch norm stays in float32.

    Arguments:
        precision: "32-true", "bf16-mixed", "16-mixed", "bf16-true" or "16-true".
        scaler: for "16-mixed", instead of the one that knows about other processes.

    Raises:
        ValueError: for another precision, or a scaler that it has no use for.
    """

    def __init__(self, precision: str, scaler: torch.amp.GradScaler | None = None) -> None:
        if precision not in SUPPORTED_PRECISIONS:
            what = f"`FSDPPrecision({precision!r})`: parameters that are spread over processes are not kept in it."
            raise ValueError(f"{what} Use one of {', '.join(map(repr, SUPPORTED_PRECISIONS))}.")
        if scaler is not None and precision != "16-mixed":
            raise ValueError(f"`{precision=}` needs no loss scaler. Leave `scaler` out, or use '16-mixed'.")
        super().__init__("bf16-mixed", "")
        self.precision = precision
        self.scaler = scaler
        self.mixed = precision.endswith("-mixed")
        if precision.startswith("16"):
            self.dtype = torch.float16
        # What is done where weights themselves have 16 bits.
        self.half = Precision()
        if precision.endswith("16-true"):
            self.half = HalfPrecision("bf16-true" if precision == "bf16-true" else "16-true")

    def use_device(self, device: torch.device) -> None:
        """The device is known."""
        self.device = device.type
        if self.precision == "16-mixed" and self.scaler is None:
            self.scaler = ShardedGradScaler(device.type)

    @property
    def mixed_precision_config(self) -> MixedPrecisionPolicy:
        """The `MixedPrecisionPolicy` for `fully_shard`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.mixed:  # inputs are cast where an operation wants it; targets of a loss stay as they are
            return MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        return MixedPrecisionPolicy(cast_forward_inputs=False)

    @property
    def step_is_default(self) -> bool:
        return self.scaler is None and self.half.step_is_default

    def convert_module(self, module: Module) -> Module:
        if self.mixed and (found := [name for name, p in module.named_parameters() if p.is_complex()]):
            what = f"`precision={self.precision!r}`: `fully_shard` would make the complex parameters {found[:5]} real."
            raise MisconfigurationException(f"{what} Use '32-true', or keep them as pairs of real numbers.")
        return self.half.convert_module(module)

    def convert_input(self, data: Any) -> Any:
        return self.half.convert_input(data)

    def convert_forward_input(self, data: Any) -> Any:
        return super().convert_forward_input(data) if self.mixed else self.half.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return super().convert_output(data) if self.mixed else self.half.convert_output(data)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self.half.tensor_init_context()

    module_init_context = tensor_init_context

    def forward_context(self) -> AbstractContextManager[Any]:
        return super().forward_context() if self.mixed else self.half.forward_context()

    def optimizer_step(
        self, optimizer: Optimizer, model: Module | None = None, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Any:
        if not isinstance(self.half, HalfPrecision):
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        outcome = None if closure is None else closure()
        with sharded_stand_ins(optimizer, seed=self.half.next_seed()):
            optimizer.step(**kwargs)
        return outcome

    def state_context(self, optimizer: Optimizer) -> AbstractContextManager[Any]:
        return nullcontext() if self.half.step_is_default else sharded_stand_ins(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.half.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "steps" in state_dict:
            self.half.load_state_dict(state_dict)
        else:
            super().load_state_dict(state_dict)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        return global_norm(p.grad for p in self.main_params(optimizer) if p.grad is not None)

    def clip_grad_by_norm(
        self, optimizer: Optimizer, clip_val: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        norm = self.gradient_norm(optimizer)
        if norm_type != 2.0:
            gradients = [p.grad for p in self.main_params(optimizer) if p.grad is not None]
            total: Any = torch.nn.utils.get_total_norm(gradients, norm_type)
            norm = total.full_tensor() if is_dtensor(total) else total
        if error_if_nonfinite:
            check_finite_norm(norm)
        scale_gradients(self.main_params(optimizer), (clip_val / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        for parameter in self.main_params(optimizer):
            if parameter.grad is not None:
                local_part(parameter.grad).clamp_(-clip_val, clip_val)


@contextmanager
def sharded_stand_ins(optimizer: Optimizer, seed: int | None = None) -> Generator[None]:
    """Inside, the optimizer has parameters, gradients and states of 32 bits; afterwards its own, with rounded values.

    With a seed, bfloat16 is rounded by chance (`engine.stochastic_rounding`), on replicas alike.
    """
    narrow = []
    for group in optimizer.param_groups:
        for index, own in enumerate(group["params"]):
            dtype = torch.promote_types(own.dtype, torch.float32)  # complex numbers stay complex
            wide = group["params"][index] = torch.nn.Parameter(own.detach().to(dtype))
            wide.grad = None if own.grad is None else own.grad.to(dtype)
            narrow.append(own)
            if own in optimizer.state:
                optimizer.state[wide] = optimizer.state.pop(own)
    try:
        yield
    finally:
        # Loading a state replaces the groups, but keeps their parameters in order.
        places = [(group["params"], i) for group in optimizer.param_groups for i in range(len(group["params"]))]
        for number, (own, (place, index)) in enumerate(zip(narrow, places)):
            wide = place[index]
            place[index] = own
            part = local_part(wide).detach()
            if seed is not None and own.dtype == torch.bfloat16 and part.numel():
                generator = torch.Generator(part.device).manual_seed(seed + number)
                part = stochastic_round(part.reshape(-1).clone(), generator).view(part.shape)
            with torch.no_grad():
                local_part(own).copy_(part)
            if wide in optimizer.state:
                optimizer.state[own] = optimizer.state.pop(wide)
