"""How fast is it: FLOPs of a model, samples per second, and the share of what the device could do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fulmen.utilities.rank_zero import rank_zero_warn

# Dense TFLOP/s by a part of the device's name, special names first: 16-bit tensor cores, TF32, plain float32.
# fmt: off
TERAFLOPS = {
    "b200": (2250, 1100, 80), "h200": (989, 495, 67), "h100 nvl": (835, 418, 60), "h100 pcie": (756, 378, 51),
    "h100": (989, 495, 67), "a100": (312, 156, 19.5), "a10g": (70, 35, 35), "a6000": (155, 77, 38.7),
    "l40s": (362, 183, 91.6), "l40": (181, 90.5, 90.5), "l4": (121, 60, 30.3), "v100": (125, 15.7, 15.7),
    "t4": (65, 8.1, 8.1), "rtx 4090": (165, 82.6, 82.6), "rtx 3090": (71, 35.6, 35.6),
}
# fmt: on


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """The peak FLOP/s of a CUDA device in ``dtype``; None, with a warning, for one we have no numbers of."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    kind = str(dtype).removeprefix("torch.")
    column = {"float16": 0, "bfloat16": 0, "float32": 2 if torch.get_float32_matmul_precision() == "highest" else 1}
    for part, peaks in TERAFLOPS.items():
        if part in name and kind in column:
            return int(peaks[column[kind]] * 1e12)
    rank_zero_warn(f"No peak FLOP/s are known for `{name}` with `{kind}`, so its utilization cannot be given.")
    return None


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """Count the floating-point operations of a forward pass, and of the backward pass of its loss.

    Args:
        model: the module that ``forward_fn`` runs. Made under ``with torch.device("meta"):``, like its input, it is
            measured without computing anything.
        forward_fn: makes one forward pass and returns the output.
        loss_fn: makes a scalar loss of the output; without it, there is no backward pass.

    Returns:
        The number of FLOPs.

    Examples:
        >>> with torch.device("meta"):
        ...     layer, x = nn.Linear(32, 2, bias=False), torch.randn(4, 32)
        >>> measure_flops(layer, lambda: layer(x))
        512
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = forward_fn()
        if loss_fn is not None:
            torch.autograd.backward(loss_fn(output))
    return int(counter.get_total_flops())


class Throughput:
    """Rates over the last ``window_size`` updates; the first rates come when the window is full.

    ``available_flops`` is the peak of one device, for the utilization ``device/mfu``. With a ``world_size`` above one,
    the rates of all devices together are added, without the ``device/``.
    """

    def __init__(
        self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/"
    ) -> None:
        if world_size < 1 or window_size < 2:
            raise ValueError(f"{world_size=} must be at least 1, and {window_size=} at least 2 to have a difference.")
        self.available_flops = available_flops
        self.separator = separator
        self.world_size = world_size
        self._updates: deque[dict[str, float]] = deque(maxlen=window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Add the totals since the start (all must grow) and the FLOPs of this update alone, on this device."""
        given = {"time": time, "batches": batches, "samples": samples, "lengths": lengths, "flops": flops}
        new = {name: value for name, value in given.items() if value is not None}
        last = self._updates[-1] if self._updates else {}
        if last and "lengths" in new and "lengths" not in last:
            raise RuntimeError("`lengths` did not come with the update before. Give them in every update or in none.")
        for name in new.keys() & last.keys() - {"flops"}:
            if new[name] <= last[name]:
                raise ValueError(f"Expected `{name}` to increase, last: {last[name]}, current: {new[name]}.")
        for more, fewer in (("samples", "batches"), ("lengths", "samples")):
            if more in new and new[more] < new[fewer]:
                raise ValueError(f"Expected {more} ({new[more]}) to be greater or equal than {fewer} ({new[fewer]}).")
        self._updates.append(new)

    def compute(self) -> dict[str, float]:
        """The last totals and, once the window is full, the rates per second."""
        if not self._updates:
            return {}
        first = self._updates[0]
        last = self._updates[-1]
        metrics = {name: value for name, value in last.items() if name != "flops"}
        if len(self._updates) < (self._updates.maxlen or 0):
            return metrics
        rates = self._rates_per_second(first, last)
        for name, value in rates.items():
            metrics[f"device{self.separator}{name}"] = value
            if self.world_size > 1:
                metrics[name] = value * self.world_size
        if self.available_flops and "flops_per_sec" in rates:
            metrics[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return metrics

    def _rates_per_second(self, first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
        """What grew between the first and the last update, and the FLOPs where all updates have them."""
        elapsed = last["time"] - first["time"]
        rates = {}
        for name, rate in (("batches", "batches"), ("samples", "samples"), ("lengths", "items")):
            if name in first and name in last:
                rates[f"{rate}_per_sec"] = (last[name] - first[name]) / elapsed
        if all("flops" in update for update in self._updates):
            # The first entry was done before the window began.
            rates["flops_per_sec"] = (sum(update["flops"] for update in self._updates) - first["flops"]) / elapsed
        return rates

    def reset(self) -> None:
        """Forget all updates."""
        self._updates.clear()
