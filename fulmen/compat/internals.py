"""Attaches the private side of the API to fulmen's classes, once programs written for it run here.

`GRADES` says of each private name how far it is served; nothing of this is loaded, or costs anything, before.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

from fulmen.callbacks.checkpointing import ModelCheckpoint
from fulmen.compat import internals_loops as loops
from fulmen.compat import internals_trainer as connectors
from fulmen.compat.grades import ABSENT, refuse_private
from fulmen.compat.grades import GRADES as GRADES
from fulmen.compat.grades import Grade as Grade
from fulmen.compat.internals_loops import TrainingEpochLoop as TrainingEpochLoop
from fulmen.loops.evaluate import EvaluationLoop
from fulmen.loops.fit import FitLoop
from fulmen.loops.predict import PredictionLoop
from fulmen.trainer import Trainer
from fulmen.utilities.introspection import alias_property
from fulmen.utilities.rank_zero import rank_zero_only
from fulmen.utilities.types import TrainerFn

SHARED_RANK = "lightning_utilities.core.rank_zero"


def attach_views() -> None:
    """Gives the Trainer, its loops and strategies the private attributes that programs use; a second call does nothing."""
    share_rank()
    if "_checkpoint_connector" in vars(Trainer):
        return
    for view in (
        connectors.AcceleratorView, connectors.CallbackView, connectors.CheckpointView, connectors.DataView,
        connectors.LoggerView, connectors.SignalView,
    ):  # fmt: skip
        _attach(Trainer, view.attribute, cached_property(view))
    _attach(Trainer, "_results", property(_find_results))
    _attach(Trainer, "_evaluation_loop", property(find_evaluation_loop))
    _attach(Trainer, "_active_loop", property(_find_active_loop))
    for name, attribute in {**_OF_ALL_LOOPS, **_OF_FITTING}.items():
        _attach(FitLoop, name, attribute)
    for name, attribute in {**_OF_ALL_LOOPS, **_OF_EVALUATION}.items():
        _attach(EvaluationLoop, name, attribute)
    _attach(PredictionLoop, "_predictions", alias_property("outputs", "What is kept of each loader."))
    for name, attribute in _OF_CHECKPOINTS.items():
        _attach(ModelCheckpoint, name, attribute)
    for path in ABSENT:
        owner, _, name = path.rpartition(".")
        if owner in _OWNERS and not hasattr(_OWNERS[owner], name):
            _attach(_OWNERS[owner], name, _absent(owner, name))


_OWNERS: dict[str, type] = {
    "trainer": Trainer, "trainer.fit_loop": FitLoop, "trainer.predict_loop": PredictionLoop,
    "trainer.validate_loop": EvaluationLoop,
}  # fmt: skip


def _attach(owner: type, name: str, attribute: Any) -> None:
    if hasattr(attribute, "__set_name__"):
        attribute.__set_name__(owner, name)
    setattr(owner, name, attribute)


def _absent(owner: str, name: str) -> Any:
    return property(lambda self: refuse_private(owner, name))


def share_rank() -> None:
    """Lets `lightning_utilities`, if it is loaded, have fulmen's `rank_zero_only`: there is one rank, for all."""
    if SHARED_RANK in sys.modules:
        vars(sys.modules[SHARED_RANK])["rank_zero_only"] = rank_zero_only


# ---------------------------------------------------------------------- of the Trainer


def _find_results(trainer: Trainer) -> loops.ResultsView | None:
    return None if trainer.state.stage is None else loops.ResultsView(trainer)


def find_evaluation_loop(trainer: Trainer) -> EvaluationLoop:
    """The loop that evaluates in the verb that was called last."""
    found = {
        TrainerFn.FITTING: trainer.fit_loop.val_loop, TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
    }  # fmt: skip
    if trainer.state.fn not in found:
        what = f"The trainer is not evaluating, but at {trainer.state.fn!r}."
        raise RuntimeError(f"{what} Name the loop: `trainer.validate_loop`.")
    return found[trainer.state.fn]


def _find_active_loop(trainer: Trainer) -> FitLoop | EvaluationLoop | None:
    if trainer.training:
        return trainer.fit_loop
    if trainer.predicting:
        return trainer.predict_loop
    return find_evaluation_loop(trainer) if trainer.evaluating else None


# ---------------------------------------------------------------------- of loops and callbacks

_OF_CHECKPOINTS: dict[str, Any] = {
    "_get_metric_interpolated_filepath_name": lambda self, monitor_candidates, trainer, del_filepath=None: (
        self._free_path(trainer, monitor_candidates, replaces=del_filepath or "")
    ),
    "_should_save_on_train_epoch_end": lambda self, trainer: self._schedule.looks_after_training(trainer),
}

_OF_ALL_LOOPS: dict[str, Any] = {
    "_combined_loader": alias_property("loaders", "The loaders, combined."),
    "_data_fetcher": alias_property("feed", "The batches of a run."),
    "_results": property(lambda self: loops.ResultsView(self.trainer)),
}
_OF_FITTING: dict[str, Any] = {
    "epoch_loop": cached_property(TrainingEpochLoop),
    "epoch_progress": cached_property(
        lambda self: loops.shared_progress(self, "epoch_progress", "epochs", ("processed", "completed"))
    ),
    "_data_source": property(lambda self: loops.SourceView(self.trainer, "train")),
    "max_batches": alias_property("num_batches", "Batches of an epoch."),
    "batch_idx": property(lambda self: self.epoch_loop.batch_idx, doc="Of the batch at work, in its epoch."),
    "total_batch_idx": property(lambda self: self.epoch_loop.total_batch_idx, doc="Of all batches at work."),
    "restarting": property(lambda self: self.resume_state.pending, doc="Is a resumed epoch not entered yet?"),
    "done": property(lambda self: self.stopping.is_over(), doc="Does training end here?"),
    "skip": property(lambda self: self.trainer.limit_train_batches == 0 or self.stopping.is_over()),
    "_can_stop_early": property(lambda self: self.stopping.is_allowed()),
    "_skip_backward": property(
        lambda self: self.optimization.forward_only, lambda self, on: self.optimization.set_forward_only(on)
    ),
    "_iteration_based_training": lambda self: self.max_steps != -1,
    "_should_accumulate": lambda self: self.epoch_loop._should_accumulate(),
    "setup_data": lambda self: self.load_data() if self.loaders is None or self.reload_due() else None,
    "reset": loops.reset_fit_loop,
    "state_dict": loops.fit_loop_state,
    "load_state_dict": loops.load_fit_loop_state,
}
_OF_EVALUATION: dict[str, Any] = {
    "_data_source": property(lambda self: loops.SourceView(self.trainer, self.kind)),
    "_max_batches": alias_property("max_batches", "Batches of each loader."),
    "_is_sequential": property(lambda self: self.loaders is None or self.loaders.mode == "sequential"),
    "batch_progress": property(loops.evaluation_progress),
    "num_dataloaders": property(lambda self: 0 if self.loaders is None else len(self.loaders.flattened)),
    "restarting": property(lambda self: False, doc="A pass over the loaders begins anew."),
    "skip": property(lambda self: self.nothing_to_do(), doc="Are there no batches?"),
    "setup_data": lambda self: self.load_data(),
}
