"""Which devices exist, and how to pick and watch them. Nothing is probed when this file is imported."""

from __future__ import annotations

import contextlib
import functools
import os
import pkgutil
import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fulmen.utilities.errors import InvalidChoiceError, MisconfigurationException, suggest_name
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class Accelerator(ABC):
    """One kind of hardware. Subclass and register it to train on something else than CPU, CUDA or MPS."""

    @abstractmethod
    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one of this process; called before anything is allocated."""

    def setup(self, trainer: Trainer) -> None:
        """Called at the start of every run."""

    @abstractmethod
    def teardown(self) -> None:
        """Called at the end of every run."""

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Numbers worth watching, by name (`DeviceStatsMonitor` logs them)."""
        raise NotImplementedError(f"`{type(self).__name__}` does not tell device statistics.")

    @staticmethod
    @abstractmethod
    def parse_devices(devices: int | str | list[int]) -> Any:
        """What the user wrote as ``devices`` in this hardware's form (a count, indices); None if it means no device."""

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """One device per process of this node, for what ``parse_devices`` returned."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """How many devices ``devices="auto"`` means."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Can this machine run it now?"""

    @staticmethod
    @abstractmethod
    def name() -> str:
        """What users write as ``accelerator``."""

    @classmethod
    def register_accelerators(cls, accelerator_registry: Registry) -> None:
        """Make the name known to ``accelerator="…"``."""
        accelerator_registry.register(cls.name(), cls, description=cls.__name__)


class _BuiltInAccelerator(Accelerator):
    """What those that are described below have in common."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != self.name():
            raise InvalidChoiceError(f"The strategy is on `{device}`, not on one of the {self.name()} devices.")

    def teardown(self) -> None: ...

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Memory, processor and swap in percent of the whole machine; needs `psutil`."""
        psutil = import_optional("psutil", "to watch the load of this machine")
        kind = "M1" if self.name() == "mps" else "cpu"
        found = {
            "": psutil.cpu_percent(),
            "vm_": psutil.virtual_memory().percent,
            "swap_": psutil.swap_memory().percent,
        }
        return {f"{kind}_{what}percent": value for what, value in found.items()}

    @classmethod
    def parse_devices(cls, devices: int | str | list[int]) -> Any:
        """The indices meant by ``devices``: a count, a list, or a string holding either; -1 is all.

        Raises:
            TypeError: it is neither a number nor a list of numbers.
            MisconfigurationException: this machine has no such devices, or one is named twice.
        """
        kind = cls.name().upper()
        available = list(range(cls.auto_device_count() if cls.is_available() else 0))
        devices = _read_devices(devices, kind)
        if not devices:
            return None
        wanted = _list_wanted(devices, available)
        # torchrun on a cluster that shows each process only its own GPU
        only_own = len(wanted) > 1 and len(available) == 1 and "TORCHELASTIC_RUN_ID" in os.environ
        if problem := _find_problem(devices, wanted, available, only_own):
            raise MisconfigurationException(f"For {kind}, `{devices=}` {problem}.")
        return available if only_own else wanted

    @classmethod
    def get_parallel_devices(cls, devices: int | str | list[int]) -> list[torch.device]:
        indices = devices if isinstance(devices, list) else cls.parse_devices(devices) or []
        return [torch.device(cls.name(), index) for index in indices]

    auto_device_count = staticmethod(lambda: 1)


def _read_devices(devices: object, kind: str) -> int | list[int]:
    """A count or a list of indices, from what the user wrote."""
    if isinstance(devices, str):
        return [int(part) for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
    if type(devices) is int:
        return devices
    if isinstance(devices, Sequence) and all(type(index) is int for index in devices):
        return list(devices)
    raise TypeError(
        f"For {kind}, `{devices=}` must be a number of devices or a list of indices. Use `devices=1` or `[0]`."
    )


def _list_wanted(devices: int | list[int], available: list[int]) -> list[int]:
    """The indices meant by a count, where -1 is all, or by a list."""
    if isinstance(devices, list):
        return devices
    return available if devices == -1 else list(range(devices))


def _find_problem(devices: int | list[int], wanted: list[int], available: list[int], only_own: bool) -> str:
    """Why there are no such devices here, or an empty string."""
    missing = sorted(set(wanted) - set(available))
    if isinstance(devices, int) and devices < -1:
        return "must be a number of devices. Use -1 for all of them"
    if not available:
        return "asks for devices, but this machine has none. Use `accelerator='cpu'`"
    if len(set(wanted)) < len(wanted):
        return "names a device twice. Each index may appear once"
    return f"is too much: {missing} do not exist. Choose from {available}" if missing and not only_own else ""


class CPUAccelerator(_BuiltInAccelerator):
    """The host's processor; ``devices`` counts processes."""

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        count = int(devices) if isinstance(devices, str) and devices.strip().isdigit() else devices
        if not isinstance(count, int) or count <= 0:
            raise TypeError(f"`devices={devices!r}`: on the CPU it is a number of processes. Use `devices=1`.")
        return int(count)

    @staticmethod
    def get_parallel_devices(devices: int | str | list[int]) -> list[torch.device]:
        return [torch.device("cpu")] * CPUAccelerator.parse_devices(devices)

    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "cpu")


class CUDAAccelerator(_BuiltInAccelerator):
    """NVIDIA GPUs, and AMD GPUs through ROCm builds of torch."""

    def setup_device(self, device: torch.device) -> None:
        super().setup_device(device)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability(device)[0] >= 8 and torch.get_float32_matmul_precision() == "highest":
            fix = "`torch.set_float32_matmul_precision('high')` (or 'medium') trades precision for speed"
            rank_zero_info(f"{torch.cuda.get_device_name(device)!r} has Tensor Cores: {fix}.")

    def setup(self, trainer: Trainer) -> None:
        self.set_nvidia_flags(trainer.local_rank)
        self.teardown()

    @staticmethod
    def set_nvidia_flags(local_rank: int) -> None:
        """Numbers the GPUs as `nvidia-smi` does, and says which ones this process sees."""
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        rank_zero_info(f"LOCAL_RANK: {local_rank} - CUDA_VISIBLE_DEVICES: [{visible}]")

    def teardown(self) -> None:
        torch.cuda.empty_cache()

    # The counters of torch's caching allocator.
    get_device_stats = staticmethod(lambda device: torch.cuda.memory_stats(device))
    # Counted, not `torch.cuda.is_available`: that may initialise CUDA, and then the process can no longer be forked.
    auto_device_count = staticmethod(lambda: torch.cuda.device_count())
    is_available = staticmethod(lambda: torch.cuda.device_count() > 0)
    name = staticmethod(lambda: "cuda")


class MPSAccelerator(_BuiltInAccelerator):
    """The GPU of Apple silicon. ``DISABLE_MPS=1`` hides it."""

    name = staticmethod(lambda: "mps")

    @staticmethod
    def is_available() -> bool:
        hidden = os.environ.get("DISABLE_MPS", "0") == "1"
        return not hidden and platform.processor() in ("arm", "arm64") and torch.backends.mps.is_available()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Indices of GPUs that accept work (others are broken, or taken in exclusive mode); -1 returns all.

    Every GPU that is tried gets a CUDA context, so call this in the process that will train.
    """
    usable: list[int] = []
    visible = torch.cuda.device_count()
    if num_devices > visible or (num_devices and not visible):
        raise ValueError(f"`{num_devices=}` were asked for, but {visible} CUDA devices are visible here.")
    for index in range(visible):
        with contextlib.suppress(RuntimeError):
            if len(usable) != num_devices:
                torch.zeros(1, device=torch.device("cuda", index))
                usable.append(index)
    if len(usable) < num_devices:
        raise RuntimeError(f"`{num_devices=}` were asked for, but only {usable} of {visible} CUDA devices accept work.")
    return usable


class Registry(dict[str, dict[str, Any]]):
    """Names users may write (as ``accelerator``, ``strategy``), each with a class and the arguments it is made with.

    >>> registry = Registry("accelerator", taken=ValueError)
    >>> accelerator = registry.register("host", CPUAccelerator, description="the processor")
    >>> registry.available()
    ['host']
    """

    def __init__(self, kind: str, taken: type[Exception]) -> None:
        self.kind = kind
        self.taken = taken

    def register(self, name: str, cls: Any = None, description: str = "", override: bool = False, **init: Any) -> Any:
        """Add a class, or its path "module:Class" to import it when chosen; without one, a decorator that adds it."""
        if not isinstance(name, str):
            raise TypeError(f"The name of an entry of the {self.kind} registry must be a string, not {name!r}.")
        if name in self and not override:
            raise self.taken(f"The {self.kind} {name!r} is registered already. Pass `override=True` to replace it.")
        cls = init.pop(self.kind, cls)  # as the keyword `accelerator` or `strategy`
        if cls is None:
            return functools.partial(self.register, name, description=description, override=override, **init)
        self[name] = {self.kind: cls, f"{self.kind}_name": name, "description": description, "init_params": init}
        return cls

    def get(self, name: str, default: Any = None) -> Any:
        """A new object of that name; unknown names give ``default``, or a `KeyError` if there is none."""
        if name in self:
            cls = self[name][self.kind]
            return (pkgutil.resolve_name(cls) if isinstance(cls, str) else cls)(**self[name]["init_params"])
        if default is None:
            raise KeyError(f"No {self.kind} {name!r} among {', '.join(sorted(self))}.{suggest_name(name, self)}")
        return default

    remove = dict.__delitem__

    def available(self) -> list[str]:
        """All registered names, whether this machine can run them or not."""
        return list(self)

    available_accelerators = available_strategies = available


AcceleratorRegistry = Registry("accelerator", taken=MisconfigurationException)
for _class in (CPUAccelerator, CUDAAccelerator, MPSAccelerator):
    _class.register_accelerators(AcceleratorRegistry)
