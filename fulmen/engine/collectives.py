"""The process group of a run, on `torch.distributed`: how it is made, and collectives for tensors and objects."""

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
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

    from fulmen.engine.cluster import ClusterEnvironment

    ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType | str

T = TypeVar("T")

# What users write, and what only some backends have under that name.
_REDUCE_OPS = {"mean": "AVG", "avg": "AVG", "prod": "PRODUCT"}
_run_numbers = itertools.count(1)  # of this process in its group


def is_initialized() -> bool:
    """Is this process in a group?"""
    return dist.is_available() and dist.is_initialized()


def backend_for(device: torch.device) -> str:
    """What connects devices of this kind best."""
    known = {"cpu": "gloo", "cuda": "nccl"}.get(device.type)
    return known or dist.get_default_backend_for_device(device)


# ---------------------------------------------------------------------- meeting


def init_group(
    cluster: ClusterEnvironment, backend: str, timeout: timedelta, listener: socket.socket | None = None
) -> Store:
    """Makes the group of all processes, unless this one is in it. Returns a store for the run that begins.

    Arguments:
        timeout: how long to wait for the others, and later in each collective.
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
        _create_group(cluster, backend, timeout, listener)
    # What another Trainer of this process left in the store, such as the port of its watchdog, is not for this run.
    return dist.PrefixStore(f"fulmen/{next(_run_numbers)}", dist.distributed_c10d._get_default_store())


def _create_group(
    cluster: ClusterEnvironment, backend: str, timeout: timedelta, listener: socket.socket | None
) -> None:
    global _run_numbers
    size = cluster.world_size()
    rank = cluster.global_rank()
    store = _open_store(cluster.main_address, cluster.main_port, size, rank, timeout, listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    atexit.register(destroy_group)
    _run_numbers = itertools.count(1)  # those of all processes have the same numbers


def destroy_group() -> None:
    """Ends the group; others that still wait for this process get an error."""
    if is_initialized():
        dist.destroy_process_group()
        gc.collect()  # whoever still refers to the group keeps its threads, and ending with them aborts the process


def _open_store(
    address: str, port: int, size: int, rank: int, timeout: timedelta, listener: socket.socket | None
) -> Store:
    place = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    seconds = timeout.total_seconds()
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


def comm_device(device: torch.device, group: ProcessGroup | None = None) -> torch.device:
    """Where tensors have to be to travel: gloo and MPI take them from the CPU, others from the device."""
    return torch.device("cpu") if dist.get_backend(group) in ("gloo", "mpi") else device


def all_reduce_tensor(
    tensor: Tensor, device: torch.device, group: ProcessGroup | None = None, op: ReduceOp = "mean"
) -> Tensor:
    """A new tensor, the same in the whole group, combined element-wise; integers have a float32 mean.

    Raises:
        ValueError: for an unknown operation.
    """
    kind = _find_reduce_op(op) if isinstance(op, str) else op
    value = tensor.detach().to(comm_device(device, group), copy=True)
    if kind != dist.ReduceOp.AVG:
        dist.all_reduce(value, op=kind, group=group)
        return value.to(tensor.device)
    if not value.is_floating_point() and not value.is_complex():
        value = value.float()
    dist.all_reduce(value, group=group)  # gloo cannot average
    return value.div_(dist.get_world_size(group)).to(tensor.device)


def _find_reduce_op(name: str) -> dist.ReduceOp.RedOpType:
    op: dist.ReduceOp.RedOpType | None = vars(dist.ReduceOp).get(_REDUCE_OPS.get(name.lower(), name.upper()))
    if op is None:
        raise ValueError(f"`reduce_op={name!r}` is not known. Use 'mean', 'sum', 'max', 'min' or 'product'.")
    return op


def all_gather_tensor(
    tensor: Tensor, device: torch.device, group: ProcessGroup | None = None, sync_grads: bool = False
) -> Tensor:
    """The tensors of the whole group along a new first dimension; shapes have to be equal."""
    value = tensor.to(comm_device(device, group)).contiguous()
    if sync_grads and tensor.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.stack(all_gather(value, group=group or dist.group.WORLD)).to(tensor.device)
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.detach(), group=group)
    return torch.stack(parts).to(tensor.device)


def count_collectives() -> int:
    """How many collectives this process has begun in its groups. A backend that does not count them has always more."""
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except RuntimeError:
        return next(_uncounted)


_uncounted = itertools.count()
_INLINE_BYTES = 8192  # bytes


def all_gather_objects(obj: T, device: torch.device, group: ProcessGroup | None = None) -> list[T]:
    """The objects of the whole group, by rank; they are pickled. One collective if each takes at most 8 KiB, else two."""
    data = pickle.dumps(obj)
    size = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    packed = torch.zeros(8 + _INLINE_BYTES, dtype=torch.uint8)
    packed[:8] = size
    packed[8 : 8 + len(data)] = content[:_INLINE_BYTES]
    home = comm_device(device, group)
    # sync: what arrives is read here
    parts = [_read_bytes(part, 8 + _INLINE_BYTES) for part in all_gather_tensor(packed.to(home), device, group).cpu()]
    sizes = [int.from_bytes(part[:8], "little") for part in parts]
    if max(sizes) <= _INLINE_BYTES:
        return [pickle.loads(part[8:]) for part in parts]
    whole = torch.zeros(max(sizes), dtype=torch.uint8)
    whole[: len(data)] = content
    rows = all_gather_tensor(whole.to(home), device, group).cpu()
    return [pickle.loads(_read_bytes(row, size)) for row, size in zip(rows, sizes)]


def gather_objects(obj: T | None, device: torch.device) -> tuple[list[T], int]:
    """On rank 0 the objects of all processes that have one (not None), by rank; everywhere, how many processes have."""
    data = b"" if obj is None else pickle.dumps(obj)
    home = comm_device(device)
    sizes = all_gather_tensor(torch.tensor(len(data), device=home), device).tolist()  # sync: what arrives is read here
    senders = sum(size > 0 for size in sizes)
    if not senders:
        return [], 0
    packed = torch.zeros(max(sizes), dtype=torch.uint8)
    packed[: len(data)] = torch.frombuffer(bytearray(data or b"0"), dtype=torch.uint8)[: len(data)]
    packed = packed.to(home)
    rows = [torch.empty_like(packed) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(packed, rows, 0)
    return [pickle.loads(_read_bytes(row.cpu(), size)) for row, size in zip(rows or [], sizes) if size], senders


def _read_bytes(row: Tensor, size: int) -> bytes:
    return ctypes.string_at(row.data_ptr(), size)


def bucket_tensors(tensors: Iterable[Tensor], limit: int = 2**26, by_type: bool = True) -> list[list[Tensor]]:
    """Lists of tensors of one dtype and device, each with up to ``limit`` elements, to be sent at once.

    >>> [len(bucket) for bucket in bucket_tensors([torch.zeros(3), torch.zeros(2), torch.zeros(1)], limit=4)]
    [1, 2]
    """
    full: list[list[Tensor]] = []
    open_ones: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = tensor.dtype if by_type else None, tensor.device
        bucket, size = open_ones.get(kind, ([], limit))
        if size + tensor.numel() > limit:
            bucket = []
            size = 0
            full.append(bucket)
        bucket.append(tensor)
        open_ones[kind] = bucket, size + tensor.numel()
    return full


def broadcast_tensors(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Fills the tensors with those of rank 0, in few broadcasts: of bytes, as not every type of number can travel."""
    # Large ones go one by one, so that no copy of a whole model is made.
    for bucket in bucket_tensors((tensor.detach() for tensor in tensors), by_type=False):
        parts = [tensor.reshape(-1).view(torch.uint8) for tensor in bucket]
        flat = torch.cat(parts).to(comm_device(device))
        dist.broadcast(flat, 0)
        if dist.get_rank() != 0:
            for tensor, part in zip(bucket, flat.split_with_sizes([part.numel() for part in parts])):
                tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # a copy begins at a whole number


class StopConsensus:
    """Lets all processes stop before the same batch, once they were told to: through the store, without a collective.

    Positions are pairs of numbers that all processes reach in the same, rising order. A process that was told to stop
    publishes its position and waits up to ``pause_s``. If all are there, it proposes to stop; if it waited in vain, or
    another one is ahead, to continue. The first proposal for a position counts for all. After ``patience_s`` a process
    that is the only one to know stops alone.

    Arguments:
        store: of the process group, for this alone.
        rank, size: of this process, and how many there are.
    """

    def __init__(self, store: Store, rank: int, size: int, patience_s: float = 5.0, pause_s: float = 0.5) -> None:
        self.store = store
        self.pause_s = pause_s
        self.position_keys = [f"at/{other}" for other in range(size)]
        self.own_key = self.position_keys[rank]
        self.deadline = time.monotonic() + patience_s

    def agree(self, position: tuple[int, int]) -> bool | None:
        """Do all stop at this position? None: this process stops alone."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # sync: what was queued before is done, and needs no other process any more
        try:
            return self._decide(position) or (None if time.monotonic() > self.deadline else False)
        except RuntimeError:  # the store is gone, and with it whoever had it
            return None

    def _decide(self, position: tuple[int, int]) -> bool:
        name = f"{position[0]},{position[1]}"
        self.store.set(self.own_key, name)
        deadline = time.monotonic() + self.pause_s
        while (proposal := self._propose(position)) is None:
            if time.monotonic() > deadline:
                proposal = "go"
                break
            time.sleep(min(0.002 * len(self.position_keys), 0.1))
        return bool(self.store.compare_set(f"end/{name}", "", proposal) in (b"end", "end"))

    def _propose(self, position: tuple[int, int]) -> str | None:
        """ "end" if all are at the position, "go" if one is ahead, None while that is open."""
        if not self.store.check(self.position_keys):
            return None
        positions = [tuple(map(int, bytes(at).split(b","))) for at in self.store.multi_get(self.position_keys)]
        if all(at == position for at in positions):
            return "end"
        return "go" if max(positions) > position else None
