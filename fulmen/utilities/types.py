"""Type names for annotations, and the small enumerations and records shared by all layers."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, SupportsFloat, TypedDict, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_PATH = str | os.PathLike[str]

STEP_OUTPUT = Tensor | Mapping[str, Any] | None
# A `training_step` that is a generator yields one loss for each optimizer.
TRAINING_STEP_OUTPUT = STEP_OUTPUT | Generator[Any, Any, Any]
# The names that arguments of the Trainer accept beside objects; names that users register are passed on as they are.
AcceleratorName = Literal["auto", "cpu", "gpu", "cuda", "mps"]
StrategyName = Literal[
    "auto", "single_device", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false",
    "ddp_spawn", "ddp_spawn_find_unused_parameters_true", "ddp_spawn_find_unused_parameters_false",
    "ddp_fork", "ddp_fork_find_unused_parameters_true", "ddp_fork_find_unused_parameters_false",
    "ddp_notebook", "ddp_notebook_find_unused_parameters_true", "ddp_notebook_find_unused_parameters_false",
    "fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload",
    "deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme",
]  # fmt: skip
PrecisionName = Literal[
    "32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed",
    "transformer-engine", "transformer-engine-float16",
]  # fmt: skip
PrecisionInput = PrecisionName | Literal[64, 32, 16, "64", "32", "16", "bf16"]
ProfilerName = Literal["simple", "advanced", "pytorch", "xla"]
ClipAlgorithmName = Literal["norm", "value"]

# Types of numbers by the names that they have in torch.
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

# One iterable of batches, or any nesting of lists, tuples and dicts of them, which are iterables, too.
TRAIN_DATALOADERS = Iterable[Any]
EVAL_DATALOADERS = Iterable[Any]


@runtime_checkable
class Stateful(Protocol):
    """What has a state that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain types and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned."""


class MetricLike(Protocol):
    """What `self.log` takes besides numbers: a `torchmetrics.Metric`, which knows how to reduce itself."""

    def compute(self) -> Any:
        """The value over all batches so far."""

    def reset(self) -> None:
        """Forgets them."""


LoggedValue = Tensor | SupportsFloat | MetricLike
ReduceName = Literal["mean", "sum", "min", "max"]

LRSchedulerTypeUnion = LRScheduler | ReduceLROnPlateau
LRSchedulerPLType = LRSchedulerTypeUnion


# The distance from 1.0 to the next number of that type.
FLOAT16_EPSILON = torch.finfo(torch.float16).eps
FLOAT32_EPSILON = torch.finfo(torch.float32).eps
FLOAT64_EPSILON = torch.finfo(torch.float64).eps


class LightningEnum(str, Enum):
    """String enumeration whose members equal their value in any case: ``TrainerFn.FITTING == "fit" == "Fit"``."""

    def __eq__(self, other: object) -> bool:
        other = other.value if isinstance(other, Enum) else other
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())


class GradClipAlgorithmType(LightningEnum):
    """How gradients are clipped: each element to a value, or all together to a norm."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Is it the value of a member?"""
        return val in GradClipAlgorithmType.supported_types()

    @staticmethod
    def supported_types() -> list[str]:
        """The values of all members."""
        return [member.value for member in GradClipAlgorithmType]


class TrainerStatus(LightningEnum):
    """Where the Trainer is between being made and being done."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Has the run ended, in one way or the other?

        Examples:
            >>> [status.stopped for status in TrainerStatus]
            [False, False, True, True]
        """
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class TrainerFn(LightningEnum):
    """The verb the user called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(LightningEnum):
    """What runs at this moment; ``fit`` trains, validates and checks sanity."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Does it measure instead of learn?"""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """The first word of the hook that gives the loader: ``val`` in ``val_dataloader``."""
        return "val" if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING) else self.value


@dataclass
class TrainerState:
    """What the Trainer is doing: how far it is, which verb was called, and what runs right now."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    def begin_run(self, fn: TrainerFn, stage: RunningStage) -> None:
        """A verb was called."""
        self.fn = fn
        self.stage = stage
        self.status = TrainerStatus.RUNNING

    def end_run(self, status: TrainerStatus) -> None:
        """Nothing runs any more."""
        self.status = status
        self.stage = None

    @property
    def finished(self) -> bool:
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        return self.status.stopped


@dataclass
class LRSchedulerConfig:
    """A learning-rate scheduler of a run and when to step it.

    Attributes:
        scheduler: an object with `step`, `state_dict` and `load_state_dict`.
        name: under which `LearningRateMonitor` logs its rates.
        interval: what is counted: "epoch", or the optimizer's "step".
        frequency: after how many of them it is stepped.
        reduce_on_plateau: whether it is stepped with the value of `monitor`.
        monitor: the name of a logged metric.
        strict: whether a metric that was not logged is an error, or only a warning.
    """

    scheduler: LRSchedulerTypeUnion
    name: str | None = None
    interval: Literal["epoch", "step"] = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


class _LRSchedulerConfigRequired(TypedDict):
    scheduler: LRSchedulerTypeUnion | Stateful


class LRSchedulerConfigType(_LRSchedulerConfigRequired, total=False):
    """What `configure_optimizers` may give for a scheduler, with the keys of `LRSchedulerConfig`; one is required."""

    name: str | None
    interval: Literal["epoch", "step"]
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """The dictionary `configure_optimizers` may return without a scheduler."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(OptimizerConfig, total=False):
    """The dictionary `configure_optimizers` may return with a scheduler.

    `monitor` belongs to a `ReduceLROnPlateau` that is given without a dictionary of its own.
    """

    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType | None
    monitor: str | None


# What `configure_optimizers` may return: an optimizer; optimizers; optimizers and schedulers; a dictionary or several;
# or None to train without an optimizer.
OptimizerLRScheduler = (
    Optimizer
    | Sequence[Optimizer | OptimizerLRSchedulerConfig]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfigType]]
    | OptimizerLRSchedulerConfig
    | None
)
