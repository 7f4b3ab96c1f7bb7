"""What torch finds on this machine: versions, devices, and what processes can talk through."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist

Value = str | int | bool | None
OLDEST_TORCH = (2, 6)


def describe_torch() -> dict[str, Value]:
    """Versions of torch and of what it was built with; None for what this build does not have."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() and dist.is_nccl_available() else None
    return {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "cuDNN": cudnn,
        "NCCL": None if nccl is None else ".".join(map(str, nccl)),
    }


def describe_devices() -> dict[str, Value]:
    """The processors and accelerators that can be trained on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices: dict[str, Value] = {"cpu": f"{usable} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        devices[f"cuda:{index}"] = f"{about.name}, {memory}, compute capability {about.major}.{about.minor}"
    if torch.backends.mps.is_available():
        devices["mps"] = "the GPU of this Mac"
    return devices


def describe_backends() -> dict[str, Value]:
    """Which backends of `torch.distributed` this build has."""
    if not dist.is_available():
        return {"torch.distributed": False}
    found: dict[str, Value] = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return {**found, "mpi": dist.is_mpi_available(), "ucc": dist.is_ucc_available()}


def find_torch_problems() -> list[str]:
    """What keeps torch from training here, each with a fix."""
    problems = []
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        problems.append(f'torch {torch.__version__} is too old. Run `pip install "torch>={oldest}"`.')
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if torch.version.cuda and os.path.exists("/dev/nvidiactl") and not torch.cuda.is_available() and not hidden:
        what = f"torch was built for CUDA {torch.version.cuda} and there is an NVIDIA driver, but torch cannot use it."
        problems.append(
            f"{what} Run `nvidia-smi`: the driver may be too old, or `CUDA_VISIBLE_DEVICES` names no device."
        )
    return [*problems, *_find_gloo_problems()]


def _find_gloo_problems() -> list[str]:
    """Opens a group of one process: gloo has to find the address of this host."""
    if not dist.is_available() or not dist.is_gloo_available() or dist.is_initialized():
        return []
    try:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            dist.destroy_process_group()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        fix = "Name a network interface in `GLOO_SOCKET_IFNAME`, such as `lo` for one machine."
        return [f"Processes cannot meet over gloo: {reason} {fix}"]
    return []
