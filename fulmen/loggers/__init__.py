"""Where a run's numbers go: files, TensorBoard, or a tracking service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["CSVLogger", "CometLogger", "LitLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]

if TYPE_CHECKING:
    from fulmen.loggers.comet import CometLogger
    from fulmen.loggers.csv_logs import CSVLogger
    from fulmen.loggers.litlogger import LitLogger
    from fulmen.loggers.logger import Logger
    from fulmen.loggers.mlflow import MLFlowLogger
    from fulmen.loggers.tensorboard import TensorBoardLogger
    from fulmen.loggers.wandb import WandbLogger
else:
    __getattr__, __dir__ = lazy_exports(__name__)
