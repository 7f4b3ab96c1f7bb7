"""Looking into modules and the machine: gradient norms, train and eval flags, compiled modules, pickling, CPUs."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The norm of each parameter's gradient and of all of them together; empty without gradients.

    Keys are ``grad_2.0_norm/<parameter>`` and ``grad_2.0_norm_total``. ``norm_type`` may be "inf".
    """
    order = float(norm_type)
    if order <= 0:
        raise ValueError(f"`norm_type={norm_type}` is no norm. Use a positive number or 'inf' (the largest element).")
    key = f"grad_{order}_norm"
    gradients = ((name, parameter.grad) for name, parameter in module.named_parameters())
    norms = {f"{key}{group_separator}{name}": g.detach().norm(order) for name, g in gradients if g is not None}
    if norms:
        device = next(iter(norms.values())).device
        norms[f"{key}_total"] = torch.stack([norm.to(device) for norm in norms.values()]).norm(order)
    return norms


def capture_modes(module: nn.Module) -> Callable[[], None]:
    """Remember train or eval of every sub-module; the returned function puts it back."""
    modes = [(part, part.training) for part in module.modules()]

    def restore() -> None:
        for part, training in modes:
            part.training = training

    return restore


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many loader workers each of the processes of this machine may start so that every CPU has one task."""
    if local_world_size < 1:
        raise ValueError(f"`local_world_size={local_world_size}` is not a number of processes. It starts at 1.")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size - 1)


def is_picklable(obj: object) -> bool:
    """Can it be pickled?"""
    try:
        pickle.dumps(obj)
    except Exception:  # objects raise whatever they like while being pickled
        return False
    return True


def is_compiled(model: Any) -> bool:
    """Is it what `torch.compile` makes of a module? Asking does not import the compiler."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(model, compiler.OptimizedModule)


def from_compiled(model: Any) -> nn.Module:
    """The module inside `torch.compile(module)`, with its forward and step methods compiled the same way."""
    module: Any = model._orig_mod if is_compiled(model) else None
    if not hasattr(module, "training_step"):
        raise ValueError(f"Expected `torch.compile(module)` of a `LightningModule`, not a `{type(model).__name__}`.")
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        setattr(module, name, model.dynamo_ctx(getattr(module, name)))
    module._compiler_ctx = {"compiler": "dynamo", "dynamo_ctx": model.dynamo_ctx}
    return module
