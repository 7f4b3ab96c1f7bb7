import pytest
import torch
from torch import nn

from fulmen.utilities.throughput import Throughput, get_available_flops, measure_flops


def test_flops_are_counted_on_the_meta_device():
    with torch.device("meta"):
        model, x = nn.Linear(32, 2), torch.randn(4, 32)
    assert measure_flops(model, lambda: model(x)) == 512
    assert measure_flops(model, lambda: model(x), torch.sum) == 1024


def test_rates_come_when_the_window_is_full():
    throughput = Throughput(available_flops=1e3, window_size=3)
    for i in range(1, 5):
        throughput.update(time=2.0 * i, batches=i, samples=4 * i, lengths=40 * i, flops=10)
        if i < 3:
            totals = {"time": 2.0 * i, "batches": i, "samples": 4 * i, "lengths": 40 * i}
            assert throughput.compute() == totals
    assert throughput.compute() == {
        "time": 8.0,
        "batches": 4,
        "samples": 16,
        "lengths": 160,
        "device/batches_per_sec": 0.5,
        "device/samples_per_sec": 2.0,
        "device/items_per_sec": 20.0,
        "device/flops_per_sec": 5.0,
        "device/mfu": 0.005,
    }
    throughput.reset()
    assert throughput.compute() == {}


def test_several_devices_add_up():
    throughput = Throughput(world_size=2, window_size=2, separator="-")
    throughput.update(time=1, batches=1, samples=2)
    throughput.update(time=2, batches=2, samples=4)
    metrics = throughput.compute()
    assert metrics["device-samples_per_sec"] == 2 and metrics["samples_per_sec"] == 4


def test_totals_must_grow_and_a_refused_update_changes_nothing():
    throughput = Throughput()
    throughput.update(time=1, batches=1, samples=1)
    before = throughput.compute()
    for wrong in ({"time": 1}, {"batches": 1}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            throughput.update(**{"time": 2, "batches": 2, "samples": 2, **wrong})
    with pytest.raises(RuntimeError, match="lengths"):
        throughput.update(time=2, batches=2, samples=2, lengths=1)
    assert throughput.compute() == before


def test_only_cuda_devices_have_known_peaks():
    assert get_available_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("given", [{"batches": 3, "samples": 2}, {"batches": 1, "samples": 5, "lengths": 3}])
def test_totals_that_cannot_be(given):
    with pytest.raises(ValueError, match="to be greater or equal than"):
        Throughput().update(time=1.0, **given)
