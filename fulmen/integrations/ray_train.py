"""Ray Train: ranks, device and strategy of its workers, and the metrics and checkpoints that it wants from them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fulmen.callbacks.checkpointing import Checkpoint
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.collectives import is_initialized
from fulmen.engine.strategy import Strategy
from fulmen.metrics.values import fetch_numbers
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_info, set_rank

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

FILE = "checkpoint.ckpt"  # the one of `RayTrainReportCallback`, so that either resumes from the other's


def find_context() -> Any:
    """The `ray.train.TrainContext` of this worker; None in any other process. Imports nothing."""
    if "ray.train.v2.api.context" not in sys.modules:  # of the older Ray Train, or none at all
        return None
    try:
        return sys.modules["ray.train"].get_context()
    except Exception:  # a driver, or a function of Ray Tune, is told so by errors of many kinds
        return None


class RayTrainEnvironment(ClusterEnvironment):
    """Workers that Ray Train's `TorchTrainer` has started; the Trainer finds out by itself that it is in one.

    Examples:
        >>> RayTrainEnvironment.detect()  # here is none
        False
    """

    creates_processes_externally = property(lambda self: True)
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", "127.0.0.1"))
    main_port = property(lambda self: int(os.environ.get("MASTER_PORT", "0")))

    def __init__(self) -> None:
        context = find_context()
        if context is None:
            what = "`RayTrainEnvironment` is for functions that Ray Train (its second version) runs, and this is none."
            raise RuntimeError(f"{what} Leave it out, or start the function by `ray.train.torch.TorchTrainer`.")
        self._world_size = int(context.get_world_size())
        self._ranks = int(context.get_world_rank()), int(context.get_local_rank()), int(context.get_node_rank())
        self._workers_here = int(context.get_local_world_size())
        set_rank(self._ranks[0])

    @staticmethod
    def detect() -> bool:
        return find_context() is not None

    def world_size(self) -> int:
        return self._world_size

    def global_rank(self) -> int:
        return self._ranks[0]

    def local_rank(self) -> int:
        return self._ranks[1]

    def node_rank(self) -> int:
        return self._ranks[2]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if num_devices not in (1, self._workers_here):
            what = f"Ray Train started {self._workers_here} workers on this node, and `devices={num_devices}`."
            raise ValueError(f"{what} Leave `devices` and `num_nodes` out: `ScalingConfig(num_workers=...)` decides.")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if self._world_size > 1 and missing and not is_initialized():
            what = f"Ray Train started {self._world_size} workers that cannot meet: there is no process group, and"
            fix = "Start them by `ray.train.torch.TorchTrainer`, which prepares both."
            raise RuntimeError(f"{what} {' and '.join(missing)} not set. {fix}")


def join_ray_train(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments about the machine, completed in a worker of Ray Train; elsewhere as they are.

    Whoever says in `plugins` or `strategy` how processes find each other is left alone: so do Ray's own classes.

    Arguments:
        machine: `accelerator`, `devices`, `strategy`, `plugins` and others, by name.

    Raises:
        MisconfigurationException: for Ray's strategy for FSDP.
    """
    context = find_context()
    if context is None:
        return dict(machine)
    strategy = machine["strategy"]
    refuse_ray_fsdp(strategy)
    given = machine["plugins"]
    plugins = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if _knows_environment(strategy, plugins):
        return dict(machine)
    joined = {**machine, "plugins": [*plugins, RayTrainEnvironment()]}
    if strategy == "auto" and context.get_world_size() > 1:
        joined["strategy"] = "ddp"
    if machine["devices"] == "auto":
        device = import_optional("ray.train.torch", "in a worker of Ray Train").get_device()
        on_gpu = device.type == "cuda" and machine["accelerator"] in ("auto", "gpu", "cuda")
        joined["devices"] = [device.index or 0] if on_gpu else 1
    return joined


def _knows_environment(strategy: object, plugins: list[Any]) -> bool:
    """Did the user say how processes find each other?"""
    brought = isinstance(strategy, Strategy) and strategy.given_parts()["cluster_environment"] is not None
    return brought or any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)


def refuse_ray_fsdp(strategy: object) -> None:
    """Raises for `RayFSDPStrategy`, or a subclass of it."""
    kinds = type(strategy).__mro__
    if any(kind.__name__ == "RayFSDPStrategy" and kind.__module__.startswith("ray.") for kind in kinds):
        what = (
            "`RayFSDPStrategy` is written for `FullyShardedDataParallel`, the older wrapper of torch, and here models"
        )
        fix = "Use `Trainer(strategy='fsdp')` or `FSDPStrategy(...)`, without `RayLightningEnvironment` and"
        raise MisconfigurationException(
            f"{what} are sharded by `fully_shard`. {fix} `prepare_trainer`: ranks and devices of Ray Train are found."
        )


class RayTrainReport(Checkpoint):
    """Hands metrics and a checkpoint to Ray Train at the end of each epoch, and continues from the one it hands back.

    The Trainer adds it in a worker of Ray Train, in the place of a `ModelCheckpoint` of its own, unless the script uses
    Ray's classes for Lightning. Which checkpoints are kept, and where, is said in `ray.train.RunConfig`.
    """

    has_reported: ClassVar[bool] = False  # in this process: what Ray hands back is then of a fit that is over

    def __init__(self) -> None:
        self._opened = contextlib.ExitStack()  # the checkpoint that is handed back, until it is loaded

    def folders(self, trainer: Trainer) -> list[str]:
        return []

    def find_handed_back(self) -> str | None:
        checkpoint = None if self.has_reported else _ray_train().get_checkpoint()
        if checkpoint is None:
            return None
        self._opened.close()
        path = os.path.join(self._opened.enter_context(checkpoint.as_directory()), FILE)
        if not os.path.exists(path):
            what = f"Ray Train hands back {checkpoint.path!r} to continue from, which has no {FILE!r}: somebody else"
            raise FileNotFoundError(f"{what} reported it. Load it in your code, and pass `ckpt_path` to `fit`.")
        rank_zero_info(f"`Trainer.fit` continues from what Ray Train hands back: {checkpoint.path}.")
        return path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._opened.close()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # sync: once per epoch, for a report that is made of numbers
        metrics = fetch_numbers(trainer.callback_metrics)
        metrics |= {"epoch": trainer.current_epoch, "step": trainer.global_step}
        strategy = trainer.strategy
        folder = strategy.broadcast(tempfile.mkdtemp(prefix="fulmen-ray-") if trainer.is_global_zero else "")
        try:
            trainer.save_checkpoint(os.path.join(folder, FILE))
            strategy.finish_saving()
            has_part = trainer.local_rank == 0 and os.path.isdir(folder)
            ray_train = _ray_train()
            # All workers have to report, and go on when Ray has stored what one of them brought.
            checkpoint = ray_train.Checkpoint.from_directory(folder) if has_part else None
            ray_train.report(metrics, checkpoint=checkpoint)
            type(self).has_reported = True
        finally:
            if trainer.local_rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._opened.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._opened.close()


def _ray_train() -> Any:
    return import_optional("ray.train", "in a worker of Ray Train")
