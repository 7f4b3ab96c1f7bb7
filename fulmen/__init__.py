"""fulmen: a training framework for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.compat.finder import serve_deep_paths
from fulmen.utilities.lazy import lazy_exports

__version__ = "0.1.0"

serve_deep_paths()

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Callback
    from fulmen.datamodule import LightningDataModule
    from fulmen.engine.sync_batchnorm import SyncBatchNorm
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.utilities.errors import disable_possible_user_warnings
    from fulmen.utilities.seed import seed_everything
