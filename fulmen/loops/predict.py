"""Predict: every batch through `predict_step`, the results kept or handed to a writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fulmen.data.loaders import IndexRecorder
from fulmen.engine.collectives import gather_objects
from fulmen.loops.evaluate import EvaluationLoop
from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.rank_zero import WarningCache
from fulmen.utilities.types import RunningStage

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class Prediction(NamedTuple):
    """What a rank sends to rank 0: the outputs of a batch, after what puts them in order."""

    dataloader_idx: int
    batch_idx: int
    rank: int
    outputs: Any


class PredictionLoop(EvaluationLoop):
    """One pass over the loaders of `trainer.predict`.

    `run` returns one list of outputs per batch; one such list per loader, if there are several. Of several processes
    each predicts a part: rank 0 gets the outputs of all as they come and returns them in the order of the data, the
    others return their own. Without `return_predictions`, nothing is sent.
    """

    lasting = (*EvaluationLoop.lasting, "return_predictions")
    runs_shadow_hooks = False  # they may write what was predicted

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, RunningStage.PREDICTING)
        self.return_predictions = True
        self.outputs: list[list[Any]] = []
        self.current_batch_indices: list[int] = []
        self.epoch_batch_indices: list[list[list[int]]] = []

    @property
    def predictions(self) -> list[Any]:
        """What is kept: a list per batch, nested in one per loader if there are several."""
        return self.outputs if self.several or not self.outputs else self.outputs[0]

    def check_mode(self, mode: str) -> None:
        if mode != "sequential":
            raise ValueError(
                f'`trainer.predict()` only supports the `CombinedLoader(mode="sequential")` mode, but received {mode!r}: '
                "predictions belong to one loader at a time."
            )

    def open_run(self) -> None:
        assert self.loaders is not None
        count = len(self.loaders.flattened)
        self.outputs = [[] for _ in range(count)]
        self.epoch_batch_indices = [[] for _ in range(count)]
        self.warnings = WarningCache()  # each run says what is wrong with it
        writers = self.trainer.prediction_writers
        self.indices_wanted = bool(writers)
        self.epoch_wanted = any(writer.interval.on_epoch for writer in writers)
        self.results_wanted = self.return_predictions or self.epoch_wanted
        shared = self.return_predictions and self.trainer.world_size > 1
        self.collected: list[Prediction] | None = [] if shared else None  # of all ranks, on rank 0
        self.own_wanted = not self.trainer.is_global_zero or self.epoch_wanted
        super().open_run()

    def run_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.batch_idx = batch_idx
        if self.indices_wanted:
            self.record_indices(batch_idx, dataloader_idx)
        super().run_batch(batch, batch_idx, dataloader_idx)

    def handle_outputs(self, outputs: Any, dataloader_idx: int) -> None:
        if outputs is None:
            self.warnings.warn("`predict_step` returned `None`; return the predictions to get them back.")
        if self.results_wanted:
            # sync: results leave the device, or they would fill its memory
            outputs = apply_to_collection(outputs, torch.Tensor, torch.Tensor.cpu)
            if self.collected is None or self.own_wanted:
                self.outputs[dataloader_idx].append(outputs)
            if self.collected is not None:
                self.send_outputs(Prediction(dataloader_idx, self.batch_idx, self.trainer.global_rank, outputs))

    def send_outputs(self, own: Prediction | None) -> int:
        """Sends an output, or None, to rank 0. How many processes have sent one?"""
        assert self.collected is not None
        strategy = self.trainer.strategy
        with strategy.allow_collectives():  # all take part, until nobody has anything left
            arrived, senders = gather_objects(own, strategy.root_device)
        self.collected += arrived
        return senders

    def skip_output(self) -> None:
        if self.collected is not None:
            self.send_outputs(None)

    def collect_remaining(self) -> None:
        while self.collected is not None and self.send_outputs(None):
            pass

    def merged_outputs(self) -> list[Any]:
        """What rank 0 got from all, as the loaders would have given it to one process."""
        kept: list[list[Any]] = [[] for _ in self.outputs]
        for sent in sorted(self.collected or [], key=lambda sent: sent[:3]):
            kept[sent.dataloader_idx].append(sent.outputs)
        return kept if self.several else kept[0]

    def record_indices(self, batch_idx: int, dataloader_idx: int) -> None:
        """Which samples this batch is made of, for prediction writers."""
        assert self.loaders is not None
        recorder = getattr(self.loaders.flattened[dataloader_idx], "batch_sampler", None)
        if isinstance(recorder, IndexRecorder):
            self.current_batch_indices = recorder.pop_indices(batch_idx)
            if self.epoch_wanted:
                self.epoch_batch_indices[dataloader_idx].append(self.current_batch_indices)
        else:
            self.current_batch_indices = []
            self.warnings.warn("The indices of the predicted samples are not known: the loader has no batch sampler.")

    def close_run(self) -> list[Any] | None:
        self.join.close_loaders(self.dataloader_idx)
        self.hooks.epoch_end()
        self.hooks.end()
        self.trainer.mode_hook("on_predict_model_train", self.restore_modes)
        self.trainer.book.restore_scope(self.scope_before)
        if not self.return_predictions:
            return None
        whole = self.collected is not None and self.trainer.is_global_zero
        return self.merged_outputs() if whole else self.predictions
