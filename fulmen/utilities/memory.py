"""Running out of memory, and letting go of it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """The same nested dictionaries with all tensors detached, and moved to the CPU if ``to_cpu``.

    Examples:
        >>> loss = torch.ones(1, requires_grad=True)
        >>> recursive_detach({"losses": {"a": loss}})
        {'losses': {'a': tensor([1.])}}
    """
    if isinstance(in_dict, Mapping):
        return {key: recursive_detach(value, to_cpu) for key, value in in_dict.items()}
    if isinstance(in_dict, Tensor):
        return in_dict.detach().cpu() if to_cpu else in_dict.detach()
    return in_dict


def is_oom_error(exception: BaseException) -> bool:
    """Was there not enough memory, on a GPU or on the host?

    Examples:
        >>> is_oom_error(RuntimeError("CUDA error: out of memory"))
        True
    """
    return is_cuda_out_of_memory(exception) or is_cudnn_snafu(exception) or is_out_of_cpu_memory(exception)


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Did CUDA's allocator find no memory?"""
    return _has_message(exception, "CUDA", "out of memory")


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Did cuDNN refuse a shape, which it also does when memory for its workspace is missing?"""
    return _has_message(exception, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.")


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Did the allocator of the host find no memory?"""
    return _has_message(exception, "DefaultCPUAllocator: can't allocate memory")


def garbage_collection_cuda() -> None:
    """Frees objects that nobody uses any more, and gives cached GPU memory back."""
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if not is_oom_error(error):
            raise


def _has_message(exception: BaseException, *parts: str) -> bool:
    text = str(exception.args[0]) if len(exception.args) == 1 else ""
    return isinstance(exception, RuntimeError) and all(part in text for part in parts)
