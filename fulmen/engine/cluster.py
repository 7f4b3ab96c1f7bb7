"""Who is who: how many processes there are, which one this is, and where they meet. Everything is read when asked."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from functools import cached_property

from fulmen.utilities.rank_zero import rank_zero_only


class ClusterEnvironment(ABC):
    """What a scheduler or launcher tells its processes about each other. Subclass it for another one."""

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether the processes exist already, so that nobody here may start any."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """The host of rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """A free port on that host, the same for all processes."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Does this process run under this environment?"""

    @abstractmethod
    def world_size(self) -> int: ...

    @abstractmethod
    def global_rank(self) -> int: ...

    @abstractmethod
    def local_rank(self) -> int: ...

    @abstractmethod
    def node_rank(self) -> int: ...

    # The strategy's counts; ignored where the environment knows them.
    def set_world_size(self, size: int) -> None: ...
    def set_global_rank(self, rank: int) -> None: ...

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise if the Trainer's ``devices`` and ``num_nodes`` contradict what the environment started."""

    def teardown(self) -> None:
        """Called at the end of a run."""


class LightningEnvironment(ClusterEnvironment):
    """This process alone, or several that the user started, with ``LOCAL_RANK`` set for each of them.

    On several nodes ``NODE_RANK`` (or ``GROUP_RANK``), ``MASTER_ADDR`` and ``MASTER_PORT`` must be set too.
    """

    def __init__(self) -> None:
        self._global_rank, self._world_size = 0, 1

    creates_processes_externally = property(lambda self: "LOCAL_RANK" in os.environ)
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", "127.0.0.1"))
    main_port = property(lambda self: int(os.environ.get("MASTER_PORT") or self._free_port))
    detect = staticmethod(lambda: True)

    @cached_property
    def _free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        self._world_size = size

    def global_rank(self) -> int:
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    def node_rank(self) -> int:
        return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
