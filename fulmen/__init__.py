"""fulmen: a training framework for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.compat.finder import serve_deep_paths
from fulmen.utilities.lazy import lazy_exports

__version__ = "0.1.0"

serve_deep_paths()

__all__ = [
    "LIGHTNING_LOGO", "Callback", "Fabric", "LightningDataModule", "LightningModule", "SyncBatchNorm", "Trainer",
    "cli_lightning_logo", "disable_possible_user_warnings", "seed_everything",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen import accelerators as accelerators
    from fulmen import callbacks as callbacks
    from fulmen import cli as cli
    from fulmen import demos as demos
    from fulmen import fabric as fabric
    from fulmen import loggers as loggers
    from fulmen import plugins as plugins
    from fulmen import profilers as profilers
    from fulmen import serve as serve
    from fulmen import strategies as strategies
    from fulmen import tuner as tuner
    from fulmen import utilities as utilities
    from fulmen.callbacks.callback import Callback
    from fulmen.datamodule import LightningDataModule
    from fulmen.engine.sync_batchnorm import SyncBatchNorm
    from fulmen.fabric.fabric import Fabric
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.utilities.console import LIGHTNING_LOGO, cli_lightning_logo
    from fulmen.utilities.errors import disable_possible_user_warnings
    from fulmen.utilities.seed import seed_everything
else:
    __getattr__, __dir__ = lazy_exports(__name__)
