"""Values that `self.log` takes: which of them can be logged, and how they become tensors or Python numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Complex, Real
from typing import TypeVar

import torch
from torch import Tensor

from fulmen.utilities.errors import describe_received
from fulmen.utilities.rank_zero import warn_once

Value = Tensor | float
Name = TypeVar("Name")

# Of these types, values need no check but that of their shape.
PLAIN_TYPES = frozenset((Tensor, float, int, bool))


def check_value(name: str, value: object) -> None:
    """Refuses what is not one real number.

    Raises:
        ValueError: for several numbers, a complex one, or something that is no number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"`self.log('{name}', ...)` received a tensor of shape {tuple(value.shape)}. Only one number can be "
                f"logged under one name. Reduce it first, for example `self.log('{name}', value.mean())`."
            )
        is_complex = value.is_complex()
    else:
        is_complex = isinstance(value, Complex) and not isinstance(value, Real)
    if is_complex:
        raise ValueError(
            f"`self.log('{name}', ...)` received the complex number {value}. Only real ones can be reduced and logged. "
            "Log `value.abs()`, or `value.real` and `value.imag` under two names."
        )
    if not isinstance(value, Tensor) and not _is_number(value):
        raise ValueError(
            f"`self.log('{name}', ...)` received {describe_received(value)}; {type(value).__name__} values cannot be "
            "logged. A number, a tensor with one element or a torchmetrics `Metric` is expected. Log the parts one by "
            "one with `self.log_dict`, or text with `self.logger.experiment`."
        )


def count_elements(value: object) -> int:
    """How many elements a tensor or an array of another library has; 1 for anything else."""
    return math.prod(getattr(value, "shape", ()))


def _is_number(value: object) -> bool:
    if isinstance(value, type) or not (isinstance(value, (int, float)) or hasattr(value, "__float__")):
        return False
    return not hasattr(value, "shape") or value.shape == ()  # an array of one element has a shape


def scalar_tensor(value: Value) -> Tensor:
    """What users read, a tensor without dimensions: integers and short floats in the dtype a reduction would give."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    if value.dtype not in (torch.float32, torch.float64) and not value.is_complex():
        value = value.to(torch.get_default_dtype())
    return value.reshape(()) if value.dim() else value


def reduced_dtype(name: str, value: Tensor) -> torch.dtype:
    """The dtype of a value over the epoch: that of the logged one, at least float32."""
    if not value.is_floating_point():
        warn_once(
            f"`self.log('{name}', ...)` received an integer tensor ({value.dtype}); it is converted to "
            f"{torch.get_default_dtype()} to be reduced. Log `value.float()` to silence this."
        )
        return torch.get_default_dtype()
    return torch.float64 if value.dtype is torch.float64 else torch.float32


def fetch_number(value: Value) -> float:
    """One value as a Python number; waits for its device (sync)."""
    return value.item() if isinstance(value, Tensor) else value


def fetch_numbers(values: Mapping[Name, Value]) -> dict[Name, float]:
    """All values as Python numbers, with one transfer per device and dtype (sync)."""
    groups: dict[tuple[torch.device, torch.dtype], dict[Name, Tensor]] = {}
    numbers: dict[Name, float] = dict.fromkeys(values, 0.0)  # keeps the order of the names
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            groups.setdefault((value.device, value.dtype), {})[name] = value
        else:
            numbers[name] = fetch_number(value)
    for tensors in groups.values():
        fetched = torch.stack([tensor.detach().reshape(()) for tensor in tensors.values()]).tolist()
        numbers.update(zip(tensors, fetched, strict=True))
    return numbers


def copy_to_host(value: Value | None) -> Value | None:
    """A copy on the CPU, as it goes into a file (sync); numbers of other types become floats."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return value if value is None or isinstance(value, (bool, int, float)) else float(value)
