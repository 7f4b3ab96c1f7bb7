"""Callbacks: plug-ins that run at given points of a run without being part of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "BackboneFinetuning", "BaseFinetuning", "BasePredictionWriter", "BatchSizeFinder", "Callback", "Checkpoint", "DeviceStatsMonitor",
    "EMAWeightAveraging", "EarlyStopping", "GradientAccumulationScheduler", "GradientNorm", "LambdaCallback",
    "LearningRateFinder", "LearningRateMonitor", "ModelCheckpoint", "ModelPruning", "ModelSummary", "NonFiniteError",
    "NonFiniteGuard",
    "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar", "RichProgressBarTheme",
    "SpikeDetection", "StochasticWeightAveraging", "TQDMProgressBar", "ThroughputMonitor", "Timer",
    "WeightAveraging",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.callbacks.batch_size_finder import BatchSizeFinder
    from fulmen.callbacks.callback import Callback
    from fulmen.callbacks.checkpointing import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
    from fulmen.callbacks.early_stopping import EarlyStopping
    from fulmen.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from fulmen.callbacks.lr_finder import LearningRateFinder
    from fulmen.callbacks.model_summary import ModelSummary, RichModelSummary
    from fulmen.callbacks.monitors import (
        DeviceStatsMonitor,
        GradientNorm,
        LearningRateMonitor,
        SpikeDetection,
        ThroughputMonitor,
    )
    from fulmen.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
    from fulmen.callbacks.prediction_writer import BasePredictionWriter, LambdaCallback
    from fulmen.callbacks.progress_bar import ProgressBar
    from fulmen.callbacks.pruning import ModelPruning
    from fulmen.callbacks.rich_bar import RichProgressBar, RichProgressBarTheme
    from fulmen.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
    from fulmen.callbacks.timer import GradientAccumulationScheduler, Timer
    from fulmen.callbacks.tqdm_bar import TQDMProgressBar
    from fulmen.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
else:
    __getattr__, __dir__ = lazy_exports(__name__)
