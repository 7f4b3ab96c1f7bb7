import pytest
import torch

from fulmen.accelerators import (
    Accelerator,
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)
from fulmen.engine.accelerators import Registry
from fulmen.utilities.errors import MisconfigurationException


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch report a number of CUDA devices that need not exist."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_importing_asks_no_hardware(run_python):
    code = """
import torch
def asked(*args): raise AssertionError("hardware was probed")
torch.cuda.device_count = torch.cuda.is_available = torch.backends.mps.is_available = asked
import fulmen.engine.resolve, fulmen.accelerators, fulmen.plugins, fulmen.strategies
fulmen.accelerators.CUDAAccelerator
"""
    assert run_python(code) == 0


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (3, 3), ("2", 2), (" 1 ", 1), (True, 1)])
def test_cpu_devices_are_a_number_of_processes(devices, count):
    assert CPUAccelerator.parse_devices(devices) == count
    assert CPUAccelerator.get_parallel_devices(devices) == [torch.device("cpu")] * count


@pytest.mark.parametrize("devices", [0, -1, "0", "-1", "0,1", [0], [], None, 1.5, "abc", (0,)])
def test_anything_else_on_the_cpu_is_a_type_error(devices):
    with pytest.raises(TypeError, match=r"devices=.*number of processes"):
        CPUAccelerator.parse_devices(devices)


@pytest.mark.parametrize(
    ("devices", "indices"),
    [(1, [0]), (2, [0, 1]), ("2", [0, 1]), (-1, [0, 1, 2, 3]), ("-1", [0, 1, 2, 3]), ([3, 1], [3, 1]), ((2,), [2])],
)
def test_cuda_devices_are_a_count_or_indices(gpus, devices, indices):
    gpus(4)
    assert CUDAAccelerator.parse_devices(devices) == indices
    assert CUDAAccelerator.get_parallel_devices(indices) == [torch.device("cuda", i) for i in indices]


@pytest.mark.parametrize(("devices", "indices"), [("0,2", [0, 2]), ("1,", [1]), (" 3 , 0 ", [3, 0])])
def test_a_string_with_a_comma_lists_indices(gpus, devices, indices):
    gpus(4)
    assert CUDAAccelerator.parse_devices(devices) == indices


@pytest.mark.parametrize("devices", [0, "0", []])
def test_no_cuda_device_is_none(gpus, devices):
    gpus(4)
    assert CUDAAccelerator.parse_devices(devices) is None


@pytest.mark.parametrize("devices", [None, 1.5, True, ["0"], [0.0], {0}])
def test_wrong_types_of_cuda_devices(gpus, devices):
    gpus(4)
    with pytest.raises(TypeError, match="CUDA"):
        CUDAAccelerator.parse_devices(devices)


@pytest.mark.parametrize(
    ("devices", "words"),
    [([0, 0], "twice"), ([0, 7], r"\[7\] do not exist"), (5, r"\[4\] do not exist"), (-2, "-1 for all")],
)
def test_cuda_devices_that_cannot_be_had(gpus, devices, words):
    gpus(4)
    with pytest.raises(MisconfigurationException, match=words):
        CUDAAccelerator.parse_devices(devices)


@pytest.mark.parametrize("kind", [CUDAAccelerator, MPSAccelerator])
def test_asking_for_gpus_where_there_are_none(gpus, monkeypatch, kind):
    gpus(0)
    monkeypatch.setenv("DISABLE_MPS", "1")
    assert not kind.is_available()
    with pytest.raises(MisconfigurationException, match="this machine has none"):
        kind.parse_devices(1)


def test_torchrun_may_show_each_process_only_its_own_gpu(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert CUDAAccelerator.parse_devices(2) == [0]


def test_cpu_statistics_are_percentages():
    pytest.importorskip("psutil")
    stats = CPUAccelerator().get_device_stats(torch.device("cpu"))
    assert set(stats) == {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent"}
    assert all(0 <= value <= 100 for value in stats.values())


@pytest.mark.parametrize("kind", [CUDAAccelerator, MPSAccelerator])
def test_an_accelerator_refuses_devices_of_another_type(kind):
    with pytest.raises(MisconfigurationException, match="`cpu`"):
        kind().setup_device(torch.device("cpu"))
    with pytest.raises(MisconfigurationException, match="cpu devices"):
        CPUAccelerator().setup_device(torch.device(kind.name()))


def test_usable_cuda_devices_cannot_be_more_than_the_visible_ones(gpus):
    gpus(0)
    assert find_usable_cuda_devices(0) == []
    for count in (-1, 1):
        with pytest.raises(ValueError, match="0 CUDA devices"):
            find_usable_cuda_devices(count)


def test_busy_cuda_devices_are_passed_over(gpus, monkeypatch):
    def zeros(*size, device):
        if device.index in (0, 2):
            raise RuntimeError("busy")

    gpus(4)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert find_usable_cuda_devices() == [1, 3]
    assert find_usable_cuda_devices(1) == [1]
    with pytest.raises(RuntimeError, match=r"only \[1, 3\] of 4"):
        find_usable_cuda_devices(3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
def test_a_real_gpu_is_set_up_and_watched():
    accelerator = CUDAAccelerator()
    devices = accelerator.get_parallel_devices(accelerator.parse_devices(find_usable_cuda_devices(1)))
    accelerator.setup_device(devices[0])
    torch.ones(1, device="cuda")
    assert torch.cuda.current_device() == devices[0].index
    assert accelerator.get_device_stats(devices[0])["allocated_bytes.all.current"] > 0
    accelerator.teardown()


def test_names_of_the_registry():
    assert {"cpu", "cuda", "mps"} <= set(AcceleratorRegistry.available_accelerators())
    assert isinstance(AcceleratorRegistry.get("cpu"), CPUAccelerator)
    with pytest.raises(KeyError, match=r"Did you mean `cuda`"):
        AcceleratorRegistry.get("cudaa")
    assert AcceleratorRegistry.get("nobody", 5) == 5


def test_a_registry_takes_classes_decorated_functions_and_paths():
    registry = Registry("accelerator", taken=MisconfigurationException)
    CPUAccelerator.register_accelerators(registry)
    registry.register("made", description="one more", size=3)(dict)
    registry.register("by-keyword", accelerator=CPUAccelerator)
    registry.register("by-path", "collections:OrderedDict", a=1)
    assert registry.get("made") == {"size": 3}
    assert registry["made"]["description"] == "one more"
    assert isinstance(registry.get("by-keyword"), CPUAccelerator)
    assert type(registry.get("by-path")).__name__ == "OrderedDict"
    registry.remove("made")
    assert registry.available() == ["cpu", "by-keyword", "by-path"]


def test_a_registry_guards_its_names():
    registry = Registry("strategy", taken=ValueError)
    registry.register("one", dict)
    with pytest.raises(ValueError, match="override=True"):
        registry.register("one", list)
    registry.register("one", list, override=True)
    assert registry.get("one") == []
    with pytest.raises(TypeError, match="must be a string"):
        registry.register(5, dict)


def test_an_accelerator_must_define_the_whole_interface():
    class Half(Accelerator):
        name = staticmethod(lambda: "half")

    with pytest.raises(TypeError, match="abstract"):
        Half()
