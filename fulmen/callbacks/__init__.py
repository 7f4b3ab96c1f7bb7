"""Callbacks: plug-ins that run at given points of a run without being part of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BackboneFinetuning": "fulmen.callbacks.finetuning",
        "BaseFinetuning": "fulmen.callbacks.finetuning",
        "BasePredictionWriter": "fulmen.callbacks.writing",
        "Callback": "fulmen.callbacks.callback",
        "Checkpoint": "fulmen.callbacks.checkpointing",
        "DeviceStatsMonitor": "fulmen.callbacks.monitors",
        "EarlyStopping": "fulmen.callbacks.early_stopping",
        "GradientAccumulationScheduler": "fulmen.callbacks.timing",
        "LambdaCallback": "fulmen.callbacks.writing",
        "LearningRateMonitor": "fulmen.callbacks.monitors",
        "ModelCheckpoint": "fulmen.callbacks.checkpointing",
        "ModelSummary": "fulmen.callbacks.model_summary",
        "OnExceptionCheckpoint": "fulmen.callbacks.checkpointing",
        "ProgressBar": "fulmen.callbacks.progress_bar",
        "RichModelSummary": "fulmen.callbacks.model_summary",
        "RichProgressBar": "fulmen.callbacks.rich_bar",
        "RichProgressBarTheme": "fulmen.callbacks.rich_bar",
        "SpikeDetection": "fulmen.callbacks.monitors",
        "TQDMProgressBar": "fulmen.callbacks.tqdm_bar",
        "ThroughputMonitor": "fulmen.callbacks.monitors",
        "Timer": "fulmen.callbacks.timing",
        "early_stopping": "fulmen.callbacks.early_stopping",
        "finetuning": "fulmen.callbacks.finetuning",
    },
)

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Callback
    from fulmen.callbacks.checkpointing import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
    from fulmen.callbacks.early_stopping import EarlyStopping
    from fulmen.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from fulmen.callbacks.model_summary import ModelSummary, RichModelSummary
    from fulmen.callbacks.monitors import DeviceStatsMonitor, LearningRateMonitor, SpikeDetection, ThroughputMonitor
    from fulmen.callbacks.progress_bar import ProgressBar
    from fulmen.callbacks.rich_bar import RichProgressBar, RichProgressBarTheme
    from fulmen.callbacks.timing import GradientAccumulationScheduler, Timer
    from fulmen.callbacks.tqdm_bar import TQDMProgressBar
    from fulmen.callbacks.writing import BasePredictionWriter, LambdaCallback
