"""`Tuner`: a run of a Trainer that is only there to find a learning rate or a batch size."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from fulmen.callbacks.batch_size_finder import BatchSizeFinder
from fulmen.callbacks.lr_finder import LearningRateFinder
from fulmen.engine.parallel import ParallelStrategy
from fulmen.loggers.logger import DummyLogger
from fulmen.trainer import Trainer
from fulmen.utilities.capture import capture_attributes
from fulmen.utilities.errors import MisconfigurationException, describe_received, suggest_name
from fulmen.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from fulmen.callbacks.lr_finder import LearningRateCurve
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule
    from fulmen.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS

Method = Literal["fit", "validate", "test", "predict"]
METHODS = ("fit", "validate", "test", "predict")


class Tuner:
    """Finds a learning rate or a batch size, and sets it; nothing is trained, logged or written.

    Arguments:
        trainer: with which the module will be trained; it is left as it was.

    Examples:
        >>> import torch
        >>> from fulmen import LightningModule, Trainer
        >>> class Regression(LightningModule):
        ...     def __init__(self, lr=0.1):
        ...         super().__init__()
        ...         self.lr = lr
        ...         self.layer = torch.nn.Linear(4, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self.layer(batch), batch.sum(1, keepdim=True))
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=self.lr)
        >>> trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
        >>> model = Regression()
        >>> loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=8)
        >>> curve = Tuner(trainer).lr_find(model, loader)
        >>> model.lr == curve.suggestion()
        True
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            what = f"`Tuner(trainer=...)` received {describe_received(trainer)}."
            raise TypeError(f"{what} Pass the `Trainer` with which the module will be trained.")
        self._trainer = trainer

    def scale_batch_size(
        self, model: LightningModule, train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None, dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None, method: Method = "fit", mode: str = "power",
        steps_per_trial: int = 3, init_val: int = 2, max_trials: int = 25, batch_arg_name: str = "batch_size",
        margin: float = 0.05, max_val: int = 8192,
    ) -> int | None:  # fmt: skip
        """The largest batch size that fits into memory. The attribute that has the batch size is set to it.

        Arguments:
            model: the module, whose hooks give the loaders unless there is a datamodule.
            train_dataloaders: a datamodule. Loaders are refused: they have their batch size already.
            val_dataloaders: refused like them, if `method` is not "fit".
            dataloaders: refused like them.
            datamodule: gives the loaders.
            method: the verb to search for: "fit", "validate", "test" or "predict".
            mode: "power" doubles the size until memory is full; "binsearch" then looks between the last two.
            steps_per_trial: steps with each size.
            init_val: the first size.
            max_trials: at most so many sizes are tried.
            batch_arg_name: the attribute of the module, its `hparams` or the datamodule that has the batch size.
            margin: a fraction that "binsearch" gives up of what it found.
            max_val: no larger size is tried; nor is one larger than the dataset.

        Returns:
            None in a `fast_dev_run`.

        Raises:
            MisconfigurationException: for loaders that are passed, several of an evaluation, or a missing attribute.
            ValueError: for several processes, an unknown method or mode, or with a `BatchSizeFinder` in the Trainer.
        """
        self._check_call(method, train_dataloaders, val_dataloaders, dataloaders)
        if isinstance(self._trainer.strategy, ParallelStrategy):
            what = "Tuning the batch size is currently not supported with distributed strategies."
            raise ValueError(f"{what} Search with `Trainer(devices=1)`, and use the size on each of several.")
        self._refuse_second(BatchSizeFinder)
        finder = BatchSizeFinder(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        finder.end_run_after_search()
        with self._prepare_trainer(finder):
            if method == "fit":
                self._trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
            else:
                getattr(self._trainer, method)(model, dataloaders, datamodule=datamodule)
        return finder.optimal_batch_size

    def lr_find(
        self, model: LightningModule, train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None, dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None, method: Method = "fit", min_lr: float = 1e-8, max_lr: float = 1,
        num_training: int = 100, mode: str = "exponential", early_stop_threshold: float | None = 4.0,
        update_attr: bool = True, attr_name: str = "",
    ) -> LearningRateCurve | None:  # fmt: skip
        """The losses over rising learning rates. The attribute that has the learning rate is set to the best of them.

        Arguments:
            model: the module.
            train_dataloaders: loaders for training, or a datamodule.
            val_dataloaders: loaders for validation, which does not run here.
            dataloaders: refused: learning rates are found in training.
            datamodule: gives the loaders.
            method: "fit".
            min_lr: the first rate.
            max_lr: the last one.
            num_training: how many are tried, one per optimizer step, whatever `max_epochs` and `max_steps` say.
            mode: rates rise by the same factor ("exponential") or the same amount ("linear").
            early_stop_threshold: ends the search when the smoothed loss is larger than the best by this factor; None
                tries all rates.
            update_attr: set the attribute to the suggested rate.
            attr_name: the attribute, if it is not `lr` or `learning_rate`.

        Returns:
            The curve, with `results`, `suggestion()` and `plot()`; None in a `fast_dev_run`.

        Raises:
            AttributeError: if `update_attr` and there is no such attribute.
            MisconfigurationException: for another method, wrong loaders, or if there is not one optimizer.
            ValueError: for an unknown mode, rates that are no range, or with a `LearningRateFinder` in the Trainer.
        """
        if method != "fit":
            what = "method='fit' is the only valid configuration to run lr finder."
            raise MisconfigurationException(f"{what} `method={method!r}` trains nothing.")
        self._check_call(method, train_dataloaders, val_dataloaders, dataloaders)
        self._refuse_second(LearningRateFinder)
        finder = LearningRateFinder(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        finder.end_run_after_search()
        with self._prepare_trainer(finder):
            self._trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
        finder.apply_suggestion(model)
        return finder.optimal_lr

    @contextmanager
    def _prepare_trainer(self, finder: LearningRateFinder | BatchSizeFinder) -> Generator[None]:
        """Inside, the trainer has the finder as its first callback and logs nowhere; then everything is as it was."""
        trainer = self._trainer
        callbacks = trainer.callbacks
        loggers = trainer.loggers
        limits = trainer.max_epochs, trainer.min_epochs
        with ExitStack() as leaving:
            leaving.enter_context(isolate_rng())
            for callback in callbacks:  # their hooks `setup` and `teardown` run
                leaving.callback(capture_attributes(callback))
            trainer.callbacks = [finder, *callbacks]
            trainer.loggers = [DummyLogger()] if loggers else []
            try:
                yield
            finally:
                trainer.callbacks = callbacks
                trainer.loggers = loggers
                trainer.max_epochs, trainer.min_epochs = limits

    def _refuse_second(self, kind: type[LearningRateFinder] | type[BatchSizeFinder]) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            what = f"Trainer is already configured with a `{kind.__name__}` callback, which searches when a run begins."
            raise ValueError(f"{what} Remove it to use the `Tuner`, or call `trainer.fit` without.")

    @staticmethod
    def _check_call(method: str, train_dataloaders: Any, val_dataloaders: Any, dataloaders: Any) -> None:
        """Whether there is such a method, and the loaders are given under the names that it has for them."""
        if method not in METHODS:
            hint = suggest_name(str(method), METHODS)
            raise ValueError(f"method {method!r} is invalid. Should be one of {METHODS}.{hint}")
        if method == "fit" and dataloaders is not None:
            fix = "please consider setting `train_dataloaders` and `val_dataloaders` instead."
            raise MisconfigurationException(f"With method={method!r}, `dataloaders` means nothing: {fix}")
        if method != "fit" and (train_dataloaders is not None or val_dataloaders is not None):
            what = f"With method={method!r}, `train_dataloaders` and `val_dataloaders` mean nothing:"
            raise MisconfigurationException(f"{what} please consider setting `dataloaders` instead.")
