"""From what `training_step` returned to the loss backward is called on: read, checked, and divided by its window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import scale_gradients
from fulmen.utilities.rank_zero import rank_zero_info, warn_once

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy

# A number of samples, tokens, ... that a loss was summed over; None for the mean of a batch.
Weight = Tensor | float | None
# (loss, other outputs, weight)
Output = tuple[Tensor | None, Mapping[str, Any] | None, Weight]


class AccumulationWindow:
    """The losses whose gradients make up one optimizer step.

    The gradient of a window is that of one large batch: the sum of its losses by the sum of their weights, where a loss
    without weight is the mean of its batch and weighs 1. Each loss is divided at once by what the window is expected to
    weigh, which keeps gradients in the range of a mean; if it comes to weigh something else, `gradient_factor` makes up for it.
    """

    __slots__ = ("divisor", "expected", "held", "total")

    def __init__(self) -> None:
        self.held = self.expected = 0  # losses so far, and with the last one those that were to come
        self.divisor: Any = 1
        self.total: Any = 0  # weight; the divisor and it are tensors if weights are, so that nothing waits for them

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of an open window."""
        return {"held": self.held, "divisor": self.divisor, "total": self.total, "expected": self.expected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave, also with another number of processes."""
        for name in state.keys() & self.state_dict().keys():
            setattr(self, name, state[name])

    def count_active(self, opens: bool, exhausted: bool, num_active: int) -> None:
        """Not all ranks may have the next batch: has this one none, and how many have?"""

    def scale_loss(self, loss: Tensor, weight: Weight, expected: int) -> Tensor:
        """The loss divided; the first of a window decides by what, from the losses that are `expected` to come."""
        if isinstance(weight, Tensor):
            weight = weight.detach().reshape(()).to(torch.float32 if weight.device.type == "mps" else torch.float64)
        if self.held == 0:
            self.divisor = self.first_divisor(weight, expected, loss)
            self.total = 0
        self.held += 1
        self.expected = expected
        self.total = self.total + (1 if weight is None else weight)
        share: Tensor = loss / self.divisor
        return share

    def first_divisor(self, weight: Weight, expected: int, loss: Tensor) -> Any:
        """What the losses of a window are divided by at once."""
        return _sum_divisor(weight, expected, loss)

    def gradient_factor(self) -> Any:
        """The factor that the gradients still need; None for none. Waits for nothing: a tensor is not looked at."""
        if isinstance(self.total, Tensor):
            divisor = self.divisor.to(self.total) if isinstance(self.divisor, Tensor) else self.divisor
            return torch.where(self.total > 0, divisor / self.total, torch.ones_like(self.total))
        if isinstance(self.divisor, Tensor):
            return self.divisor.double() / self.total
        return None if self.total in (self.divisor, 0) else self.divisor / self.total


class DistributedWindow(AccumulationWindow):
    """A window over several processes, whose gradients are averaged in the backward pass of its last loss.

    With weights, what the window weighs in all processes is known before that pass, after one sum over them: the
    gradients so far and the last loss are divided by the mean weight of a process, and the average is right. The same
    is done where not all processes have all batches; without weights, each batch weighs 1, and nothing is asked.

    Arguments:
        strategy: sums over the processes.
        parameters: gives those whose gradients are in the window.
    """

    __slots__ = ("batches", "exhausted", "parameters", "partial", "strategy", "weighted")

    def __init__(self, strategy: Strategy, parameters: Callable[[], Iterable[Any]]) -> None:
        super().__init__()
        self.strategy = strategy
        self.parameters = parameters
        self.weighted = False
        self.batches = 0  # of all processes, while they are counted
        self.exhausted = False  # has this rank no batch of its own for the current step?
        self.partial = False  # was a batch of the window not on all ranks?

    def state_dict(self) -> dict[str, Any]:
        state = {"batches": self.batches, "partial": self.partial, "weighted": self.weighted}
        return {**super().state_dict(), **state}

    def count_active(self, opens: bool, exhausted: bool, num_active: int) -> None:
        if opens:
            self.batches = 0
            self.partial = False
        self.exhausted = exhausted
        self.batches += num_active
        self.partial = self.partial or num_active < self.strategy.world_size

    def scale_loss(self, loss: Tensor, weight: Weight, expected: int) -> Tensor:
        if not self.exhausted:  # else the windows before tell
            self.weighted = weight is not None if self.held == 0 else self.weighted or weight is not None
        share = super().scale_loss(loss, 0 if self.exhausted else weight, expected)
        if expected > 1 or not (self.weighted or self.partial):
            return share
        mean: Any = self.batches / self.strategy.world_size
        if self.weighted:
            mean = self.mean_of(self.total, loss).to(loss.dtype)
        if self.held > 1:
            scale_gradients(self.parameters(), self.divisor / mean)
        self.divisor = self.total = 1  # nothing is left to correct
        exact: Tensor = loss / mean
        return exact

    def mean_of(self, weight: Tensor | float, loss: Tensor) -> Tensor:
        """The mean weight of a process; 1 if none weighs anything."""
        own = weight if isinstance(weight, Tensor) else torch.tensor(float(weight), dtype=torch.float64)
        mean = self.strategy.reduce(own.to(loss.device), reduce_op="mean")
        return torch.where(mean > 0, mean, torch.ones_like(mean))


class PostReduceWindow(DistributedWindow):
    """A `DistributedWindow` whose gradients are out of reach until they were averaged.

    So all processes divide by the same, the mean weight of their first losses, and correct the average.
    """

    __slots__ = ("accumulates",)

    def first_divisor(self, weight: Weight, expected: int, loss: Tensor) -> Any:
        self.accumulates = expected > 1
        if not self.weighted:
            return _sum_divisor(None, expected, loss)
        if self.accumulates:
            return (self.mean_of(1 if weight is None else weight, loss) * expected).to(loss.dtype)
        return _sum_divisor(weight, expected, loss)

    def scale_loss(self, loss: Tensor, weight: Weight, expected: int) -> Tensor:
        if expected == 1 and (self.held == 0 or not self.accumulates):
            return super().scale_loss(loss, weight, expected)
        if not self.exhausted:
            self.weighted = weight is not None if self.held == 0 else self.weighted or weight is not None
        share = AccumulationWindow.scale_loss(self, loss, 0 if self.exhausted else weight, expected)
        if self.weighted and expected == 1:
            self.total = self.mean_of(self.total, loss)
        elif self.partial and expected == 1:
            self.total = self.batches / self.strategy.world_size
        return share


def _sum_divisor(weight: Weight, expected: int, loss: Tensor) -> Any:
    if weight is None:
        return expected
    if isinstance(weight, Tensor):
        # A batch may weigh nothing, if all of its tokens are padding: its sum is 0 then, whatever it is divided by.
        return torch.where(weight > 0, weight * expected, torch.ones_like(weight)).to(loss.dtype)
    return weight * expected if weight > 0 else 1


def read_output(output: Any, name: str, check: bool, source: str = "returned") -> Output:
    """The loss, other outputs and the weight in what `training_step` returned (or, with `source`, yielded).

    Arguments:
        name: of the step, for messages.
        check: look at the loss closely; done for the first one.

    Raises:
        MisconfigurationException: for anything that is no loss, no loss with a weight, no dict with a loss and not None.
    """
    origin = f"{name} {source}"
    loss, extra, weight = _unpack_output(output, origin)
    if loss is None:
        return None, extra, None
    if weight is not None:
        _check_weight(weight, origin)
    if check:
        _check_loss(loss, origin)
        if weight is not None:
            rank_zero_info(f"{origin} a weight: losses are summed, and divided by the sum of their weights.")
    return loss, extra, weight


def _unpack_output(output: Any, origin: str) -> Output:
    if isinstance(output, Tensor):
        return output, None, None
    if output is None:
        warn_once(f"{origin} `None`: there is no loss, the batch is skipped.")
        return None, None, None
    if isinstance(output, Mapping):
        if "loss" not in output:
            what = f"{origin} a dict without the key 'loss' (keys: {sorted(map(str, output))})."
            raise MisconfigurationException(f'{what} Return {{"loss": loss, ...}}, or None to skip the batch.')
        extra = {key: value for key, value in output.items() if key != "loss"}
        return output["loss"], extra, output.get("weight")
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
        return output[0], None, output[1]
    what = f"{origin} a {type(output).__name__}: {str(output)[:80]}."
    fix = "Return the loss as a tensor, (its sum, its weight), a dict that has it under 'loss', or None to skip the batch."
    raise MisconfigurationException(f"{what} {fix}")


def _check_weight(weight: object, origin: str) -> None:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= weight < float("inf")
    if not number and not (isinstance(weight, Tensor) and weight.numel() == 1):
        shown = f"a tensor of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)[:80]
        why = "It says over how many samples (or tokens, ...) the loss was summed."
        fix = "Give a number that is 0 or more, or a tensor with one; without a weight the loss counts as a mean."
        raise MisconfigurationException(f"{origin} {shown} as the weight of the loss. {why} {fix}")


def _check_loss(loss: object, origin: str) -> None:
    """Raises the error autograd would raise later, in words of the training loop."""
    if not isinstance(loss, Tensor):
        problem = f"a {type(loss).__name__} instead of a tensor"
        fix = "Return the loss as a tensor."
    elif loss.numel() != 1:
        problem = f"a tensor of shape {tuple(loss.shape)}"
        fix = "Reduce it to one number, e.g. with `.mean()`."
    elif not loss.is_floating_point():
        problem = f"a tensor of dtype {loss.dtype}"
        fix = "Compute the loss from floating-point outputs."
    elif not loss.requires_grad:
        problem = "a tensor without gradient"
        fix = "Remove `.detach()`, `.item()` or `no_grad` on its way, and check that parameters require gradients."
    else:
        return
    what = f"{origin} {problem} as the loss. Backward needs one differentiable number."
    raise MisconfigurationException(f"{what} {fix}")
