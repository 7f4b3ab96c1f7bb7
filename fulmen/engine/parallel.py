"""`ParallelStrategy`: what strategies over several processes share: who is who, meeting, and the collectives."""

from __future__ import annotations

import os
import socket
from abc import ABC
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.engine import collectives
from fulmen.engine.accelerators import Accelerator
from fulmen.engine.cluster import ClusterEnvironment, LightningEnvironment
from fulmen.engine.launch import end_with_parent, signal_launcher
from fulmen.engine.precision import Precision
from fulmen.engine.process_launcher import ProcessLauncher
from fulmen.engine.script_launcher import ScriptLauncher
from fulmen.engine.strategy import Strategy
from fulmen.engine.sync_batchnorm import TorchSyncBatchNorm
from fulmen.storage.async_io import AsyncCheckpointIO
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.supervision.reports import mark_reported, report_mark, write_stderr
from fulmen.supervision.stack_sampler import error_location
from fulmen.supervision.watchdog import connect_watchdog, limit_seconds
from fulmen.utilities.errors import SIGTERMException, with_cause
from fulmen.utilities.introspection import alias_property, overrides_method
from fulmen.utilities.rank_zero import set_rank

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch.distributed import ProcessGroup, Store

    from fulmen.engine.collectives import ReduceOp
    from fulmen.engine.launch import ReportError
    from fulmen.engine.sync_batchnorm import LayerSync
    from fulmen.supervision.protocols import SupervisedRun
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import _PATH

T = TypeVar("T")


class ParallelStrategy(Strategy, ABC):
    """One process per device, each with the whole loop and a part of the data.

    Collectives must be called by all processes. Before the processes have met, and once this one is aborting because of
    an exception, they do nothing and give back what they got.

    Arguments:
        process_group_backend: "gloo", "nccl", ...; None takes what suits the device.
        timeout: how long a process waits for the others, when they meet and in each collective.
        start_method: "popen" runs the script again for each device; "spawn", "fork" and "forkserver" run only the call.
    """

    strategy_name = "parallel"

    def __init__(
        self, accelerator: Accelerator | None = None, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, checkpoint_io: CheckpointIO | None = None, precision_plugin: Precision | None = None,
        process_group_backend: str | None = None, timeout: timedelta | None = None, start_method: str = "popen",
    ) -> None:  # fmt: skip
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self._process_group_backend = process_group_backend
        self._start_method = start_method
        self._timeout = timedelta(minutes=30) if timeout is None else timeout
        self.num_nodes = 1
        self._layer_sync: LayerSync | None = None  # is applied while fitting
        self._layers_are_synced = False
        self.listener: socket.socket | None = None  # behind the main port, until the processes have met
        self.store: Store | None = None  # of this run, once they have
        self._stop_consensus: collectives.StopConsensus | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "store": None, "_stop_consensus": None}  # connections are of this process

    # ------------------------------------------------------------------ who is who

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        devices = self.parallel_devices or [torch.device("cpu")]
        # A scheduler may show each process its own device only.
        return devices[self.local_rank if len(devices) > 1 else 0]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or [None])

    @property
    def local_rank(self) -> int:  # type: ignore[override]
        """Index of this process on its node."""
        return 0 if self.cluster_environment is None else self.cluster_environment.local_rank()

    @property
    def node_rank(self) -> int:  # type: ignore[override]
        """Index of this node."""
        return 0 if self.cluster_environment is None else self.cluster_environment.node_rank()

    @property
    def global_rank(self) -> int:  # type: ignore[override]
        """Index of this process over all nodes."""
        return 0 if self.cluster_environment is None else self.cluster_environment.global_rank()

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """Processes over all nodes."""
        return 1 if self.cluster_environment is None else self.cluster_environment.world_size()

    is_distributed = True

    layer_sync: LayerSync | None = alias_property("_layer_sync", "Synchronises layers while fitting.")
    start_method: str = alias_property("_start_method", "How the processes start.")
    timeout: timedelta = alias_property("_timeout", "How long a process waits for the others.")

    @property
    def process_group_backend(self) -> str:
        """What connects the processes."""
        return self._get_process_group_backend()

    def _get_process_group_backend(self) -> str:
        """The one that was asked for, or what suits the device."""
        return self._process_group_backend or collectives.backend_for(self.root_device)

    @property
    def forbids_inference_tensors(self) -> bool:  # type: ignore[override]
        """Gloo writes into tensors outside of inference mode."""
        return self.process_group_backend == "gloo"

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of a sampler for this process's part of the data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Tells the environment what follows from the devices; it may know better."""
        cluster: Any = self.cluster_environment
        cluster.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        cluster.set_world_size(self.num_nodes * self.num_processes)
        set_rank(self.global_rank)

    def use_nodes(self, num_nodes: int, layer_sync: LayerSync | None) -> None:
        """How many machines there are, and what synchronises layers over them while fitting."""
        self.num_nodes = num_nodes
        self._layer_sync = layer_sync

    def _configure_launcher(self) -> None:
        """Chooses who starts the processes; nobody if they exist."""
        cluster: Any = self.cluster_environment
        cluster.validate_settings(self.num_processes, self.num_nodes)
        self.set_world_ranks()
        end_with_parent()
        if cluster.creates_processes_externally:
            self._launcher = None
        elif self._start_method == "popen":
            self._launcher = ScriptLauncher(self)
        else:
            self._launcher = ProcessLauncher(self, self._start_method)

    def open_rendezvous(self) -> dict[str, str]:
        """The environment variables by which the processes that are started now find each other.

        Unless the user or an environment of theirs chose it, the port is one that this process holds until rank 0
        listens there.
        """
        cluster: Any = self.cluster_environment
        is_free = (
            isinstance(cluster, LightningEnvironment) and type(cluster).main_port is LightningEnvironment.main_port
        )
        if cluster.node_rank() == 0 and is_free and "MASTER_PORT" not in os.environ:
            # Processes that are earlier than rank 0 wait in its queue.
            self.listener = socket.create_server(("" if "MASTER_ADDR" in os.environ else cluster.main_address, 0))
            port = self.listener.getsockname()[1]
        else:
            port = cluster.main_port
        return {
            "MASTER_ADDR": cluster.main_address,
            "MASTER_PORT": str(port),
            "NODE_RANK": str(cluster.node_rank()),
            "WORLD_SIZE": str(self.world_size),
        }

    def take_listener(self) -> socket.socket | None:
        """The socket behind the main port, if this process holds it; whoever takes it closes it."""
        listener = self.listener
        self.listener = None
        return listener

    def enter_child(self, listener: socket.socket | None, report_to_parent: ReportError) -> None:
        """In a process that a launcher started for this strategy: nothing more is launched here."""
        self._launcher = None
        self.listener = listener
        self.report_to_parent = report_to_parent
        self.set_world_ranks()

    # ------------------------------------------------------------------ life

    def setup_environment(self) -> None:
        super().setup_environment()
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Meets the other processes."""
        self.set_world_ranks()
        cluster: Any = self.cluster_environment
        listener = self.take_listener()
        self.store = collectives.init_group(cluster, self.process_group_backend, self._timeout, listener)
        self.aborting = False
        self._stop_consensus = None

    def setup(self, trainer: Trainer) -> None:
        # In one process, statistics of batch norm are complete as they are; what others synchronise is not known.
        needed = self.world_size > 1 or type(self._layer_sync) is not TorchSyncBatchNorm
        if self._layer_sync is not None and trainer.state.fn == "fit" and needed:
            self.model = self._layer_sync.apply(self.model)
            self._layers_are_synced = True
        super().setup(trainer)

    def teardown(self) -> None:
        self.model = self._lightning_module
        self.buffers = None
        if self._layer_sync is not None and self._layers_are_synced:
            self.model = self._lightning_module = self._layer_sync.revert(self.model)
            self._layers_are_synced = False
        super().teardown()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    def start_watchdog(self, run: SupervisedRun) -> None:
        limit_s = limit_seconds(self.watchdog_timeout_s)
        if self.world_size > 1 and self.store is not None and self.cluster_environment is not None and limit_s > 0:
            children = self.launcher if isinstance(self.launcher, ScriptLauncher) else None
            address = self.cluster_environment.main_address
            self.watchdog = connect_watchdog(self, run, children, self.store, address, limit_s)

    def abort(self, error: BaseException) -> BaseException:
        """The same; a process that leaves the others by `sys.exit(0)` fails, as they do."""
        error = super().abort(error)
        if self.world_size > 1 and isinstance(error, SystemExit) and not isinstance(error, SIGTERMException):
            if report_mark(error) is None:  # the processes have not met
                write_stderr(f"Rank {self.global_rank} failed at {error_location(error)}: SystemExit: {error.code}")
            if not error.code:
                error = with_cause(SystemExit(1), error)
            mark_reported(error)
        return error

    def model_to_device(self) -> None:
        self.model.to(self.root_device)

    def agree_to_stop(self, batch_position: tuple[int, int]) -> bool:
        """A signal came: does the run end here? In all processes together; else this one is `aborting` alone."""
        if self.world_size == 1 or self.store is None:
            return True
        if self._stop_consensus is None:
            signal_launcher()
            if isinstance(self.launcher, ScriptLauncher):
                self.launcher.signal_children()
            store = dist.PrefixStore("end", self.store)
            self._stop_consensus = collectives.StopConsensus(store, self.global_rank, self.world_size)
        all_stop = self._stop_consensus.agree(batch_position)
        try:
            if all_stop:
                self.barrier("end")  # all have heard of it before the store may go away
        except RuntimeError:
            all_stop = None
        self.aborting = all_stop is None
        return all_stop is not False

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Inside, gradients are not exchanged between processes."""
        with self.no_backward_sync(self.model):
            yield

    # ------------------------------------------------------------------ buffers

    def use_rank_zero_buffers(self) -> None:
        if self.buffers is not None and self.group_ready:
            self.buffers.use_rank_zero()

    def restore_own_buffers(self) -> None:
        if self.buffers is not None:
            self.buffers.restore_own()

    def on_train_end(self) -> None:
        """The caller gets those of rank 0, as a checkpoint does."""
        if self.buffers is not None and self.group_ready:
            self.buffers.broadcast()

    # ------------------------------------------------------------------ collectives

    @property
    def group_ready(self) -> bool:
        """Whether the process group can be used. Raises a RuntimeError while collectives are blocked."""
        if self.collectives_blocked_reason is not None and not self.aborting:
            raise RuntimeError(self.collectives_blocked_reason)
        return not self.aborting and collectives.is_initialized()

    def barrier(self, name: str | None = None) -> None:
        if self.group_ready:
            device = self.root_device
            dist.barrier(device_ids=[device.index] if dist.get_backend() == "nccl" else None)

    def barrier_without_timeout(self, name: str) -> None:
        if self.group_ready:
            assert self.store is not None
            if self.store.add(name, 1) == self.world_size:
                self.store.set(f"{name}/all", "here")
            self.store.wait([f"{name}/all"], timedelta(days=30))

    def broadcast(self, obj: T, src: int = 0) -> T:
        if not self.group_ready or self.world_size == 1:
            return obj
        carried: list[T] = [obj]
        dist.broadcast_object_list(carried, src, device=collectives.comm_device(self.root_device))
        return carried[0]

    def exchange_objects(self, obj: T) -> list[T]:
        if self.group_ready:
            return collectives.all_gather_objects(obj, self.root_device)
        # A class with collectives of its own needs no process group of torch.
        own = not self.aborting and overrides_method(self, "broadcast", ParallelStrategy)
        return super().exchange_objects(obj) if own else [obj]

    def reduce(
        self, tensor: Tensor | Any, group: ProcessGroup | None = None, reduce_op: ReduceOp | None = "mean"
    ) -> Any:
        if not isinstance(tensor, Tensor) or not self.group_ready:
            return tensor
        return collectives.all_reduce_tensor(tensor, self.root_device, group, reduce_op or "sum")

    def all_gather(self, tensor: Tensor, group: ProcessGroup | None = None, sync_grads: bool = False) -> Tensor:
        if not self.group_ready:
            return tensor.unsqueeze(0)
        return collectives.all_gather_tensor(tensor, self.root_device, group, sync_grads)

    def check_equal_shapes(self, tensors: list[Tensor], group: ProcessGroup | None = None) -> None:
        """Raises a RuntimeError on all processes if they would gather tensors of different shapes."""
        every = (
            collectives.all_gather_objects([tuple(t.shape) for t in tensors], self.root_device, group)
            if self.group_ready
            else []
        )
        if any(shapes != every[0] for shapes in every):
            shown = ", ".join(f"{shapes} on rank {rank}" for rank, shapes in enumerate(every))
            what = f"`self.all_gather` received tensors of different shapes: {shown}. Evaluation is not padded."
            raise RuntimeError(f"{what} Gather sums and counts, or use a metric, or `dist.all_gather_object`.")

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not self.group_ready:
            return decision
        num_true = int(collectives.all_reduce_tensor(torch.tensor(int(decision)), self.root_device, op="sum"))
        return num_true == self.world_size if all else num_true > 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint on rank 0; if that fails, all processes raise, so that none waits for the others."""
        write = super().save_checkpoint
        self.on_rank_zero(
            lambda: write(checkpoint, filepath, storage_options), f"write the checkpoint {str(filepath)!r}"
        )

    def finish_saving(self) -> None:
        """The same, and an error is one of all processes."""
        if isinstance(self.checkpoint_io, AsyncCheckpointIO):
            self.on_rank_zero(super().finish_saving, "write a checkpoint in the background")
