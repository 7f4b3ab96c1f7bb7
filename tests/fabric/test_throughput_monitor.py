"""`ThroughputMonitor`: rates that a loop logs through Fabric."""

from __future__ import annotations

import pytest
import torch

from fulmen.fabric.plugins import HalfPrecision, MixedPrecision, Precision
from fulmen.fabric.strategies import SingleDeviceStrategy
from fulmen.fabric.utilities import Throughput, ThroughputMonitor, measure_flops
from fulmen.fabric.utilities.throughput import compute_dtype, get_available_flops
from fulmen.utilities.rank_zero import rank_zero_only


class Loop:
    """What the monitor asks of a Fabric."""

    device = torch.device("cpu")
    world_size = 2

    def __init__(self):
        self.strategy = SingleDeviceStrategy(precision=Precision())
        self.logged = []

    def log_dict(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))


def test_metrics_are_logged_with_steps():
    loop = Loop()
    monitor = ThroughputMonitor(loop, window_size=2, separator="|")
    assert isinstance(monitor, Throughput) and monitor.step == -1
    assert (monitor.available_flops, monitor.world_size) == (None, 2)
    monitor.update(time=1.0, batches=1, samples=4)
    assert monitor.compute_and_log() == {"time": 1.0, "batches": 1, "samples": 4}
    monitor.update(time=3.0, batches=2, samples=8)
    monitor.compute_and_log(step=9)
    (first, _), (second, metrics) = loop.logged
    assert (first, second, monitor.step) == (0, 9, 9)
    assert metrics["device|samples_per_sec"] == 2.0 and metrics["samples_per_sec"] == 4.0
    assert metrics["device|batches_per_sec"] == 0.5
    with pytest.raises(ValueError, match="Expected `time` to increase"):
        monitor.update(time=3.0, batches=3, samples=12)


def test_other_processes_count_nothing(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loop = Loop()
    monitor = ThroughputMonitor(loop, window_size=2)
    monitor.update(time=1.0, batches=1, samples=1)
    assert monitor.compute() == {} and monitor.compute_and_log() == {} and loop.logged == []


def test_the_dtype_of_operations_is_known():
    dtypes = [compute_dtype(p) for p in (Precision(), MixedPrecision("bf16-mixed", "cpu"), HalfPrecision())]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
    layer = torch.nn.Linear(8, 4, bias=False)
    assert measure_flops(layer, lambda: layer(torch.ones(2, 8))) == 128
