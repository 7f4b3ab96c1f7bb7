"""What training steps return and what is logged, under the names that loops of others import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen.loops.accumulation import read_output
from fulmen.metrics.entries import Entry
from fulmen.metrics.logbook import MetricScope

if TYPE_CHECKING:
    from typing_extensions import Self

_OUT_DICT = dict[str, Tensor]
_PBAR_DICT = dict[str, float]
_METRICS = dict[str, Any]  # with the keys "callback", "log" and "pbar"
_ResultMetric = Entry
_ResultCollection = MetricScope


@dataclass
class OutputResult:
    """What a step gives to the loop."""

    def asdict(self) -> dict[str, Any]:
        """What hooks get as `outputs`."""
        raise NotImplementedError


@dataclass
class ClosureResult(OutputResult):
    """A loss to go backward from, and what else the step returned.

    >>> import torch
    >>> output = {"loss": torch.tensor(2.0, requires_grad=True), "n": 1}
    >>> ClosureResult.from_training_step_output(output, normalize=4).closure_loss.item()
    0.5
    """

    closure_loss: Tensor | None
    loss: Tensor | None = field(init=False, default=None)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss = None if self.closure_loss is None else self.closure_loss.detach().clone()

    @classmethod
    def from_training_step_output(cls, training_step_output: Any, normalize: int = 1) -> Self:
        """Reads what `training_step` returned; the loss is divided by `normalize`."""
        loss, extra, _ = read_output(training_step_output, "`training_step`", check=True)
        return cls(None if loss is None else loss / normalize, extra=dict(extra or {}))

    def asdict(self) -> dict[str, Any]:
        return {"loss": self.loss, **self.extra}


@dataclass
class ManualResult(OutputResult):
    """What a step returned that optimizes by itself."""

    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_training_step_output(cls, training_step_output: Any) -> Self:
        """Reads what `training_step` returned."""
        if isinstance(training_step_output, Tensor):
            training_step_output = {"loss": training_step_output}
        found = dict(training_step_output or {})
        if isinstance(found.get("loss"), Tensor):
            found["loss"] = found["loss"].detach()
        return cls(found)

    def asdict(self) -> dict[str, Any]:
        return self.extra


class Closure:
    """Forward, clearing of gradients and backward as one function for `optimizer.step`.

    Arguments:
        step_fn: the forward pass, which gives a `ClosureResult`.
        backward_fn: goes backward from its loss.
        zero_grad_fn: clears gradients in between.
    """

    def __init__(
        self,
        step_fn: Callable[[], ClosureResult],
        backward_fn: Callable[[Tensor], Any] | None = None,
        zero_grad_fn: Callable[[], None] | None = None,
    ) -> None:
        self._step_fn = step_fn
        self._backward_fn = backward_fn
        self._zero_grad_fn = zero_grad_fn
        self._result: ClosureResult | None = None

    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """One pass."""
        result = self._step_fn()
        if result.closure_loss is not None:
            if self._zero_grad_fn is not None:
                self._zero_grad_fn()
            if self._backward_fn is not None:
                self._backward_fn(result.closure_loss)
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self._result = self.closure(*args, **kwargs)
        return self._result.loss

    def consume_result(self) -> ClosureResult:
        """The result of the last pass, once."""
        result = self._result
        self._result = None
        if result is None:
            what = "The closure has not been executed, or its result was taken already."
            raise RuntimeError(f"{what} Call it in `optimizer_step`: `optimizer.step(closure)`.")
        return result


AbstractClosure = Closure
