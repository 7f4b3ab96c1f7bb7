"""How fast is it: FLOPs of a model, samples per second, and the share of what the device could do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import nn

from fulmen.utilities.rank_zero import rank_zero_warn

# Dense TFLOP/s from the vendors' data sheets, by a part of the device's name (more special names first):
# 16-bit tensor cores, TF32, plain float32.
TERAFLOPS = {
    "b200": (2250, 1100, 80),
    "h200": (989, 495, 67),
    "h100 nvl": (835, 418, 60),
    "h100 pcie": (756, 378, 51),
    "h100": (989, 495, 67),
    "a100": (312, 156, 19.5),
    "a10g": (70, 35, 35),
    "a6000": (155, 77, 38.7),
    "l40s": (362, 183, 91.6),
    "l40": (181, 90.5, 90.5),
    "l4": (121, 60, 30.3),
    "v100": (125, 15.7, 15.7),
    "t4": (65, 8.1, 8.1),
    "rtx 4090": (165, 82.6, 82.6),
    "rtx 3090": (71, 35.6, 35.6),
}


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """The peak FLOP/s of a CUDA device in ``dtype``; None, with a warning, for one we have no numbers of."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    peaks = next((peaks for part, peaks in TERAFLOPS.items() if part in name), None)
    short = str(dtype).removeprefix("torch.")
    if peaks is None or short not in ("float16", "bfloat16", "float32"):
        rank_zero_warn(f"No peak FLOP/s are known for `{name}` with `{short}`, so its utilization cannot be given.")
        return None
    half, tf32, full = peaks
    if short == "float32":
        return int((tf32 if torch.get_float32_matmul_precision() != "highest" else full) * 1e12)
    return int(half * 1e12)


def measure_flops(
    model: nn.Module,
    forward_fn: Callable[[], torch.Tensor],
    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> int:
    """The FLOPs of ``forward_fn()``, and of the backward pass of ``loss_fn(output)`` if there is one.

    Works on the meta device, where nothing is computed::

        with torch.device("meta"):
            model, x = MyModel(), torch.randn(2, 32)
        measure_flops(model, lambda: model(x), lambda y: y.sum())
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        if loss_fn is None:
            forward_fn()
        else:
            loss_fn(forward_fn()).backward()
    return counter.get_total_flops()


class Throughput:
    """Rates over the last ``window_size`` updates; the first rates come when the window is full.

    Args:
        available_flops: peak FLOP/s of one device, for the utilization ``device/mfu``.
        world_size: with more than one device, rates of all devices together are added (without the ``device/``).
    """

    def __init__(
        self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/"
    ) -> None:
        if world_size < 1 or window_size < 2:
            raise ValueError(f"{world_size=} must be at least 1, and {window_size=} at least 2 to have a difference.")
        self.available_flops = available_flops
        self.separator = separator
        self.world_size = world_size
        self._series: dict[str, deque[float]] = {
            name: deque(maxlen=window_size) for name in ("time", "batches", "samples", "lengths", "flops")
        }

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Add the totals since the start (all must grow) and the FLOPs of this update alone, on this device."""
        new = {"time": time, "batches": batches, "samples": samples, "lengths": lengths}
        for name, value in new.items():
            series = self._series[name]
            if value is not None and series and value <= series[-1]:
                raise ValueError(f"Expected the value of `{name}` to increase, last: {series[-1]}, current: {value}")
        num_lengths, num_samples = len(self._series["lengths"]), len(self._series["samples"])
        if lengths is not None and num_lengths != num_samples:
            what = f"`lengths` came with {num_lengths} of the {num_samples} updates before."
            raise RuntimeError(f"{what} Give them in every update or in none.")
        for name, value in {**new, "flops": flops}.items():
            if value is not None:
                self._series[name].append(value)

    def compute(self) -> dict[str, float]:
        """The last totals and, once the window is full, the rates per second."""
        series = self._series
        metrics: dict[str, float] = {name: series[name][-1] for name in series if name != "flops" and series[name]}
        times, separator = series["time"], self.separator
        if len(times) < (times.maxlen or 0):
            return metrics
        elapsed = times[-1] - times[0]
        rates = {}
        for name, rate in (("batches", "batches"), ("samples", "samples"), ("lengths", "items")):
            if len(series[name]) == len(times):
                rates[f"{rate}_per_sec"] = (series[name][-1] - series[name][0]) / elapsed
        if len(series["flops"]) == len(times):
            # The first entry was done before the window began.
            rates["flops_per_sec"] = (sum(series["flops"]) - series["flops"][0]) / elapsed
        for name, value in rates.items():
            metrics[f"device{separator}{name}"] = value
            if self.world_size > 1:
                metrics[name] = value * self.world_size
        if self.available_flops and "flops_per_sec" in rates:
            metrics[f"device{separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return metrics

    def reset(self) -> None:
        """Forget all updates."""
        for series in self._series.values():
            series.clear()
