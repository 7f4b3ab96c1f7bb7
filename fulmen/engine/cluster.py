"""Who is who: how many processes there are, which one this is, and where they meet. Everything is read when asked."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
from abc import ABC, abstractmethod
from functools import cached_property

from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn

DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 12910


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

    def set_world_size(self, size: int) -> None:
        """The strategy's count; ignored where the environment knows it, as is the next."""

    def set_global_rank(self, rank: int) -> None: ...

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise if the Trainer's ``devices`` and ``num_nodes`` contradict what the environment started."""

    def teardown(self) -> None:
        """Called at the end of a run."""


class LightningEnvironment(ClusterEnvironment):
    """This process alone, or several that we start; or that the user did, with ``LOCAL_RANK`` set for each of them.

    On several nodes ``NODE_RANK`` (or ``GROUP_RANK``), ``MASTER_ADDR`` and ``MASTER_PORT`` must be set too.
    """

    def __init__(self) -> None:
        self._global_rank, self._world_size = 0, 1

    creates_processes_externally = property(lambda self: "LOCAL_RANK" in os.environ)
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", DEFAULT_ADDRESS))
    main_port = property(lambda self: _read("MASTER_PORT", self._free_port))
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
        return _read("LOCAL_RANK", 0)

    def node_rank(self) -> int:
        return _read("NODE_RANK", _read("GROUP_RANK", 0))


class _StartedElsewhere(ClusterEnvironment):
    """Processes of a scheduler that tells each of them its place in environment variables."""

    VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK")  # world size, global rank, local rank, node rank

    creates_processes_externally = property(lambda self: True)
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", DEFAULT_ADDRESS))
    main_port = property(lambda self: _read("MASTER_PORT", DEFAULT_PORT))

    def world_size(self) -> int:
        return _read(self.VARIABLES[0])

    def global_rank(self) -> int:
        return _read(self.VARIABLES[1])

    def local_rank(self) -> int:
        return _read(self.VARIABLES[2])

    def node_rank(self) -> int:
        return _read(self.VARIABLES[3], 0)


class TorchElasticEnvironment(_StartedElsewhere):
    """Processes started by `torchrun`."""

    detect = staticmethod(lambda: "TORCHELASTIC_RUN_ID" in os.environ)


class SLURMEnvironment(_StartedElsewhere):
    """Processes started by `srun` on a SLURM cluster; without ``requeue_signal``, SIGUSR1 says that time is over."""

    VARIABLES = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal or getattr(signal, "SIGUSR1", None)

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_NODELIST", DEFAULT_ADDRESS)
        return os.environ.get("MASTER_ADDR") or self.resolve_root_node_address(nodes)

    @property
    def main_port(self) -> int:
        # Made of the job's number, so that jobs on the same node do not meet.
        job = os.environ.get("SLURM_JOB_ID", "")
        return _read("MASTER_PORT", 15000 + int(job[-4:]) if job.isdigit() else DEFAULT_PORT)

    @staticmethod
    def detect() -> bool:
        """True under `srun`, but not in an interactive session (job name "bash" or "interactive")."""
        if "SLURM_NTASKS" not in os.environ and shutil.which("srun"):
            fix = f"To train in a SLURM job, put it in front: `srun python {' '.join(sys.argv)[:60]}`."
            rank_zero_warn(f"`srun` exists here, but did not start this process. {fix}", category=PossibleUserWarning)
        return "SLURM_NTASKS" in os.environ and not _interactive_slurm()

    job_name = staticmethod(lambda: os.environ.get("SLURM_JOB_NAME"))

    @staticmethod
    def job_id() -> int | None:
        """The job's number; None outside of jobs and in interactive sessions."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return int(job) if job.isdigit() and not _interactive_slurm() else None

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """The first host of a SLURM list: ``"gpu[07-09,12],login"`` gives ``"gpu07"``."""
        return re.split(r"[,\s]", re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes))[0]


def _interactive_slurm() -> bool:
    return SLURMEnvironment.job_name() in ("bash", "interactive")


def _read(variable: str, default: int | None = None) -> int:
    """A whole number from an environment variable."""
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        found = "is not set" if text is None else f"is {text!r}"
        fix = "Start the processes with the launcher, or pass `LightningEnvironment()` in `plugins`."
        raise RuntimeError(f"The environment variable {variable} {found}, where a number must be. {fix}")
    return int(text)
