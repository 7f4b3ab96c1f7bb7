"""The command line: a program with `fit`, `validate`, `test` and `predict` out of a module's and a datamodule's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports
from fulmen.utilities.optional import import_optional

import_optional("jsonargparse", "for a command line", ">=4.41", extra="cli")

__all__ = [
    "ArgsType", "LRSchedulerCallable", "LRSchedulerTypeTuple", "LRSchedulerTypeUnion", "LightningArgumentParser",
    "LightningCLI", "OptimizerCallable", "ReduceLROnPlateau", "SaveConfigCallback", "instantiate_class",
    "instantiate_module",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.checkpoint.rebuild import instantiate_module
    from fulmen.cli.classes import instantiate_class
    from fulmen.cli.lightning_cli import LightningCLI
    from fulmen.cli.parser import LightningArgumentParser
    from fulmen.cli.save_config import SaveConfigCallback
    from fulmen.cli.types import (
        ArgsType,
        LRSchedulerCallable,
        LRSchedulerTypeTuple,
        LRSchedulerTypeUnion,
        OptimizerCallable,
        ReduceLROnPlateau,
    )
else:
    __getattr__, __dir__ = lazy_exports(__name__)
