"""Which packages and versions there are, as flags under the names that public code imports: `_TORCH_GREATER_EQUAL_2_4`."""

from __future__ import annotations

import importlib.metadata
import operator
import re
import sys

import torch

from fulmen.utilities.console import is_interactive
from fulmen.utilities.optional import is_installed

# The package, and the version that is needed, behind each flag.
PACKAGES: dict[str, tuple[str, str]] = {
    "_BITSANDBYTES_AVAILABLE": ("bitsandbytes", ">=0.42.0"), "_CLICK_AVAILABLE": ("click", ""),
    "_COMET_AVAILABLE": ("comet_ml", ">=3.44.4"), "_DEEPSPEED_AVAILABLE": ("deepspeed", ""),
    "_FAIRSCALE_AVAILABLE": ("fairscale", ""), "_HIVEMIND_AVAILABLE": ("hivemind", ""),
    "_HOROVOD_AVAILABLE": ("horovod", ""), "_HYDRA_AVAILABLE": ("hydra", ""),
    "_JSONARGPARSE_AVAILABLE": ("jsonargparse", ""), "_JSONARGPARSE_SIGNATURES_AVAILABLE": ("jsonargparse", ">=4.39.0"),
    "_LIGHTNING_SDK_AVAILABLE": ("lightning_sdk", ""), "_LITLOGGER_AVAILABLE": ("litlogger", ""),
    "_MATPLOTLIB_AVAILABLE": ("matplotlib", ""), "_MLFLOW_AVAILABLE": ("mlflow", ">=1.0.0"),
    "_MLFLOW_SYNCHRONOUS_AVAILABLE": ("mlflow", ">=2.8.0"), "_MPI4PY_AVAILABLE": ("mpi4py", ""),
    "_NUMPY_AVAILABLE": ("numpy", ""), "_OMEGACONF_AVAILABLE": ("omegaconf", ""),
    "_ONNXSCRIPT_AVAILABLE": ("onnxscript", ">=0.1.0"), "_ONNX_AVAILABLE": ("onnx", ""),
    "_PSUTIL_AVAILABLE": ("psutil", ""), "_REQUESTS_AVAILABLE": ("requests", ""), "_RICH_AVAILABLE": ("rich", ">=10.2.2"),
    "_SKLEARN_AVAILABLE": ("sklearn", ""), "_TENSORBOARDX_AVAILABLE": ("tensorboardX", ""),
    "_TENSORBOARD_AVAILABLE": ("tensorboard", ""), "_TORCHTEXT_AVAILABLE": ("torchtext", ""),
    "_TORCHVISION_AVAILABLE": ("torchvision", ""), "_TORCH_TRT_AVAILABLE": ("torch_tensorrt", ""),
    "_TRANSFORMER_ENGINE_AVAILABLE": ("transformer_engine", ""), "_TRANSFORMERS_AVAILABLE": ("transformers", ""),
    "_WANDB_AVAILABLE": ("wandb", ">=0.12.10"),
}  # fmt: skip

# Devices that fulmen has no code for, so that none of them is ever there.
DEVICES = ("_COLOSSALAI", "_HPU", "_IPU", "_LIGHTNING_COLOSSALAI", "_LIGHTNING_HABANA", "_POPTORCH", "_TPU", "_XLA")

# Versions that public code asks about; any other of these packages is answered, too.
VERSIONS = (
    "_DEEPSPEED_GREATER_EQUAL_0_16", "_PYTHON_GREATER_EQUAL_3_8_0", "_PYTHON_GREATER_EQUAL_3_10_0",
    "_PYTHON_GREATER_EQUAL_3_11_0", "_TORCHMETRICS_GREATER_EQUAL_0_8_0", "_TORCHMETRICS_GREATER_EQUAL_0_9_1",
    "_TORCHMETRICS_GREATER_EQUAL_0_11", "_TORCHMETRICS_GREATER_EQUAL_1_0_0", "_TORCH_EQUAL_2_4_0", "_TORCH_EQUAL_2_8",
    "_TORCH_EQUAL_2_9", "_TORCH_GREATER_EQUAL_1_11", "_TORCH_GREATER_EQUAL_1_12", "_TORCH_GREATER_EQUAL_1_13",
    "_TORCH_GREATER_EQUAL_2_0", "_TORCH_GREATER_EQUAL_2_1", "_TORCH_GREATER_EQUAL_2_2", "_TORCH_GREATER_EQUAL_2_3",
    "_TORCH_GREATER_EQUAL_2_4", "_TORCH_GREATER_EQUAL_2_4_1", "_TORCH_GREATER_EQUAL_2_5", "_TORCH_GREATER_EQUAL_2_6",
    "_TORCH_GREATER_EQUAL_2_8", "_TORCH_LESS_EQUAL_2_6", "_XLA_GREATER_EQUAL_2_1", "_XLA_GREATER_EQUAL_2_5",
)  # fmt: skip
_VERSION = re.compile(
    r"_(?P<package>DEEPSPEED|PYTHON|TORCHMETRICS|TORCHVISION|TORCH|XLA)"
    r"_(?P<relation>GREATER_EQUAL|GREATER|LESS_EQUAL|LESS|EQUAL)_(?P<version>\d+(_\d+)*)"
)
_RELATIONS = {
    "GREATER_EQUAL": operator.ge, "GREATER": operator.gt, "LESS_EQUAL": operator.le, "LESS": operator.lt,
    "EQUAL": operator.eq,
}  # fmt: skip
NAMES = (
    "_IS_INTERACTIVE",
    "_IS_WINDOWS",
    "_KINETO_AVAILABLE",
    *PACKAGES,
    *VERSIONS,
    *(f"{d}_AVAILABLE" for d in DEVICES),
)


def __getattr__(name: str) -> bool:
    if name in PACKAGES:
        return is_installed(*PACKAGES[name])
    if name == "_IS_WINDOWS":
        return sys.platform == "win32"
    if name == "_IS_INTERACTIVE":
        return is_interactive()
    if name == "_KINETO_AVAILABLE":
        return torch.profiler.kineto_available()
    if name.endswith("_AVAILABLE") and name.removesuffix("_AVAILABLE") in DEVICES:
        return False
    asked = _VERSION.fullmatch(name)
    if asked is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return compare_release(asked["package"].lower(), asked["relation"], asked["version"])


def __dir__() -> list[str]:
    return sorted(NAMES)


def compare_release(package: str, relation: str, version: str) -> bool:
    """Is the version of a package in that relation ("GREATER_EQUAL", ...) to another, written "2_4_1"?

    "2_4" as an equal means any 2.4.

    >>> compare_release("torch", "GREATER_EQUAL", "1_11")
    True
    """
    wanted = tuple(map(int, version.split("_")))
    found = _installed_release(package)
    if found is None:
        return False
    if relation == "EQUAL":
        found = found[: len(wanted)]
    size = max(len(wanted), len(found))
    return bool(_RELATIONS[relation](_pad_with_zeros(found, size), _pad_with_zeros(wanted, size)))


def _installed_release(package: str) -> tuple[int, ...] | None:
    """The numbers of an installed version; None for a package that is not there."""
    if package == "python":
        return tuple(sys.version_info[:3])
    try:
        version = torch.__version__ if package == "torch" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def _pad_with_zeros(release: tuple[int, ...], size: int) -> tuple[int, ...]:
    return release + (0,) * (size - len(release))
