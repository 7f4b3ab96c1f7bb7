"""A checkpoint as a folder: tensors in shards of `torch.distributed.checkpoint`, and all the rest in ``meta.pt``.

Shards are named ``model.<key of the state dict>`` and ``optimizer_<i>.state.<name of the parameter>.<name of the
state>``. In what is read first, tensors that are still in the shards are on the meta device.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import pickle
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.storage.filesystem import get_filesystem, is_regular, is_remote, local_path
from fulmen.storage.integrity import DamagedCheckpointError, damage_error, hash_prefix, load_verified, verify_file
from fulmen.utilities.types import _PATH, DTYPES

if TYPE_CHECKING:
    import io

    from torch.distributed.checkpoint.planner import ReadItem

META = "meta.pt"
TRAINER_KEY = "pytorch-lightning_version"  # what a Trainer writes beside its shards, and nobody else
CHECKSUMS = "checksums.json"
MODEL = "model."
OPTIMIZER = "optimizer_{}.state."
# The state dicts of a checkpoint, and how the names of their shards begin: the second is of a run with an average.
WEIGHTS = {"state_dict": MODEL, "current_model_state": "current_model."}


class ShardedStateDict(dict[str, Any]):
    """A state dict whose tensors are on the meta device as long as they are in the folder ``path``."""

    def __init__(self, path: str = "", weights_only: bool | None = None, prefix: str = MODEL) -> None:
        super().__init__()
        self.path = path
        self.weights_only = weights_only
        self.prefix = prefix


def is_sharded(path: _PATH) -> bool:
    """Is it such a folder?"""
    return not is_remote(path) and os.path.isfile(os.path.join(local_path(path), META))


def is_dcp_folder(path: _PATH) -> bool:
    """Is it a folder that `torch.distributed.checkpoint` wrote, but no trainer?"""
    parts = not is_remote(path) and os.path.isfile(os.path.join(local_path(path), ".metadata"))
    return parts and not is_sharded(path)


def flatten_optimizer_states(states: list[dict[str, Any]], take: bool = True) -> dict[str, Any]:
    """The tensors of optimizer states under the names of their shards; with `take`, they are taken out of the states."""
    flat = {}
    for index, state in enumerate(states):
        for name, values in state["state"].items():
            for key in [key for key, value in values.items() if isinstance(value, Tensor)]:
                flat[f"{OPTIMIZER.format(index)}{name}.{key}"] = values.pop(key) if take else values[key]
    return flat


def write_shards(checkpoint: dict[str, Any], folder: str) -> None:
    """This process's part of the tensors of a checkpoint, which are taken out of it. All processes call it."""
    tensors = {
        f"{prefix}{key}": value for kind, prefix in WEIGHTS.items() for key, value in checkpoint.pop(kind, {}).items()
    }
    tensors |= flatten_optimizer_states(checkpoint.get("optimizer_states", []))
    write_tensors(tensors, folder)


def write_tensors(tensors: dict[str, Any], folder: str) -> None:
    """This process's part of tensors, which may be nested, with other values between them. All processes call it."""
    import torch.distributed.checkpoint as dcp

    # What all have, such as buffers, is that of rank 0.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with _plain_errors(f"write the checkpoint {folder!r}"):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=planner)


def hash_own_parts(folder: str, rank: int) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files that this process wrote; rank 0 also has those that name no rank."""
    names = {name: re.match(r"__(\d+)_", name) for name in os.listdir(folder)}
    own = [name for name, writer in names.items() if int(writer[1] if writer else 0) == rank]
    return {name: _measure_part(folder, name) for name in own}


def check_shards(path: str, rank: int = 0, num_ranks: int = 1) -> None:
    """Raises `DamagedCheckpointError` if the files of a checkpoint are not as written.

    Sizes are compared always, contents of every ``num_ranks``-th file; a folder of others has nothing to compare.
    """
    folder = local_path(path)
    with _open_part(folder, META) as meta:
        verify_file(meta, os.path.join(path, META))
    if not os.path.lexists(os.path.join(folder, CHECKSUMS)):
        return
    try:
        with _open_part(folder, CHECKSUMS) as file:
            expected = sorted(json.load(file).items())
        for number, (name, (size, hashed)) in enumerate(expected):
            found = _measure_part(folder, name, full=number % num_ranks == rank)
            if found[0] != size or found[1] not in ("", hashed):
                what = f"has {found[0]:,} bytes instead of {size:,}" if found[0] != size else "has another SHA-256"
                raise damage_error(path, f"its part {name!r} {what}: it was changed after it was written")
    except DamagedCheckpointError:
        raise
    except Exception as error:  # what a wrong byte in the list leads to is hard to foresee
        raise damage_error(path, f"its parts do not agree with {CHECKSUMS} ({error})") from error


def _open_part(folder: str, name: str) -> Any:
    """A part of a checkpoint, for reading: a regular file in its folder, whatever a list of parts may name."""
    if os.path.basename(name) != name:
        raise ValueError(f"{name!r} names a place outside of the folder")
    return get_filesystem(folder).open(os.path.join(folder, name), "rb")


def _measure_part(folder: str, name: str, full: bool = True) -> tuple[int, str]:
    with _open_part(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        return size, hash_prefix(file, size) if full else ""


def read_outline(path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint in a folder, with its tensors on the meta device."""
    folder = local_path(path)
    checkpoint = read_meta(path, weights_only)
    found = {kind: ShardedStateDict(folder, weights_only, prefix) for kind, prefix in WEIGHTS.items()}
    states = checkpoint.get("optimizer_states", [])
    for name, entry in _reader_and_planner(found["state_dict"])[0].read_metadata().state_dict_metadata.items():
        value = _allocate_tensor(entry, "meta")
        for weights in found.values():
            if name.startswith(weights.prefix):
                weights[name[len(weights.prefix) :]] = value
        for index, state in enumerate(states):
            if name.startswith(prefix := OPTIMIZER.format(index)):
                parameter, key = name[len(prefix) :].rsplit(".", 1)
                state["state"].setdefault(parameter, {})[key] = value
    return checkpoint | {kind: weights for kind, weights in found.items() if weights or kind == "state_dict"}


def _allocate_tensor(entry: object, device: str = "cpu") -> Tensor | None:
    """Where a stored tensor can be read to; None for other objects."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not isinstance(entry, TensorStorageMetadata):
        return None
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def read_shards(wanted: dict[str, Any], source: ShardedStateDict, alone: bool = False) -> None:
    """Fills tensors, each under the name of its shard; other values are replaced. All processes call it.

    Arguments:
        alone: no other process takes part.
    """
    import torch.distributed.checkpoint as dcp

    reader, planner = _reader_and_planner(source)
    options = {"no_dist": True} if alone and "no_dist" in inspect.signature(dcp.load).parameters else {}
    with warnings.catch_warnings(), _plain_errors(f"read the checkpoint {source.path!r}"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that no group exists is known
        dcp.load(wanted, storage_reader=reader, planner=planner, **options)


def _reader_and_planner(source: ShardedStateDict) -> tuple[Any, Any]:
    """Reader and planner of `torch.distributed.checkpoint`, which by themselves would run any code in a folder."""
    import torch.distributed.checkpoint as dcp

    trusted = source.weights_only is False

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            rank = kwargs.get("rank")
            with _open_part(source.path, ".metadata" if rank is None else f"__{rank}.metadata") as file:
                if not trusted:
                    _OnlyMetadata(file).load()
            metadata = super().read_metadata(*args, **kwargs)
            for part in sorted({str(stored.relative_path) for stored in (metadata.storage_data or {}).values()}):
                if not is_regular(os.path.join(source.path, part)):
                    raise damage_error(source.path, f"its part {part!r} is not there, or not a regular file")
            return metadata

    class Planner(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            load_verified(value, source.path, "cpu", weights_only=True)
            value.seek(0)
            super().load_bytes(read_item, value)

    return Reader(source.path), dcp.DefaultLoadPlanner() if trusted else Planner()


_PATHS = {kind.__name__: kind for kind in (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath)}


class _OnlyMetadata(pickle.Unpickler):
    """Refuses every name but those that describe tensors and where they are."""

    def find_class(self, module: str, name: str) -> Any:
        home = "torch.distributed.checkpoint"
        known = (f"{home}.filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout")
        if f"{module}.{name}" in known or (module == "torch" and name in DTYPES):
            return super().find_class(module, name)
        if module.startswith("pathlib") and name in _PATHS:
            return _PATHS[name]
        if module == f"{home}.metadata" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        what = f"The file `.metadata` of a sharded checkpoint names `{module}.{name}`, and that can run any code."
        raise pickle.UnpicklingError(f"{what} If you trust the folder, pass `weights_only=False`.")


@contextmanager
def _plain_errors(what: str) -> Generator[None]:
    """What went wrong on any process, as an `Exception`; on all of them the same one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        kind = next((kind for kind in (OSError, pickle.UnpicklingError) if isinstance(first, kind)), RuntimeError)
        kind = OSError if "unexpected pos" in str(first) else kind  # what torch says when a disk is full
        raise kind(f"Rank {rank} could not {what}: {type(first).__name__}: {first}") from error


def read_all(path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
    """The checkpoint in a folder as one dict, as it would be in a file; read by this process alone, onto the CPU."""
    rest = read_meta(path, weights_only)
    if TRAINER_KEY not in rest:  # a loop of the user's own wrote it, under names of its own
        return {**rest, **read_dcp_folder(path, weights_only)}
    checkpoint = read_outline(path, weights_only)
    kinds = [kind for kind in WEIGHTS if kind in checkpoint]
    states = checkpoint.get("optimizer_states", [])
    wanted = {f"{WEIGHTS[kind]}{key}": value for kind in kinds for key, value in checkpoint[kind].items()}
    wanted |= flatten_optimizer_states(states, take=False)
    wanted = {name: value if value is None else torch.empty_like(value, device="cpu") for name, value in wanted.items()}
    read_shards(wanted, checkpoint["state_dict"], alone=True)
    checkpoint |= {kind: {key: wanted[f"{WEIGHTS[kind]}{key}"] for key in checkpoint[kind]} for kind in kinds}
    for index, state in enumerate(states):
        for parameter, values in state["state"].items():
            values.update(
                {key: wanted.get(f"{OPTIMIZER.format(index)}{parameter}.{key}", values[key]) for key in values}
            )
        number_parameters(state)
    return checkpoint


def read_dcp_folder(
    path: _PATH, weights_only: bool | None = None, wanted: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `torch.distributed.checkpoint` wrote without a trainer, nested as it was.

    Arguments:
        weights_only: False also reads objects whose code runs then; only for folders you trust.
        wanted: tensors to be filled, under their names in `list_shards`; what else is under them is read onto the CPU.
            All processes call this then. Without, this process alone reads everything.
    """
    from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

    source = ShardedStateDict(local_path(path), weights_only)
    metadata = _reader_and_planner(source)[0].read_metadata()
    alone = wanted is None
    if wanted is None:
        wanted = {name: _allocate_tensor(entry) for name, entry in metadata.state_dict_metadata.items()}
    read_shards(wanted, source, alone=alone)
    nesting = metadata.planner_data
    return wanted if nesting is None else unflatten_state_dict(wanted, {name: nesting[name] for name in wanted})


def list_shards(path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
    """What is in a folder, by name: tensors on the meta device, and None for other objects."""
    reader, _ = _reader_and_planner(ShardedStateDict(local_path(path), weights_only))
    return {name: _allocate_tensor(entry, "meta") for name, entry in reader.read_metadata().state_dict_metadata.items()}


def read_meta(path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
    """What a checkpoint holds beside the shards of its folder."""
    with _open_part(local_path(path), META) as file:
        found: dict[str, Any] = load_verified(file, os.path.join(path, META), "cpu", weights_only)
    return found


def number_parameters(state: dict[str, Any]) -> None:
    """Parameters by their position, as in `Optimizer.state_dict`, instead of by their name."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    positions = {name: position for position, name in enumerate(names)}
    state["state"] = {positions[name]: values for name, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [positions[name] for name in group["params"]]
