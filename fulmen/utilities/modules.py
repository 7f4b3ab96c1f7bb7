"""Looking into modules and the machine: gradient norms, train and eval flags, compiled modules, pickling, CPUs."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.distributed.tensor import DTensor
    from torch.optim import Optimizer


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """The norm of each parameter's gradient, and of all of them together.

    Args:
        module: after a backward pass; parameters without a gradient are left out.
        norm_type: the order p of the norm, or "inf" for the largest absolute value.
        group_separator: stands between the kind of norm and the name of the parameter.

    Returns:
        Scalar tensors by name, ``grad_2.0_norm/<parameter>`` and ``grad_2.0_norm_total``; empty without gradients.

    Raises:
        ValueError: if ``norm_type`` is not positive.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([3.0, 4.0])).backward()
        >>> grad_norm(layer, 2)
        {'grad_2.0_norm/weight': tensor(5.), 'grad_2.0_norm_total': tensor(5.)}
    """
    order = float(norm_type)
    if order <= 0:
        raise ValueError(
            f"`norm_type={norm_type}` is not the order of a norm. Use a positive number or 'inf' (the largest element)."
        )
    key = f"grad_{order}_norm"
    gradients = ((name, parameter.grad) for name, parameter in module.named_parameters())
    norms = {
        f"{key}{group_separator}{name}": _gradient_norm(g.detach(), order) for name, g in gradients if g is not None
    }
    if norms:
        device = next(iter(norms.values())).device
        norms[f"{key}_total"] = torch.stack([norm.to(device) for norm in norms.values()]).norm(order)
    return norms


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Is it a `DTensor`, a tensor that is spread over processes? Asking does not import its module."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "to_local")


def _gradient_norm(gradient: Tensor, order: float) -> Tensor:
    norm: Tensor = gradient.norm(order)
    return full_tensor(norm)  # every process asks


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over several processes (`DTensor`); a collective. Others come back as they are."""
    if not is_dtensor(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all elements together, at least in float32; a tensor on the first one's device, 0 without any."""
    if not gradients:
        return torch.zeros(())
    first = gradients[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    if all(g.device == first.device and g.dtype == first.dtype for g in gradients):
        norms = list(torch._foreach_norm(gradients, 2, dtype))
    else:
        widest = (
            torch.float64 if any(g.dtype in (torch.float64, torch.complex128) for g in gradients) else torch.float32
        )
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, widest)).to(first.device) for g in gradients
        ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is spread over several (`DTensor`); others come back as they are."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def spread_like(part: Tensor, like: object) -> Tensor:
    """The tensor of which each process gives its part, spread like another one; its numbers may be of another type."""
    if not is_dtensor(like):
        return part
    with torch.no_grad():
        spread = torch.empty_like(like.detach(), dtype=part.dtype)
        local_part(spread).copy_(part)
    return spread


def scale_gradients(parameters: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiplies all gradients by a number, or by a tensor with one, in place."""
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    if len({(gradient.device, gradient.layout) for gradient in gradients}) == 1 and not gradients[0].is_sparse:
        torch._foreach_mul_(gradients, factor)
        return
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device) if isinstance(factor, Tensor) else factor)


def _read_mode(self: nn.Module) -> bool:
    inner = self._modules.get("module")
    return True if inner is None else inner.training


# `training` of a module around another, ``self.module``: it has that one's mode, and none of its own to set.
mode_of_module: Any = property(_read_mode, lambda self, mode: None)


def capture_modes(module: nn.Module) -> Callable[[], None]:
    """Remember train or eval of every sub-module; the returned function puts it back."""
    modes = [(part, part.training) for part in module.modules()]

    def restore_modes() -> None:
        for part, training in modes:
            part.training = training

    return restore_modes


def capture_buffers(module: nn.Module) -> Callable[[], None]:
    """Remember the values of all buffers, by copies where they are; the returned function puts them back."""
    slots = [(part._buffers, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    kept = [(owner, name, buffer, buffer.detach().clone()) for owner, name, buffer in slots if buffer is not None]

    @torch.no_grad()
    def restore_buffers() -> None:
        for owner, name, buffer, value in kept:
            owner[name] = buffer.copy_(value)

    return restore_buffers


def modules_in_eval(module: nn.Module) -> list[str]:
    """The names of the sub-modules in eval mode; the module's own is empty."""
    return [name for name, part in module.named_modules() if not part.training]


def module_flags(module: nn.Module) -> dict[str, Any]:
    """What can be switched on a module beside weights and buffers, by path: "a.b.training", "a.b.weight.requires_grad".

    Of the layers of torch, and of what others list in `__constants__`, also the numbers: `p`, `momentum`, `eps`,
    `track_running_stats`. Further attributes of classes that are not torch's belong to who wrote them.
    """
    flags: dict[str, Any] = {}
    for path, part in module.named_modules():
        of_torch = type(part).__module__.startswith("torch.")
        settings = vars(part)
        listed = settings if of_torch else part.__constants__ if hasattr(part, "__constants__") else ()
        names = [name for name in listed if name in settings]
        for name in ("training", *names):
            value = part.training if name == "training" else settings[name]
            if not name.startswith("_") and type(value) in (bool, int, float, type(None)):
                flags[f"{path}.{name}" if path else name] = value
    return flags | {f"{path}.requires_grad": parameter.requires_grad for path, parameter in module.named_parameters()}


def set_module_flags(module: nn.Module, flags: dict[str, Any]) -> None:
    """Puts back what `module_flags` gave, where the module has such a part."""
    owners: dict[str, Any] = {**dict(module.named_modules()), **dict(module.named_parameters())}
    for key, value in flags.items():
        path, _, name = key.rpartition(".")
        if hasattr(owners.get(path), name):
            setattr(owners[path], name, value)


def parameter_names(module: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    """The names of parameters in a module, in the order given; "#<index>" for those it does not have.

    >>> layer = torch.nn.Linear(1, 1)
    >>> parameter_names(layer, [layer.bias, layer.weight])
    ['bias', 'weight']
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names.get(id(parameter), f"#{i}") for i, parameter in enumerate(parameters)]


def group_names(module: nn.Module, optimizer: Optimizer) -> list[list[str]] | None:
    """The names of the parameters in each group of an optimizer; None if it has some that are not the module's."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    return None if any("" in group for group in groups) else groups


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many loader workers each process of this machine may start so that every CPU has one task.

    Args:
        local_world_size: the number of training processes on this machine.

    Returns:
        At least 1.

    Raises:
        ValueError: if ``local_world_size`` is below 1.
    """
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


def picklable_attributes(obj: object, beside: tuple[object, ...]) -> dict[str, Any]:
    """The attributes of an object that can be pickled and lead to none of the objects `beside` it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: object) -> None:
            if any(part is other for other in beside):
                raise pickle.PicklingError("stays where it is")

    found = {}
    for name, value in vars(obj).items():
        with contextlib.suppress(Exception):
            Pickler(io.BytesIO()).dump(value)
            found[name] = value
    return found


def is_compiled(model: object) -> TypeGuard[OptimizedModule]:
    """Is it what `torch.compile` makes of a module? Asking does not import the compiler."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(model, compiler.OptimizedModule)


def unwrap_compiled(module: object) -> Any:
    """The module inside of `torch.compile(module)`; others as they are."""
    return module._orig_mod if is_compiled(module) else module


def call_as_forward(module: nn.Module, call: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, called through the forward pass of a module: where wrappers and their hooks take part.

    For one call `module.forward` is the step. One entry of a dictionary changes.

    Arguments:
        module: the innermost one, without wrappers.
        call: calls the module, through wrappers.
        step: is called with the arguments that reach the module.
    """
    own = vars(module)
    user_forward = own.get("forward")  # of an instance, such as a compiled one

    def put_back() -> None:
        own.pop("forward", None)
        if user_forward is not None:
            own["forward"] = user_forward

    def run_redirected(*args: Any, **kwargs: Any) -> Any:
        put_back()
        return step(*args, **kwargs)

    def run_step(*args: Any, **kwargs: Any) -> Any:
        own["forward"] = run_redirected
        try:
            return call(*args, **kwargs)
        finally:
            put_back()

    return run_step


def from_compiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, with its forward and step methods compiled the same way."""
    module: nn.Module = unwrap_compiled(model)
    if not is_compiled(model) or not hasattr(module, "training_step"):
        raise ValueError(f"Expected `torch.compile(module)` of a `LightningModule`, not a `{type(model).__name__}`.")
    if "_compiler_ctx" in vars(module):
        if vars(module)["_compiler_ctx"]["dynamo_ctx"] is model.dynamo_ctx:
            return module
        to_uncompiled(module)
    steps: dict[str, Any] = {}
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        method = getattr(module, name)
        # Left alone: a default, which only calls `forward` and must not pass for the user's own; and what the user
        # compiled, or kept from being compiled.
        default = method.__module__ == "fulmen.module"
        if not default and not hasattr(method, "_torchdynamo_orig_callable"):
            steps[name] = model.dynamo_ctx(method)
    before = {name: vars(module)[name] for name in steps if name in vars(module)}
    context = {"compiler": "dynamo", "dynamo_ctx": model.dynamo_ctx, "steps": tuple(steps), "before": before}
    module.__dict__.update(steps, _compiler_ctx=context)
    return module


def to_uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, or one that was trained compiled, with its methods as they were."""
    module: nn.Module = unwrap_compiled(model)
    if module is model and "_compiler_ctx" not in vars(module):
        raise ValueError(f"`{type(model).__name__}` is not compiled. Nothing needs to be undone, use it as it is.")
    before = undo_compilation(vars(module))
    vars(module).clear()
    vars(module).update(before)
    return module


def undo_compilation(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of `vars(module)`, as it was before `from_compiled`."""
    context = state.get("_compiler_ctx", {"steps": (), "before": {}})
    kept = {key: value for key, value in state.items() if key not in (*context["steps"], "_compiler_ctx")}
    return {**kept, **context["before"]}


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """The parameters that stand at several places of a module.

    Args:
        module: with tied weights, perhaps.

    Returns:
        For each such parameter the list of its names.

    Examples:
        >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> model["b"].weight = model["a"].weight
        >>> find_shared_parameters(model)
        [['a.weight', 'b.weight']]
    """
    names: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [same for same in names.values() if len(same) > 1]


def set_shared_parameters(module: nn.Module, shared_params: list[list[str]]) -> nn.Module:
    """Tie parameters again, such as after a move to a device that makes new ones.

    Args:
        module: is changed in place.
        shared_params: lists of names, as `find_shared_parameters` gives them; the first replaces the others.

    Returns:
        The same module.

    Raises:
        AttributeError: if the module has no parameter of the first name, or no sub-module that holds another.
    """
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
    return module
