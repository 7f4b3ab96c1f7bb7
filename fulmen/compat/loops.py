"""The loops under the method names of the API, for classes that are built on them and put in their places.

A run calls `setup_data`, `on_run_start`, `advance` and so on of such a loop where Lightning does. Loops that nobody replaced
have none of this.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fulmen.loops.evaluate import EvaluationLoop
from fulmen.loops.fit import FitLoop
from fulmen.loops.predict import PredictionLoop
from fulmen.loops.progress import ValidationSchedule
from fulmen.metrics.tables import print_results
from fulmen.utilities.introspection import overrides_method
from fulmen.utilities.types import RunningStage, TrainerFn

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class _KnowsBase(type):
    """A class whose instances are all those of the class it is built on."""

    def __instancecheck__(cls, instance: object) -> bool:
        own = "stands_for" in vars(cls) and isinstance(instance, vars(cls)["stands_for"])
        return own or super().__instancecheck__(instance)


class _FitLoop(FitLoop, metaclass=_KnowsBase):
    """`FitLoop` for subclasses: `trainer.fit_loop = MyFitLoop(trainer, max_epochs=3)`."""

    stands_for = FitLoop

    def __init__(self, trainer: Trainer, min_epochs: int | None = 0, max_epochs: int | None = None) -> None:
        super().__init__(trainer, max_epochs, min_epochs)

    # ------------------------------------------------------------------ what subclasses override

    def setup_data(self) -> None:
        """The training loaders, unless they are there."""
        if self.loaders is None or self.reload_due():
            super().load_data()

    @property
    def skip(self) -> bool:
        """Is there nothing to train?"""
        return self.trainer.limit_train_batches == 0 or self.done

    @property
    def done(self) -> bool:
        """Is training over?"""
        return self.stopping.is_over()

    def reset(self) -> None:
        """Before the first epoch of a run."""

    def on_run_start(self) -> None:
        """Everything bound once, and `on_train_start`."""
        self.open_loaders()
        self.start_training()

    def on_advance_start(self) -> None:
        """New loaders if due, and `on_train_epoch_start`."""
        self.setup_data()
        super().open_epoch()

    def advance(self) -> None:
        """The batches of an epoch."""
        super().run_epoch()

    def on_advance_end(self) -> None:
        """`on_train_epoch_end`, schedulers and metrics."""
        super().close_epoch()

    def on_run_end(self) -> None:
        """`on_train_end`."""
        self.finish_training()

    def run(self) -> None:
        """All of training, by these methods."""
        self.setup_data()
        if self.skip:
            self.open_loaders()
            return
        self.reset()
        self.on_run_start()
        while not self.done:
            self.run_epoch()
        self.on_run_end()

    # ------------------------------------------------------------------ what calls them

    def load_data(self) -> None:
        self.setup_data()

    def run_epoch(self) -> None:
        self.on_advance_start()
        self.advance()
        self.on_advance_end()

    def open_epoch(self) -> None:
        """`on_advance_start` has done it."""

    def close_epoch(self) -> None:
        """`on_advance_end` does it."""

    restarting = property(lambda self: self.resume_state.is_mid_epoch(), doc="Does the run continue inside an epoch?")
    max_batches = property(lambda self: self.num_batches, doc="Training batches of an epoch.")


class _EvaluationLoop(EvaluationLoop, metaclass=_KnowsBase):
    """`EvaluationLoop` for subclasses: `trainer.test_loop = MyLoop(trainer, TrainerFn.TESTING, RunningStage.TESTING)`."""

    stands_for = EvaluationLoop

    def __init__(
        self, trainer: Trainer, trainer_fn: TrainerFn, stage: RunningStage, verbose: bool = True,
        inference_mode: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(trainer, stage, inside_fit=trainer_fn == TrainerFn.FITTING)
        self.verbose = verbose
        self.inference_mode = inference_mode

    def setup_data(self) -> None:
        """The loaders, unless they are there."""
        super().load_data()

    @property
    def skip(self) -> bool:
        """Is there no batch?"""
        return super().nothing_to_do()

    def on_run_start(self) -> None:
        """Eval mode and the first hooks."""
        super().open_run()

    def on_run_end(self) -> list[dict[str, float]]:
        """The last hooks; returns a dict of values for each loader."""
        results: list[dict[str, float]] = super().close_run()
        return results

    @staticmethod
    def _print_results(results: list[dict[str, Any]], stage: str) -> None:
        """The table of results."""
        print_results(results, stage)

    def load_data(self) -> None:
        self.setup_data()

    def nothing_to_do(self) -> bool:
        return self.skip

    def open_run(self) -> None:
        self.on_run_start()

    def close_run(self) -> Any:
        return self.on_run_end()

    def show_results(self, results: list[dict[str, float]], stage: str) -> None:  # type: ignore[override]
        tensors = [{name: torch.tensor(value) for name, value in found.items()} for found in results]
        self._print_results(tensors, stage)


class _PredictionLoop(PredictionLoop, metaclass=_KnowsBase):
    """`PredictionLoop` for subclasses: `trainer.predict_loop = MyLoop(trainer)`."""

    stands_for = PredictionLoop

    def __init__(self, trainer: Trainer, inference_mode: bool = True) -> None:
        super().__init__(trainer)
        self.inference_mode = inference_mode

    def setup_data(self) -> None:
        """The loaders, unless they are there."""
        super().load_data()

    def on_run_start(self) -> None:
        """Eval mode and the first hooks."""
        super().open_run()

    def on_run_end(self) -> list[Any] | None:
        """The last hooks; returns the predictions."""
        return super().close_run()

    def load_data(self) -> None:
        self.setup_data()

    def open_run(self) -> None:
        self.on_run_start()

    def close_run(self) -> list[Any] | None:
        return self.on_run_end()


class _TrainingEpochLoop(metaclass=_KnowsBase):
    """What subclasses may decide inside an epoch: `trainer.fit_loop.epoch_loop = MyEpochLoop(trainer)`.

    Counters (`batch_progress`, `global_step`, ...) are those of the loop that it is put into.
    """

    stands_for = SimpleNamespace  # the counters, where nobody put a loop
    restarting = False  # a run that continues validates nothing twice

    def __init__(self, trainer: Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        self.trainer = trainer
        self.min_steps = min_steps
        self.max_steps = max_steps
        self._fetcher = SimpleNamespace(done=False)
        self._batch: tuple[Any, int] = (None, 0)
        self._goes_on = True  # does the epoch, after the batch?

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "trainer":
            raise AttributeError(name)
        return getattr(self.trainer.fit_loop.resume_state.api_counters().epoch_loop, name)

    def enter_loop(self, loop: FitLoop) -> None:
        """The fit loop asks this one from now on, where a subclass has an answer of its own."""
        loop.min_steps = self.min_steps
        loop.max_steps = self.max_steps
        answers: dict[str, tuple[object, str, Any]] = {
            "_should_check_val_fx": (loop.validation, "is_due", self._is_validation_due),
            "advance": (loop, "run_batch", self._run_batch),
            "on_advance_end": (loop, "finish_batch", self._finish_batch),
        }
        for name, (asked, question, answer) in answers.items():
            if overrides_method(self, name, _TrainingEpochLoop):
                vars(asked)[question] = answer

    # ------------------------------------------------------------------ what subclasses override

    def _should_check_val_fx(self, data_fetcher: object = None) -> bool:
        """Does validation run after this batch?"""
        return ValidationSchedule.is_due(self.trainer.validation_schedule)

    def advance(self, data_fetcher: object = None) -> None:
        """A batch, without what follows it."""
        self._goes_on = FitLoop.run_batch(self.trainer.fit_loop, *self._batch)

    def on_advance_end(self, data_fetcher: object = None) -> None:
        """The end of a batch, after its validation."""
        FitLoop.finish_batch(self.trainer.fit_loop)

    def _should_accumulate(self) -> bool:
        """Was the last batch one without an optimizer step?"""
        return not self.trainer.optimization.stepped

    # ------------------------------------------------------------------ what calls them

    def _is_validation_due(self) -> bool:
        self._fetcher.done = self.trainer.is_last_batch
        return bool(self._should_check_val_fx(self._fetcher))

    def _run_batch(self, batch: Any, batch_idx: int) -> bool:
        self._batch = batch, batch_idx
        self.advance(self._fetcher)
        self._batch = None, 0
        return self._goes_on

    def _finish_batch(self) -> None:
        self.on_advance_end(self._fetcher)
