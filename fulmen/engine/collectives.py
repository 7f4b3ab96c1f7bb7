"""The processes of a run as a group, on `torch.distributed`: how they meet, and what travels between them."""

from __future__ import annotations

import atexit
import ctypes
import gc
import itertools
import os
import pickle
import socket
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fulmen.engine.cluster import ClusterEnvironment

# What users write, and what only some backends have under that name.
_NAMES = {"mean": "AVG", "avg": "AVG", "prod": "PRODUCT"}
_runs = itertools.count(1)  # of this process in its group


def initialised() -> bool:
    """Are we in a group?"""
    return dist.is_available() and dist.is_initialized()


def backend_for(device: torch.device) -> str:
    """What connects devices of this kind best."""
    known = {"cpu": "gloo", "cuda": "nccl"}.get(device.type)
    return known or dist.get_default_backend_for_device(device)


# ---------------------------------------------------------------------- meeting


def join(cluster: ClusterEnvironment, backend: str, timeout: timedelta, listener: socket.socket | None = None) -> Any:
    """Joins the group of all processes, if this one has not yet. Returns a store for the run that begins.

    Arguments:
        timeout: for the others to come, and for each collective later.
        listener: the bound socket behind the cluster's port, if it was kept open so that nobody else could take it.

    Raises:
        RuntimeError: the port is taken, nobody answers at the address, not all processes came in time, or this process
            belongs to a group of another size already.
    """
    if not dist.is_available():
        raise RuntimeError("This build of torch has no `torch.distributed`. Install another one, or use `devices=1`.")
    size = cluster.world_size()
    if dist.is_initialized():
        if dist.get_world_size() != size:
            what = f"This process is in a group of {dist.get_world_size()} processes already, and the Trainer wants one"
            fix = "Use the same `devices` and `num_nodes` for all Trainers of a script, or one script for each."
            raise RuntimeError(f"{what} of {size}. {fix}")
    else:
        _join(cluster, backend, timeout, listener)
    # What another Trainer of this process left in the store, such as the port of its watchdog, is not for this run.
    return dist.PrefixStore(f"fulmen/{next(_runs)}", dist.distributed_c10d._get_default_store())


def _join(cluster: ClusterEnvironment, backend: str, timeout: timedelta, listener: socket.socket | None) -> None:
    global _runs
    size, rank = cluster.world_size(), cluster.global_rank()
    store = _store(cluster.main_address, cluster.main_port, size, rank, timeout, listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    atexit.register(leave)
    _runs = itertools.count(1)  # those of all processes have the same numbers


def leave() -> None:
    """Ends the group; others that still wait for this process get an error."""
    if initialised():
        dist.destroy_process_group()
        gc.collect()  # whoever still refers to the group keeps its threads, and ending with them aborts the process


def _store(
    address: str, port: int, size: int, rank: int, timeout: timedelta, listener: socket.socket | None
) -> dist.Store:
    place, seconds = f"MASTER_ADDR={address}, MASTER_PORT={port}", timeout.total_seconds()
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise RuntimeError(f"Rank {rank} cannot meet the others at {place}: {error}. Set MASTER_ADDR.") from error
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the one `torchrun` met with
            agent = dist.TCPStore(address, port, size, False, timeout)
            return dist.PrefixStore(f"fulmen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", agent)
        if listener is None:
            return dist.TCPStore(address, port, size, rank == 0, timeout)
        return dist.TCPStore(
            address, port, size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            what = f"Port {port} is taken by another program, so rank 0 cannot be met there ({place})"
            raise RuntimeError(f"{what}. Unset MASTER_PORT to have a free one chosen, or set another.") from error
        if rank == 0:
            what = f"Not all of {size} processes came to {place} within {seconds:g} s: {str(error).splitlines()[0]}"
            raise RuntimeError(f"{what}. Start them all, or give `DDPStrategy(timeout=...)` more time.") from error
        what = f"Rank {rank} found nobody at {place} within {seconds:g} s"
        fix = "Is rank 0 running, is this its address, and does a firewall let the port through?"
        raise RuntimeError(f"{what}: {str(error).splitlines()[0]}. {fix}") from error


# ---------------------------------------------------------------------- travelling


def home_of(device: torch.device, group: Any = None) -> torch.device:
    """Where tensors have to be to travel: gloo and MPI take them from the CPU, others from the device."""
    return torch.device("cpu") if dist.get_backend(group) in ("gloo", "mpi") else device


def reduced(tensor: Tensor, device: torch.device, group: Any = None, op: Any = "mean") -> Tensor:
    """A new tensor, the same in the whole group, combined element-wise; whole numbers have a float32 mean.

    Raises:
        ValueError: for an unknown operation.
    """
    name = _NAMES.get(op.lower(), op.upper()) if isinstance(op, str) else op
    kind = getattr(dist.ReduceOp, name, None) if isinstance(name, str) else name
    if kind is None:
        raise ValueError(f"`reduce_op={op!r}` is not known. Use 'mean', 'sum', 'max', 'min' or 'product'.")
    value = tensor.detach().to(home_of(device, group), copy=True)
    if kind != dist.ReduceOp.AVG:
        dist.all_reduce(value, op=kind, group=group)
        return value.to(tensor.device)
    if not value.is_floating_point() and not value.is_complex():
        value = value.float()
    dist.all_reduce(value, group=group)  # gloo cannot average
    return value.div_(dist.get_world_size(group)).to(tensor.device)


def gathered(tensor: Tensor, device: torch.device, group: Any = None, sync_grads: bool = False) -> Tensor:
    """The tensors of the whole group along a new first dimension; shapes have to be equal."""
    value = tensor.to(home_of(device, group)).contiguous()
    if sync_grads and tensor.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.stack(all_gather(value, group=group or dist.group.WORLD)).to(tensor.device)
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.detach(), group=group)
    return torch.stack(parts).to(tensor.device)


def count() -> int:
    """How many collectives this process has begun in its groups. A backend that does not count them has always more."""
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except RuntimeError:
        return next(_uncounted)


_uncounted = itertools.count()
_ROOM = 8192  # bytes


def exchanged(obj: Any, device: torch.device, group: Any = None) -> list[Any]:
    """The objects of the whole group, by rank. One collective if each is pickled into 8 KiB, else two."""
    data = pickle.dumps(obj)
    size = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    packed = torch.zeros(8 + _ROOM, dtype=torch.uint8)
    packed[:8], packed[8 : 8 + len(data)] = size, content[:_ROOM]
    home = home_of(device, group)
    # sync: what arrives is read here
    parts = [_bytes_of(part, 8 + _ROOM) for part in gathered(packed.to(home), device, group).cpu()]
    sizes = [int.from_bytes(part[:8], "little") for part in parts]
    if max(sizes) <= _ROOM:
        return [pickle.loads(part[8:]) for part in parts]
    whole = torch.zeros(max(sizes), dtype=torch.uint8)
    whole[: len(data)] = content
    rows = gathered(whole.to(home), device, group).cpu()
    return [pickle.loads(_bytes_of(row, size)) for row, size in zip(rows, sizes)]


def collected(obj: Any, device: torch.device) -> tuple[list[Any], int]:
    """On rank 0 the objects of all processes that have one (not None), by rank; everywhere, how many have."""
    data = b"" if obj is None else pickle.dumps(obj)
    home = home_of(device)
    sizes = gathered(torch.tensor(len(data), device=home), device).tolist()  # sync: what arrives is read here
    senders = sum(size > 0 for size in sizes)
    if not senders:
        return [], 0
    packed = torch.zeros(max(sizes), dtype=torch.uint8)
    packed[: len(data)] = torch.frombuffer(bytearray(data or b"0"), dtype=torch.uint8)[: len(data)]
    packed = packed.to(home)
    rows = [torch.empty_like(packed) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(packed, rows, 0)
    return [pickle.loads(_bytes_of(row.cpu(), size)) for row, size in zip(rows or [], sizes) if size], senders


def _bytes_of(row: Tensor, size: int) -> bytes:
    return ctypes.string_at(row.data_ptr(), size)


def buckets(tensors: Iterable[Tensor], limit: int = 2**26, by_type: bool = True) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, up to so many numbers: each bucket travels at once."""
    full: list[list[Tensor]] = []
    open_ones: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = tensor.dtype if by_type else None, tensor.device
        bucket, size = open_ones.get(kind, ([], limit))
        if size + tensor.numel() > limit:
            bucket, size = [], 0
            full.append(bucket)
        bucket.append(tensor)
        open_ones[kind] = bucket, size + tensor.numel()
    return full


def share(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Fills the tensors with those of rank 0, in few broadcasts: of bytes, as not every type of number can travel."""
    # Large ones go one by one, so that no copy of a whole model is made.
    for bucket in buckets((tensor.detach() for tensor in tensors), by_type=False):
        parts = [tensor.reshape(-1).view(torch.uint8) for tensor in bucket]
        flat = torch.cat(parts).to(home_of(device))
        dist.broadcast(flat, 0)
        if dist.get_rank() != 0:
            for tensor, part in zip(bucket, flat.split([part.numel() for part in parts])):
                tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # a copy begins at a whole number


class Ending:
    """Agrees on the place at which all processes end, once they were told to; there is no collective, and no long wait.

    Places are pairs of numbers that all processes come to in the same, rising order. Whoever was told to end says where
    it is, and waits a moment. One that sees all of them at its place decides to end there; one that waited in vain, or
    sees that another is ahead, decides to go on. The first decision on a place counts. After ``patience`` seconds a
    process that is the only one to know ends alone.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float = 5.0, pause: float = 0.5) -> None:
        self.store, self.rank, self.pause = store, rank, pause
        self.told = [f"at/{other}" for other in range(size)]
        self.deadline = time.monotonic() + patience

    def here(self, place: tuple[int, int]) -> bool | None:
        """Do all end at this place? None: this process ends alone."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # sync: what lies before this place is done, and needs no other process any more
        try:
            return self.decide(place) or (None if time.monotonic() > self.deadline else False)
        except RuntimeError:  # the store is gone, and with it whoever had it
            return None

    def decide(self, place: tuple[int, int]) -> bool:
        name = f"{place[0]},{place[1]}"
        self.store.set(self.told[self.rank], name)
        until, vote = time.monotonic() + self.pause, ""
        while not vote:
            if self.store.check(self.told):
                others = [tuple(map(int, bytes(at).split(b","))) for at in self.store.multi_get(self.told)]
                vote = "end" if all(at == place for at in others) else "go" if max(others) > place else ""
            if not vote and time.monotonic() > until:
                vote = "go"
            elif not vote:
                time.sleep(min(0.002 * len(self.told), 0.1))
        return bool(self.store.compare_set(f"end/{name}", "", vote) in (b"end", "end"))
