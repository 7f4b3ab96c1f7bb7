"""What is refused before `Fabric.setup` changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fulmen.fabric.wrappers import _FabricDataLoader, _FabricOptimizer, is_wrapped
from fulmen.utilities.errors import describe_received


def check_module(module: object) -> None:
    """Raises unless it is a module that was not set up."""
    if is_wrapped(module):
        raise ValueError("A model should be passed only once to the `setup` method. Use what it returned.")
    if not isinstance(module, nn.Module):
        what = f"`fabric.setup` received {describe_received(module)} as the module."
        raise TypeError(f"{what} Pass a `torch.nn.Module`.")


def check_optimizers(optimizers: Iterable[Any], allow_meta: bool) -> None:
    """Raises unless these are optimizers that were not set up, of parameters that have values."""
    for optimizer in optimizers:
        if isinstance(optimizer, _FabricOptimizer):
            raise ValueError("An optimizer should be passed only once to the `setup` method. Use what it returned.")
        if not isinstance(optimizer, Optimizer):
            what = f"`fabric.setup` received {describe_received(optimizer)} as an optimizer."
            raise TypeError(f"{what} Pass a `torch.optim.Optimizer`.")
        groups = [] if allow_meta else vars(optimizer).get("param_groups", [])
        if any(parameter.is_meta for group in groups for parameter in group["params"]):
            what = "The optimizer has references to the model's meta-device parameters."
            why = "Materializing them leaves the optimizer with the old ones."
            fix = "Set up the model first, and create the optimizer of the model that `setup_module` returns."
            raise RuntimeError(f"{what} {why} {fix}")


def check_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raises a ValueError for an optimizer that has no parameter of the module."""
    own = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        parameters = [p for group in vars(optimizer).get("param_groups", ()) for p in group["params"]]
        if own and parameters and not any(id(parameter) in own for parameter in parameters):
            what = f"None of the parameters of the optimizer `{type(optimizer).__name__}` belongs to the"
            fix = f"`{type(module).__name__}` it is set up with. Create it from `module.parameters()`."
            raise ValueError(f"{what} {fix}")


def check_loaders(loaders: Sequence[Any]) -> None:
    """Raises unless these are loaders that were not set up."""
    if not loaders:
        raise ValueError("`setup_dataloaders` requires at least one dataloader as input.")
    for loader in loaders:
        if isinstance(loader, _FabricDataLoader):
            raise ValueError("A dataloader should be passed only once to the `setup_dataloaders` method.")
        if not isinstance(loader, DataLoader):
            what = "Only PyTorch DataLoader are currently supported in `setup_dataloaders`, not a"
            raise TypeError(f"{what} {type(loader).__name__}. Iterate over it yourself, and use `fabric.to_device`.")
