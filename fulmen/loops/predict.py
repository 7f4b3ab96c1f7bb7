"""Predict: every batch through `predict_step`, the results kept or handed to a writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fulmen.data.combined import CombinedLoader
from fulmen.data.feed import Feed
from fulmen.data.loaders import IndexRecorder
from fulmen.loops.evaluate import check_loader_argument
from fulmen.loops.loading import batch_transfer, bound_step, prepared_loaders, profiled_fetch
from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.introspection import num_positional
from fulmen.utilities.modules import capture_modes
from fulmen.utilities.rank_zero import WarningCache

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

_warnings = WarningCache()


class PredictionLoop:
    """One pass over the loaders of `trainer.predict`."""

    inside_fit = False

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.return_predictions = True
        self.loaders: CombinedLoader | None = None
        self.given_loaders: Any = None
        self.feed: Feed | None = None
        self.max_batches: list[float] = []
        self.predictions: list[list[Any]] = []
        self.current_batch_indices: list[int] = []
        self.epoch_batch_indices: list[list[list[int]]] = []

    # ------------------------------------------------------------------ the story

    def run(self) -> list[Any] | None:
        """All loaders. Returns one list of outputs per batch (one such list per loader if there are several)."""
        trainer = self.trainer
        with torch.inference_mode() if trainer.inference_mode else torch.no_grad():
            self.load_data()
            if self.loaders is None or sum(self.max_batches) == 0:
                return []
            self.start()
            assert self.feed is not None
            for batch, batch_idx, dataloader_idx in self.feed:
                self.run_batch(batch, batch_idx, dataloader_idx)
            return self.finish()

    def run_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """One batch."""
        book, hooks = self.trainer.book, self.hooks
        place = (batch, batch_idx, dataloader_idx) if self.several else (batch, batch_idx)
        self.record_indices(batch_idx, dataloader_idx)
        hooks.on_predict_batch_start(*place)
        book.hook = "predict_step"
        if self.context is None:
            outputs = self.step(*place[: self.num_arguments])
        else:
            with self.context():
                outputs = self.step(*place[: self.num_arguments])
        if outputs is None:
            _warnings.warn("`predict_step` returned `None`; return the predictions to get them back.")
        book.hook = None
        hooks.on_predict_batch_end(outputs, *place)
        if self.keep:
            # sync: results leave the device, or they would fill its memory
            self.predictions[dataloader_idx].append(apply_to_collection(outputs, torch.Tensor, torch.Tensor.cpu))

    # ------------------------------------------------------------------ before and after

    def load_data(self) -> None:
        trainer = self.trainer
        if trainer.limit_predict_batches == 0:
            return
        source = trainer.sources.get("predict")
        self.given_loaders = given = source.request()
        trainer.strategy.barrier("predict_dataloader()")
        combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "sequential")
        if combined.mode != "sequential":
            raise ValueError(
                f"`trainer.predict` received a `CombinedLoader(mode={combined.mode!r})`. "
                "Predictions belong to one loader at a time. "
                "Use `mode='sequential'`."
            )
        self.loaders = prepared_loaders(trainer, combined, source.label, "predict", trainer.limit_predict_batches)
        self.max_batches = list(self.loaders.lengths())

    def start(self) -> None:
        trainer = self.trainer
        assert self.loaders is not None
        count = len(self.loaders.flattened)
        self.several = count > 1
        self.feed = Feed(
            self.loaders, batch_transfer(trainer), profiled_fetch(trainer, "[_PredictionLoop].predict_next")
        )
        self.feed.open()
        module = trainer.lightning_module
        names = ("predict_step", "on_predict_batch_start", "on_predict_batch_end")
        check_loader_argument(module, self.several, names)
        self.step = bound_step(trainer, "predict_step")
        self.num_arguments = int(min(num_positional(module.predict_step), 3 if self.several else 2))
        self.context = trainer.strategy.step_context("predict_step")
        self.hooks = trainer.compile_hooks()
        self.predictions = [[] for _ in range(count)]
        self.epoch_batch_indices = [[] for _ in range(count)]
        writers = [c for c in trainer.prediction_writers if c.interval.on_epoch]
        self.keep = self.return_predictions or bool(writers)
        self.indices_wanted = bool(trainer.prediction_writers)
        self.restore_modes = capture_modes(module)
        trainer.set_mode("on_predict_model_eval")
        self.hooks.on_predict_start()
        self.hooks.on_predict_epoch_start()

    def record_indices(self, batch_idx: int, dataloader_idx: int) -> None:
        """Which samples this batch is made of, for prediction writers."""
        if not self.indices_wanted:
            return
        assert self.loaders is not None
        recorder = getattr(self.loaders.flattened[dataloader_idx], "batch_sampler", None)
        if isinstance(recorder, IndexRecorder):
            self.current_batch_indices = recorder.seen_indices[batch_idx]
            self.epoch_batch_indices[dataloader_idx].append(self.current_batch_indices)
        else:
            self.current_batch_indices = []
            _warnings.warn(
                "The indices of the predicted samples are not known: the loader has no batch sampler of ours."
            )

    def finish(self) -> list[Any] | None:
        self.hooks.on_predict_epoch_end()
        self.hooks.on_predict_end()
        self.restore_modes()
        if not self.return_predictions:
            return None
        return self.predictions if self.several else self.predictions[0]

    @property
    def loaders_as_given(self) -> Any:
        """What the user gave, in the same nesting, with loaders that were made again in their places."""
        if self.loaders is None or isinstance(self.given_loaders, CombinedLoader):
            return self.given_loaders
        return self.loaders.iterables

    def teardown(self) -> None:
        if self.feed is not None:
            self.feed.close()
