"""Small models and data that really train: for first steps, bug reports and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "BoringDataModule", "BoringModel", "DemoModel", "LightningLSTM", "LightningTransformer", "SequenceSampler",
    "SimpleLSTM", "Transformer", "WikiText2",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
    from fulmen.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
    from fulmen.demos.transformer import LightningTransformer, Transformer, WikiText2
else:
    __getattr__, __dir__ = lazy_exports(__name__)
