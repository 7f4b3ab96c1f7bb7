"""A checkpoint as a folder: tensors in shards of `torch.distributed.checkpoint`, and all the rest in ``meta.pt``.

Shards are named ``model.<key of the state dict>`` and ``optimizer_<i>.state.<name of the parameter>.<name of the
state>``. In what is read first, tensors that are still in the shards are on the meta device.
"""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor

from fulmen.utilities.filesystem import is_remote, local_path

META = "meta.pt"
MODEL, OPTIMIZER = "model.", "optimizer_{}.state."


class Stored(dict):
    """A state dict whose tensors are on the meta device as long as they are in the folder ``path``."""

    path = ""


def is_sharded(path: Any) -> bool:
    """Is it such a folder?"""
    return not is_remote(path) and os.path.isfile(os.path.join(local_path(path), META))


def flat_states(states: list[dict[str, Any]], take: bool = True) -> dict[str, Any]:
    """The tensors of optimizer states under the names of their shards; with `take`, they are taken out of the states."""
    flat = {}
    for index, state in enumerate(states):
        for name, values in state["state"].items():
            for key in [key for key, value in values.items() if isinstance(value, Tensor)]:
                flat[f"{OPTIMIZER.format(index)}{name}.{key}"] = values.pop(key) if take else values[key]
    return flat


def write_shards(checkpoint: dict[str, Any], folder: str) -> None:
    """This process's part of the tensors of a checkpoint, which are taken out of it. All processes call it."""
    import torch.distributed.checkpoint as dcp

    tensors = {f"{MODEL}{key}": value for key, value in checkpoint.pop("state_dict").items()}
    tensors |= flat_states(checkpoint.get("optimizer_states", []))
    # What all have, such as buffers, is that of rank 0.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=planner)


def put_in_place(folder: str, path: str) -> None:
    """Renames a finished folder; what was at its new place is removed afterwards."""
    old = f"{folder}.old"
    if os.path.lexists(path):
        os.rename(path, old)
    os.rename(folder, path)
    if os.path.isdir(old) and not os.path.islink(old):
        shutil.rmtree(old)
    elif os.path.lexists(old):
        os.remove(old)


def read_outline(path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint in a folder, with its tensors on the meta device."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = local_path(path)
    checkpoint = torch.load(os.path.join(folder, META), map_location="cpu", weights_only=weights_only)
    weights = checkpoint["state_dict"] = Stored()
    weights.path = folder
    states = checkpoint.get("optimizer_states", [])
    for name, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        value: Any = None  # some other object
        if isinstance(entry, TensorStorageMetadata):
            value = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        if name.startswith(MODEL):
            weights[name[len(MODEL) :]] = value
        for index, state in enumerate(states):
            if name.startswith(prefix := OPTIMIZER.format(index)):
                parameter, key = name[len(prefix) :].rsplit(".", 1)
                state["state"].setdefault(parameter, {})[key] = value
    return checkpoint


def read_shards(wanted: dict[str, Any], path: str, alone: bool = False) -> None:
    """Fills tensors, each under the name of its shard; other values are replaced. All processes call it.

    Arguments:
        alone: nobody else takes part.
    """
    import torch.distributed.checkpoint as dcp

    options = {"no_dist": True} if alone and "no_dist" in inspect.signature(dcp.load).parameters else {}
    with warnings.catch_warnings():  # that no group exists is known
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(path), **options)


def read_all(path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint in a folder as one dict, as it would be in a file; read by this process alone, onto the CPU."""
    checkpoint = read_outline(path, weights_only)
    weights, states = checkpoint["state_dict"], checkpoint.get("optimizer_states", [])
    wanted = {f"{MODEL}{key}": value for key, value in weights.items()} | flat_states(states, take=False)
    wanted = {name: value if value is None else torch.empty_like(value, device="cpu") for name, value in wanted.items()}
    read_shards(wanted, weights.path, alone=True)
    checkpoint["state_dict"] = {key: wanted[f"{MODEL}{key}"] for key in weights}
    for index, state in enumerate(states):
        for parameter, values in state["state"].items():
            values.update(
                {key: wanted.get(f"{OPTIMIZER.format(index)}{parameter}.{key}", values[key]) for key in values}
            )
        numbered(state)
    return checkpoint


def numbered(state: dict[str, Any]) -> None:
    """Parameters by their position, as in `Optimizer.state_dict`, instead of by their name."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    positions = {name: position for position, name in enumerate(names)}
    state["state"] = {positions[name]: values for name, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [positions[name] for name in group["params"]]
