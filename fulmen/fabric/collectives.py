"""Collectives as objects that own a group of processes: `TorchCollective`, and `SingleDeviceCollective` for one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    ReduceOp = str | dist.ReduceOp | dist.ReduceOp.RedOpType


class Collective(ABC):
    """What processes of a group do together; every method is called by all of them.

    Tensors are filled in place, and returned. The group is made by `create_group`, and destroyed by `teardown`.
    """

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None

    @property
    @abstractmethod
    def rank(self) -> int:
        """The index of this process in the group."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes in the group."""

    @property
    def group(self) -> ProcessGroup:
        """The group that this owns.

        Raises:
            RuntimeError: it owns none.
        """
        if self._group is None:
            raise RuntimeError(f"`{type(self).__name__}` does not own a group. Make one: `collective.create_group()`.")
        return self._group

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """The tensor of process `src`."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        """The tensors of all, combined element-wise."""

    @abstractmethod
    def reduce(self, tensor: Tensor, dst: int, op: str) -> Tensor:
        """The same on process `dst` alone."""

    @abstractmethod
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        """The tensors of all, by rank."""

    @abstractmethod
    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        """The same on process `dst` alone; others pass an empty list or None."""

    @abstractmethod
    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        """The tensor that process `src` has for this one in its list."""

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: str) -> Tensor:
        """What all have for this process in their lists, combined element-wise."""

    @abstractmethod
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        """What all have for this process in their lists, by rank."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Sends a tensor to process `dst`, which calls `recv`."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """The tensor that process `src`, or anyone, sends to this one."""

    @abstractmethod
    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Waits until every process is here."""

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Can there be processes that talk to each other?"""

    @classmethod
    @abstractmethod
    def is_initialized(cls) -> bool:
        """Is this process in the group of all?"""

    @classmethod
    @abstractmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Makes the group of all."""

    @classmethod
    @abstractmethod
    def new_group(cls, **kwargs: Any) -> ProcessGroup:
        """A group of some."""

    @classmethod
    @abstractmethod
    def destroy_group(cls, group: ProcessGroup) -> None:
        """Ends a group."""

    def setup(self, **kwargs: Any) -> Self:
        """Makes the group of all, unless this process is in it."""
        if not self.is_initialized():
            self.init_group(**kwargs)
        return self

    def create_group(self, **kwargs: Any) -> Self:
        """Makes the group that this owns; the group of all must be there.

        Raises:
            RuntimeError: it owns one already.
        """
        if self._group is not None:
            raise RuntimeError(f"`{type(self).__name__}` owns a group already. Destroy it first: `teardown()`.")
        self._group = self.new_group(**kwargs)
        return self

    def teardown(self) -> Self:
        """Ends the group that this owns.

        Raises:
            RuntimeError: it owns none.
        """
        if self._group is None:
            raise RuntimeError(f"`{type(self).__name__}` does not own a group that could be destroyed.")
        self.destroy_group(self._group)
        self._group = None
        return self


class SingleDeviceCollective(Collective):
    """One process, which has everything already.

    >>> SingleDeviceCollective().all_reduce(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    rank = property(lambda self: 0, doc="The index of this process.")
    world_size = property(lambda self: 1, doc="The number of processes.")

    def broadcast(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, **__: Any) -> list[Tensor]:
        return [tensor]

    def gather(self, tensor: Tensor, *_: Any, **__: Any) -> list[Tensor]:
        return [tensor]

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], *_: Any, **__: Any) -> Tensor:
        return scatter_list[0]

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], *_: Any, **__: Any) -> Tensor:
        return input_list[0]

    def all_to_all(
        self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], *_: Any, **__: Any
    ) -> list[Tensor]:
        return input_tensor_list

    def send(self, *_: Any, **__: Any) -> None: ...

    def recv(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def barrier(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def is_initialized(cls) -> bool:
        return True

    @classmethod
    def init_group(cls, **_: Any) -> None: ...

    @classmethod
    def new_group(cls, **_: Any) -> Any:
        return object()

    @classmethod
    def destroy_group(cls, group: Any) -> None: ...


class TorchCollective(Collective):
    """The collectives of `torch.distributed`. Without a group of its own, it is that of all processes.

    `setup` makes the group of all if nobody did, and then the last `teardown` ends it.

    Raises:
        RuntimeError: this build of torch has no `torch.distributed`.
    """

    manages_default_group: ClassVar[bool] = False  # did one of these objects make the group of all?
    addr_key = "MASTER_ADDR"
    port_key = "MASTER_PORT"

    def __init__(self) -> None:
        if not dist.is_available():
            raise RuntimeError("This build of torch has no `torch.distributed`. Use `SingleDeviceCollective`.")
        super().__init__()

    @property
    def group(self) -> ProcessGroup:
        """The group that this owns, or that of all."""
        if self._group is None:
            self._group = dist.GroupMember.WORLD
        return super().group

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        dist.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        dist.all_reduce(tensor, op=find_reduce_op(op), group=self.group)
        return tensor

    def reduce(self, tensor: Tensor, dst: int, op: ReduceOp = "sum") -> Tensor:
        dist.reduce(tensor, dst, op=find_reduce_op(op), group=self.group)
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        dist.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor], dst: int = 0) -> list[Tensor]:
        dist.gather(tensor, gather_list, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor], src: int = 0) -> Tensor:
        dist.scatter(tensor, scatter_list, src, group=self.group)
        return tensor

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: ReduceOp = "sum") -> Tensor:
        dist.reduce_scatter(output, input_list, op=find_reduce_op(op), group=self.group)
        return output

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        dist.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        dist.send(tensor, dst, tag=tag, group=self.group)

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        dist.recv(tensor, src, tag=tag, group=self.group)
        return tensor

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        """The objects of all, by rank, in the list; they are pickled."""
        dist.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        """The objects of process `src`, in the list; they travel over that device."""
        dist.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any], dst: int = 0) -> list[Any]:
        """The objects of all, by rank, in the list of process `dst`; others pass None."""
        dist.gather_object(obj, object_gather_list, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any], src: int = 0
    ) -> list[Any]:
        """The object that process `src` has for this one in its list, in the output list of one element."""
        dist.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list

    def barrier(self, device_ids: list[int] | None = None) -> None:
        if is_member(self.group):
            dist.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """`barrier` of gloo, with an error that names the processes that did not come in time.

        Arguments:
            timeout: how long to wait; by default that of the group.
            wait_all_ranks: name all of them, instead of the first.
        """
        dist.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    def setup(self, main_address: str | None = None, main_port: str | None = None, **kwargs: Any) -> Self:
        """Makes the group of all, unless this process is in it.

        Arguments:
            main_address: of rank 0, unless the environment says it.
            main_port: a free port there, unless the environment says it.
            kwargs: of `init_process_group`, such as ``backend`` and ``world_size``.
        """
        if self.is_initialized():
            return self
        wanted = {self.addr_key: main_address, self.port_key: main_port}
        added = {name: str(value) for name, value in wanted.items() if value is not None and name not in os.environ}
        os.environ.update(added)
        try:
            super().setup(**kwargs)
        finally:
            for name in added:
                os.environ.pop(name, None)
        TorchCollective.manages_default_group = True
        return self

    def teardown(self) -> Self:
        """Ends the group that this owns; with the last of them, the group of all, if `setup` made it."""
        belongs = is_member(self.group)
        super().teardown()
        if not TorchCollective.manages_default_group:
            return self
        world = dist.GroupMember.WORLD
        if world is None:
            TorchCollective.manages_default_group = False
        elif belongs and len(dist.distributed_c10d._world.pg_map) == 1:
            self.destroy_group(world)
            TorchCollective.manages_default_group = False
        return self

    @classmethod
    def is_available(cls) -> bool:
        return dist.is_available()

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.is_available() and dist.is_initialized()

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        dist.init_process_group(**kwargs)

    @classmethod
    def new_group(cls, **kwargs: Any) -> ProcessGroup:
        group: ProcessGroup = dist.new_group(**kwargs)
        return group

    @classmethod
    def destroy_group(cls, group: ProcessGroup) -> None:
        # A process outside of the group has another object in its place.
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def is_member(group: object) -> bool:
    """Is this process in a group? Others have a number in its place."""
    return group != dist.GroupMember.NON_GROUP_MEMBER


def find_reduce_op(op: ReduceOp) -> dist.ReduceOp | dist.ReduceOp.RedOpType:
    """Torch's operation of that name, or the operation itself.

    >>> find_reduce_op("max") == dist.ReduceOp.MAX
    True

    Raises:
        ValueError: there is none.
    """
    if isinstance(op, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        return op
    if not isinstance(op, str):
        raise ValueError(f"`op` must be the name of an operation, not a `{type(op).__name__}`. Use 'sum', for example.")
    found: dist.ReduceOp.RedOpType | None = vars(dist.ReduceOp).get(op.upper())
    if found is None:
        known = ", ".join(repr(name.lower()) for name in dist.ReduceOp.RedOpType.__members__)
        raise ValueError(f"`op={op!r}` is not an operation of `torch.distributed`. Use one of {known}.")
    return found
