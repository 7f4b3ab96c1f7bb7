"""Batch normalisation over the batches of all processes, and the plug-in that puts it into a model and takes it out."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fulmen.utilities.rank_zero import rank_zero_warn

# torch 2.13 renamed it and warns about the old name; a build without distributed has neither.
_all_gather: Callable[..., Any]
if hasattr(dist, "all_gather_single"):
    _all_gather = dist.all_gather_single
elif dist.is_available():
    _all_gather = dist.all_gather_into_tensor


class LayerSync(ABC):
    """Replaces layers whose statistics should span all processes, such as batch norm, and puts them back."""

    @abstractmethod
    def apply(self, model: Module) -> Module:
        """The model with synchronised layers, while it is fitted."""

    @abstractmethod
    def revert(self, model: Module) -> Module:
        """The model with its own layers again."""


class SyncBatchNorm(_BatchNorm):
    """Batch norm of inputs [N, C, ...] whose statistics are those of the batches of all ranks together.

    In training, with several ranks in the group, output, input gradient and running statistics are what `BatchNorm`
    gives for the concatenated batch, on a CPU as on GPUs. N may differ between ranks and may be 0, but each rank has to
    run the same layers. Otherwise (eval mode, one rank, no process group, or a rank outside of the group) the layer *is*
    `BatchNorm`. Keys of the state dict are the same too.

    - One collective in forward; one more in backward if the input needs a gradient (on all ranks, or on none).
    - Gradients of weight and bias are sums over the rank's own batch: DDP combines them, as it does for other layers.
    - Statistics are float32 for half-precision inputs. Nothing waits for the device, unless a rank has at most one
      value per channel: then all ranks must find out whether that is all there is, which is a ValueError.
    - Activation checkpointing repeats forward with its collective: fine if all ranks checkpoint the same layers.
    - There is no second derivative: differentiating the gradient raises RuntimeError.
    """

    _original: type[_BatchNorm] | None = None  # the class before `convert`

    _in_shadow_step = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    @classmethod
    def convert(cls, module: Module, process_group: dist.ProcessGroup | None = None) -> Module:
        """The same module, in which each batch norm layer now synchronises over the group (None: all ranks).

        Layers stay the objects they were, with their parameters, buffers and hooks, and instances of their old class:
        only their class changes. Lazy layers count; one that has a `forward` of its own is left alone, with a warning.
        """
        for layer in module.modules():
            if not isinstance(layer, _BatchNorm) or isinstance(layer, SyncBatchNorm):
                continue
            kind: Any = type(layer)
            if kind.forward not in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward):
                what = f"`{kind.__name__}` has a `forward` of its own, so its statistics stay those of each process"
                rank_zero_warn(f"{what}. Build it on `fulmen.SyncBatchNorm` if they should span all.")
                continue
            converted: Any = layer
            converted.process_group = vars(layer).get("process_group") or process_group
            converted.__class__ = _synchronized_class(kind)
        return module

    @classmethod
    @contextmanager
    def shadow_step(cls) -> Generator[None]:
        """Inside, layers take part in the collectives of other ranks, with a batch that does not count."""
        cls._in_shadow_step = True
        try:
            yield
        finally:
            cls._in_shadow_step = False

    @staticmethod
    def revert(module: Module) -> Module:
        """The same module, in which each layer that `convert` changed has its old class again."""
        for layer in module.modules():
            if isinstance(layer, SyncBatchNorm) and layer._original is not None:
                original: Any = layer._original
                layer.__class__ = original
                if original is not torch.nn.SyncBatchNorm:
                    del layer.process_group
        return module

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # A converted class has no place to be imported from: copies and pickles name the original.
        return super().__reduce_ex__(protocol) if self._original is None else (_blank, (self._original,), vars(self))

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"The input has {input.dim()} dimensions, but needs at least 2: batch and channels.")

    def forward(self, input: Tensor) -> Tensor:
        num_ranks = 1
        if self.training and dist.is_available() and dist.is_initialized():
            num_ranks = dist.get_world_size(self.process_group)
        if num_ranks < 2:
            return super().forward(input)
        self._check_input_dim(input)
        own = input[:0] if SyncBatchNorm._in_shadow_step else input
        with torch.no_grad():
            mean, m2, total = merge_statistics(own, self.process_group, num_ranks)
            # sync: a rank with several values knows without asking that there is more than one
            if input.numel() <= input.size(1) and total.item() == 1:
                what = f"got one from all {num_ranks} ranks together (here the input is {list(input.shape)})"
                raise ValueError(f"Expected more than 1 value per channel when training, {what}. Use larger batches.")
            if self.track_running_stats:
                self._update_running_statistics(mean, m2, total)
            dtype = _statistics_dtype(input)
            mean = mean.to(dtype)
            var = (m2 / total.clamp(min=1)).to(dtype)
        result: Tensor = _NormalizeWithAllRanks.apply(  # type: ignore[no-untyped-call]
            own, self.weight, self.bias, mean, var, total, self.eps, self.process_group
        )
        if own is not input:  # normalised beside those that count; nothing of it is used
            result = F.batch_norm(input, mean, var, eps=self.eps) + result.sum()
        return result

    def _update_running_statistics(self, mean: Tensor, m2: Tensor, total: Tensor) -> None:
        """Move the running statistics; a batch that is empty on all ranks counts, but moves nothing."""
        momentum = total.clamp(max=1) * (self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = total.clamp(max=1) / self.num_batches_tracked
        unbiased = m2 / (total - 1).clamp(min=1)
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            if running is not None:
                running.add_(momentum * (value - running))


class TorchSyncBatchNorm(LayerSync):
    """Batch norm over all processes: `Trainer(sync_batchnorm=True)` does the same."""

    def apply(self, model: Module) -> Module:
        return SyncBatchNorm.convert(model)

    def revert(self, model: Module) -> Module:
        return SyncBatchNorm.revert(model)


def merge_statistics(input: Tensor, group: dist.ProcessGroup | None, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C] and sum of squared deviations from it [C] over all ranks, and the number of values per channel [].

    All float64 and bitwise the same on every rank. A rank adds its count, mean and sum of squared deviations; these are
    combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), eq. 2.1, for any number of parts.
    """
    num_channels = input.size(1)
    dtype = _statistics_dtype(input)
    count = input.numel() // num_channels
    own = input.new_zeros(2 * num_channels + 1, dtype=dtype)
    if count:
        # On a CPU the kernel answers in the dtype it is given, elsewhere in the one it accumulates in.
        batch = input.to(dtype) if input.device.type == "cpu" else input
        mean, var = torch.batch_norm_update_stats(batch, None, None, 0.0)
        own = torch.cat([mean, var * count, own[-1:] + count])
    every = own.new_empty(num_ranks * len(own))
    _all_gather(every, own, group=group)
    # Few numbers, so the wider type costs nothing; MPS has none, but no collectives either.
    means, m2s, counts = every.double().view(num_ranks, -1).split_with_sizes([num_channels, num_channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    return mean, (m2s + counts * (means - mean) ** 2).sum(0), total


class _NormalizeWithAllRanks(Function):
    """Normalises with statistics [C] of all ranks, and differentiates through them.

    The gradient is that of Ioffe and Szegedy, "Batch Normalization" (2015), section 3, where both means over the batch
    are over all ranks: dx = weight / std * (dy - mean(dy) - x_hat * mean(dy * x_hat)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        total: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, var, total)
        ctx.eps = eps
        ctx.group = group
        ctx.bias_dtype = None if bias is None else bias.dtype
        if not input.numel():
            return torch.empty_like(input)
        weight, bias = (None if tensor is None else tensor.to(mean.dtype) for tensor in (weight, bias))
        return F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        input, weight, mean, var, total = ctx.saved_tensors
        inv_std = torch.rsqrt(var + ctx.eps)
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        if input.numel():
            # The kernel of BatchNorm's own backward pass, asked for the two sums only.
            _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
                dy, input, scale, None, None, mean, inv_std, True, ctx.eps, [False, True, True]
            )
        else:
            sum_dy_xhat = sum_dy = torch.zeros_like(mean)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([sum_dy, sum_dy_xhat])
            dist.all_reduce(sums, group=ctx.group)
            dx = torch.empty_like(input)
            if input.numel():
                scale = scale * inv_std
                mean_dy, mean_dy_xhat = (sums / total).view(2, -1) * -scale
                # One pass of the same kernel as in forward gives both corrections: x_hat * weight + bias.
                dx = F.batch_norm(input, mean, var, mean_dy_xhat, mean_dy, training=False, eps=ctx.eps)
                dx.addcmul_(dy, scale.view(1, -1, *[1] * (dy.dim() - 2)))
        d_weight = sum_dy_xhat.to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = sum_dy.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, d_weight, d_bias, None, None, None, None, None


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


@functools.cache
def _synchronized_class(kind: Any) -> type[SyncBatchNorm]:
    """The class of converted layers: still of that kind, with the forward pass of `SyncBatchNorm`."""
    # DDP refuses layers of torch's class on a CPU.
    bases = (SyncBatchNorm,) if kind is torch.nn.SyncBatchNorm else (SyncBatchNorm, kind)
    body = {"_original": kind, "_check_input_dim": kind._check_input_dim, "__module__": __name__}
    if issubclass(kind, LazyModuleMixin) and kind.cls_to_become is not None:  # once it has seen an input
        body["cls_to_become"] = _synchronized_class(kind.cls_to_become)
    return type(f"Sync{kind.__name__.removeprefix('Sync')}", bases, body)


# Pickles of converted layers name this function.
def _blank(kind: Any) -> SyncBatchNorm:
    """A converted layer that copying or unpickling fills."""
    converted = _synchronized_class(kind)
    return converted.__new__(converted)
