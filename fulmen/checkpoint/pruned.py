"""Weights of pruned layers in a state dict: as one tensor, or as torch's pair ``<name>_orig`` and ``<name>_mask``.

`torch.nn.utils.prune` replaces the parameter ``weight`` by ``weight_orig``, which learns, and the buffer ``weight_mask``;
the layer computes with their product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.nn import Module

ORIGINAL = "_orig"
MASK = "_mask"


def apply_masks(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with one tensor, in which zeros are what was pruned, in the place of each pair.

    Args:
        state_dict: of a module, pruned or not.

    Returns:
        A new dictionary; what belongs to no pair is in it as it was.

    Examples:
        >>> pair = {"weight_orig": torch.tensor([3.0, 4.0]), "weight_mask": torch.tensor([1.0, 0.0])}
        >>> apply_masks({**pair, "bias": torch.tensor([5.0])})
        {'weight': tensor([3., 0.]), 'bias': tensor([5.])}
    """
    pruned = _find_pruned(state_dict)
    merged: dict[str, Any] = {}
    for key, value in state_dict.items():
        name = key.removesuffix(ORIGINAL)
        if name != key and name in pruned:
            mask = state_dict[name + MASK]
            merged[name] = value.detach() * mask.to(value.device, value.dtype)
        elif key.removesuffix(MASK) not in pruned:
            merged[key] = value
    return merged


def fit_pruning(state_dict: Mapping[str, Any], keys: Collection[str]) -> Mapping[str, Any]:
    """The state dict in the form that a module has which is pruned, or is not, while the file is the other way round.

    Args:
        state_dict: from a file.
        keys: those of the module's own state dict.

    Returns:
        The same state dict, if nothing needs to be changed. Where only the module is pruned, masks are all ones.
    """
    in_file = _find_pruned(state_dict)
    in_module = _find_pruned(keys)
    merge = sorted(name for name in in_file - in_module if name in keys)
    split = sorted(name for name in in_module - in_file if name in state_dict)
    if not merge and not split:
        return state_dict
    pairs = {name + ending: state_dict[name + ending] for name in merge for ending in (ORIGINAL, MASK)}
    fitting = {key: value for key, value in state_dict.items() if key not in pairs and key not in split}
    fitting.update(apply_masks(pairs))
    for name in split:
        fitting.update({name + ORIGINAL: state_dict[name], name + MASK: torch.ones_like(state_dict[name])})
    return fitting


def match_pruning(module: Module, checkpoint: dict[str, Any]) -> None:
    """Replaces the state dict of a checkpoint by one that `fit_pruning` made for the module."""
    saved = checkpoint.get("state_dict")
    buffers = (name for name, _ in module.named_buffers())
    if isinstance(saved, dict) and any(str(key).endswith(MASK) for key in (*saved, *buffers)):
        checkpoint["state_dict"] = fit_pruning(saved, module.state_dict())


def _find_pruned(keys: Collection[str]) -> set[str]:
    """The names of the tensors that are there as a pair."""
    masked = (key.removesuffix(MASK) for key in keys if isinstance(key, str) and key.endswith(MASK))
    return {name for name in masked if name + ORIGINAL in keys}
