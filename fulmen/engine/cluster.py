"""Who is who: how many processes there are, which one this is, and where they meet. Everything is read when asked."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn, set_rank

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 12910
# Set by the launchers of Open MPI, MPICH and Intel MPI, MVAPICH, and PMIx.
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_RANK")


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
    def world_size(self) -> int:
        """The number of processes on all nodes."""

    @abstractmethod
    def global_rank(self) -> int:
        """The index of this process among all."""

    @abstractmethod
    def local_rank(self) -> int:
        """The index of this process on its node."""

    @abstractmethod
    def node_rank(self) -> int:
        """The index of this node."""

    def set_world_size(self, size: int) -> None:
        """What the strategy counted; ignored where the environment knows it."""

    def set_global_rank(self, rank: int) -> None:
        """What the strategy counted; ignored where the environment knows it."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raises if the Trainer's ``devices`` and ``num_nodes`` contradict what the environment started."""

    def teardown(self) -> None:
        """Called at the end of a run."""


class LightningEnvironment(ClusterEnvironment):
    """This process alone, or several that we start; or that the user did, with ``LOCAL_RANK`` set for each of them.

    On several nodes ``NODE_RANK`` (or ``GROUP_RANK``), ``MASTER_ADDR`` and ``MASTER_PORT`` must be set too.
    """

    def __init__(self) -> None:
        self._global_rank = 0
        self._world_size = 1

    creates_processes_externally = property(lambda self: "LOCAL_RANK" in os.environ)
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", DEFAULT_ADDRESS))
    main_port = property(lambda self: _read_int("MASTER_PORT", self._free_port))
    detect = staticmethod(lambda: True)

    @cached_property
    def _free_port(self) -> int:
        return free_port()

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        self._world_size = size

    def global_rank(self) -> int:
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank
        set_rank(rank)

    def local_rank(self) -> int:
        return _read_int("LOCAL_RANK", 0)

    def node_rank(self) -> int:
        return _read_int("NODE_RANK", _read_int("GROUP_RANK", 0))

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if type(self).world_size is not LightningEnvironment.world_size:
            return  # it knows its processes by other means, and is asked for every number
        if self.creates_processes_externally and "WORLD_SIZE" in os.environ:
            _check_world_size(num_devices, num_nodes, _read_int("WORLD_SIZE"), "WORLD_SIZE says that somebody")
        for name, rank, count, argument in (
            ("LOCAL_RANK", self.local_rank(), num_devices, "devices"),
            ("NODE_RANK", self.node_rank(), num_nodes, "num_nodes"),
        ):
            if rank >= count:
                what = f"This process has {name}={rank}, but with `{argument}={count}` the last one is {count - 1}"
                raise ValueError(f"{what}. Use `Trainer({argument}=...)` for what was started, or unset {name}.")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if num_nodes > 1 and missing and type(self).main_address is LightningEnvironment.main_address:
            what = f"`num_nodes={num_nodes}`, but {' and '.join(missing)} of rank 0 are not set on this node"
            fix = "Start the script with `torchrun --nnodes ...`, or set them and NODE_RANK on every node."
            raise ValueError(f"{what}, so the nodes would not find each other. {fix}")


class RankVariables(NamedTuple):
    """Names of the environment variables in which a scheduler tells a process its place; empty where there is none."""

    world_size: str
    global_rank: str
    local_rank: str
    node_rank: str


class _ExternalEnvironment(ClusterEnvironment):
    """Processes of a scheduler that tells each of them its place in environment variables."""

    STARTER = ""  # what started them, for messages
    VARIABLES = RankVariables("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK")

    creates_processes_externally = property(lambda self: True)
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", DEFAULT_ADDRESS))
    main_port = property(lambda self: _read_int("MASTER_PORT", DEFAULT_PORT))

    def world_size(self) -> int:
        return _read_int(self.VARIABLES.world_size)

    def global_rank(self) -> int:
        return _read_int(self.VARIABLES.global_rank)

    def local_rank(self) -> int:
        return _read_int(self.VARIABLES.local_rank)

    def node_rank(self) -> int:
        return _read_int(self.VARIABLES.node_rank, 0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        _check_world_size(num_devices, num_nodes, self.world_size(), self.STARTER)


class TorchElasticEnvironment(_ExternalEnvironment):
    """Processes started by `torchrun`."""

    STARTER = "`torchrun`"
    detect = staticmethod(lambda: "TORCHELASTIC_RUN_ID" in os.environ)


class SLURMEnvironment(_ExternalEnvironment):
    """Processes started by `srun` on a SLURM cluster; without ``requeue_signal``, SIGUSR1 says that time is over."""

    STARTER = "`srun`"
    VARIABLES = RankVariables("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal or vars(signal).get("SIGUSR1")  # not on Windows

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_NODELIST", DEFAULT_ADDRESS)
        return os.environ.get("MASTER_ADDR") or self.resolve_root_node_address(nodes)

    @property
    def main_port(self) -> int:
        return _read_int("MASTER_PORT", _port_for_job(os.environ.get("SLURM_JOB_ID", ""), 15000))

    @staticmethod
    def detect() -> bool:
        """True under `srun`, but not in an interactive session (job name "bash" or "interactive")."""
        if "SLURM_NTASKS" not in os.environ and shutil.which("srun"):
            fix = f"To train in a SLURM job, put it in front: `srun python {' '.join(sys.argv)[:60]}`."
            rank_zero_warn(f"`srun` exists here, but did not start this process. {fix}", category=PossibleUserWarning)
        return "SLURM_NTASKS" in os.environ and not _is_interactive_slurm()

    job_name = staticmethod(lambda: os.environ.get("SLURM_JOB_NAME"))

    @staticmethod
    def job_id() -> int | None:
        """The job's number; None outside of jobs and in interactive sessions."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return int(job) if job.isdigit() and not _is_interactive_slurm() else None

    def requeue(self) -> None:
        """Puts the job back into the queue; of an array only this task. Failing is said, and no more: the run is over."""
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = os.environ.get("SLURM_JOB_ID", "")
        command = ["scontrol", "requeue", f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            rank_zero_info(f"Requeued the SLURM job {command[-1]}.")
        except (OSError, subprocess.SubprocessError) as error:
            said = str((error.stderr if isinstance(error, subprocess.CalledProcessError) else "") or error).strip()
            rank_zero_warn(f"The SLURM job was not requeued, `{' '.join(command)}` failed: {said} Start it again.")

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if "SLURM_NTASKS_PER_NODE" not in os.environ and "SLURM_NTASKS" in os.environ and self.world_size() > 1:
            what = f"`srun --ntasks={self.world_size()}` does not say how many processes run on each node."
            raise RuntimeError(f"{what} Use `#SBATCH --ntasks-per-node={num_devices}` instead.")
        for name, variable, given in (
            ("devices", "SLURM_NTASKS_PER_NODE", num_devices),
            ("num_nodes", "SLURM_NNODES", num_nodes),
        ):
            if (started := _read_int(variable, given)) != given:
                flag = "--ntasks-per-node" if name == "devices" else "--nodes"
                what = f"SLURM was asked for `{flag}={started}`, but the Trainer for `{name}={given}`"
                raise ValueError(f"{what}. Use `Trainer({name}={started})`, or `#SBATCH {flag}={given}`.")

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """The first host of a SLURM list.

        >>> SLURMEnvironment.resolve_root_node_address("gpu[07-09,12],login")
        'gpu07'
        """
        return re.split(r"[,\s]", re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes))[0]


class LSFEnvironment(_ExternalEnvironment):
    """Processes started by `jsrun` on an LSF cluster; the hosts are read from the file ``LSB_DJOB_RANKFILE`` names."""

    STARTER = "`jsrun`"
    VARIABLES = RankVariables("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "")
    NEEDED = ("LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE")

    main_address = property(lambda self: self._hosts[0])
    main_port = property(lambda self: _read_int("MASTER_PORT", _port_for_job(os.environ.get("LSB_JOBID", ""), 10000)))
    detect = staticmethod(lambda: all(name in os.environ for name in LSFEnvironment.NEEDED))

    @cached_property
    def _hosts(self) -> list[str]:
        """Each host once, in their order, without the one that only launches."""
        path = os.environ.get("LSB_DJOB_RANKFILE", "")
        try:
            with open(path) as file:
                hosts = list(dict.fromkeys(file.read().split()))[1:]
        except OSError as error:
            raise ValueError(f"The list of hosts in LSB_DJOB_RANKFILE={path!r} cannot be read: {error}.") from error
        if not hosts:
            raise ValueError(f"LSB_DJOB_RANKFILE={path!r} lists no host besides the one that launches.")
        return hosts

    def node_rank(self) -> int:
        return self._hosts.index(socket.gethostname())


class MPIEnvironment(ClusterEnvironment):
    """Processes started by `mpirun` or the like; needs `mpi4py`."""

    creates_processes_externally = property(lambda self: True)

    @staticmethod
    def detect() -> bool:
        """True with several MPI processes. MPI is started only if a variable of its launchers says so."""
        if not any(name in os.environ for name in MPI_VARIABLES) or not is_installed("mpi4py"):
            return False
        return int(import_optional("mpi4py.MPI", "under MPI").COMM_WORLD.Get_size()) > 1

    @cached_property
    def _world(self) -> Any:
        return import_optional("mpi4py.MPI", "for `MPIEnvironment`").COMM_WORLD

    @cached_property
    def _hosts(self) -> list[str]:
        return list(self._world.allgather(socket.gethostname()))

    @cached_property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR") or self._hosts[0]

    @cached_property
    def main_port(self) -> int:
        return int(self._world.bcast(_read_int("MASTER_PORT", free_port()), root=0))

    def world_size(self) -> int:
        return int(self._world.Get_size())

    def global_rank(self) -> int:
        return int(self._world.Get_rank())

    def local_rank(self) -> int:
        return self._hosts[: self.global_rank()].count(socket.gethostname())

    def node_rank(self) -> int:
        return list(dict.fromkeys(self._hosts)).index(socket.gethostname())

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        _check_world_size(num_devices, num_nodes, self.world_size(), "MPI")


class KubeflowEnvironment(_ExternalEnvironment):
    """One process per pod of a Kubeflow `PyTorchJob`. Never detected: pass it in ``plugins``."""

    STARTER = "Kubeflow"
    VARIABLES = RankVariables("WORLD_SIZE", "RANK", "", "RANK")

    @staticmethod
    def detect() -> bool:
        raise NotImplementedError("Kubeflow cannot be detected. Pass `plugins=[KubeflowEnvironment()]`.")

    def local_rank(self) -> int:
        return 0


def detect_environment() -> ClusterEnvironment:
    """The first environment that recognises itself."""
    kinds: tuple[type[ClusterEnvironment], ...] = (
        TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment, LightningEnvironment,
    )  # fmt: skip
    return next(kind for kind in kinds if kind.detect())()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _is_interactive_slurm() -> bool:
    return SLURMEnvironment.job_name() in ("bash", "interactive")


def _port_for_job(job: str, base: int) -> int:
    """Made of the job's number, so that jobs on the same node do not meet."""
    return base + int(job[-4:]) if job.isdigit() else DEFAULT_PORT


def _check_world_size(num_devices: int, num_nodes: int, started: int, starter: str) -> None:
    if num_devices * num_nodes != started:
        what = f"{starter} started {started} processes, but the Trainer is made for {num_devices * num_nodes}"
        why = f"(`devices={num_devices}` on each of `num_nodes={num_nodes}`)"
        fix = "Make both the same, for example `Trainer(devices=processes per node, num_nodes=nodes)`."
        raise ValueError(f"{what} {why}. {fix}")


def _read_int(variable: str, default: int | None = None) -> int:
    """A whole number from an environment variable."""
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        found = "is not set" if text is None else f"is {text!r}"
        fix = "Start the processes with the launcher, or pass `LightningEnvironment()` in `plugins`."
        raise RuntimeError(f"The environment variable {variable} {found}, where a number must be. {fix}")
    return int(text)
