"""`BatchSizeFinder`: tries rising batch sizes, and takes the largest one that fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from fulmen.callbacks.callback import Callback
from fulmen.engine.parallel import ParallelStrategy
from fulmen.utilities.arguments import capture_attribute, lightning_hasattr, lightning_setattr
from fulmen.utilities.errors import MisconfigurationException, _TunerExitException, suggest_name
from fulmen.utilities.memory import garbage_collection_cuda, is_oom_error
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

MODES = ("power", "binsearch")
KINDS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}  # of loaders, by verb


class BatchSizeFinder(Callback):
    """Tries rising batch sizes before a run, and continues with the largest one that fits into memory.

    A few steps are made with each size. Then everything is as it was: weights, optimizer, counters, random numbers; only the
    batch size is another. The loaders have to be made by hooks, from an attribute of the module or its datamodule. Other
    callbacks and loggers rest meanwhile. Not for several processes.

    Args:
        mode: "power" doubles the size until memory is full; "binsearch" then looks between the last size that fitted and
            the first that did not.
        steps_per_trial: steps, or batches of an evaluation, that are run with each size.
        init_val: the first size.
        max_trials: at most so many sizes are tried.
        batch_arg_name: the attribute that has the batch size, on the module, in its `hparams`, or on the datamodule.
        margin: of the size that "binsearch" found this fraction is given up, because other batches may need more.
        max_val: no larger size is tried; where memory does not end, as on CPUs, the size of the dataset ends the search too.

    Raises:
        ValueError: for an unknown mode or numbers that make no search.
        MisconfigurationException: at the start of a run with several processes, with loaders that were passed to the verb,
            with several loaders of an evaluation, or without the attribute.

    Examples:
        To search again at the start of some epochs, override two hooks:

        >>> class FinetuneFinder(BatchSizeFinder):
        ...     milestones = (0, 5, 10)
        ...     def on_fit_start(self, trainer, pl_module):
        ...         pass
        ...     def on_train_epoch_start(self, trainer, pl_module):
        ...         if trainer.current_epoch in self.milestones:
        ...             self.scale_batch_size(trainer, pl_module)
    """

    SUPPORTED_MODES = MODES
    tunes = True

    def __init__(
        self, mode: str = "power", steps_per_trial: int = 3, init_val: int = 2, max_trials: int = 25,
        batch_arg_name: str = "batch_size", margin: float = 0.05, max_val: int = 8192,
    ) -> None:  # fmt: skip
        mode = mode.lower()
        if mode not in MODES:
            raise ValueError(f"`mode` should be either of {MODES}, and is {mode!r}.{suggest_name(mode, MODES)}")
        if not 0.0 <= margin < 1.0:  # of the class that the API has for it
            raise AssertionError(f"`margin` should be between 0 and 1, and is {margin!r}. Write 0.05 for 5 %.")
        given = {"steps_per_trial": steps_per_trial, "init_val": init_val, "max_val": max_val}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"`{name}={value!r}` must be at least 1.")
        if max_trials < 0:
            raise ValueError(f"`max_trials={max_trials!r}` must not be negative.")
        self.optimal_batch_size: int | None = init_val
        self._mode = mode
        self._steps_per_trial = steps_per_trial
        self._init_val = init_val
        self._max_trials = max_trials
        self._batch_arg_name = batch_arg_name
        self._margin = margin
        self._max_val = max_val
        self._early_exit = False

    def end_run_after_search(self) -> None:
        """Lets the run end when the search is over, as `Tuner` wants it."""
        self._early_exit = True

    # ------------------------------------------------------------------ when it runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str | None = None) -> None:
        if isinstance(trainer.strategy, ParallelStrategy):
            what = "The Batch size finder is not supported with distributed strategies."
            raise MisconfigurationException(f"{what} Search on one device, and use the size on each of several.")
        verb = str(trainer.state.fn.value) if trainer.state.fn is not None else "fit"
        if trainer.sources.source_of(KINDS[verb]).argument is not None:
            what = f"The Batch size finder cannot be used with dataloaders passed directly to `.{verb}()`:"
            fix = f"Make them in `{KINDS[verb]}_dataloader` of the module or a datamodule, from `self.{self._batch_arg_name}`."
            raise MisconfigurationException(f"{what} they have their batch size already. {fix}")
        self._check_attribute(pl_module)

    def _check_attribute(self, module: LightningModule) -> None:
        name = self._batch_arg_name
        if not lightning_hasattr(module, name):
            what = f"Field {name} not found in `model`, `datamodule`, nor their `hparams` attributes."
            fix = f"Set `self.{name}` in `__init__` and use it in the loaders, or name another with `batch_arg_name`."
            raise MisconfigurationException(f"{what} {fix}")
        if hasattr(module, name) and name in module.hparams:
            what = f"Field `model.{name}` and `model.hparams.{name}` are mutually exclusive! Both are set to each size,"
            rank_zero_warn(
                f"{what} and it is not known which of them the loaders are made from. Remove one of the two."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scale_batch_size(trainer, pl_module)

    # ------------------------------------------------------------------ the search

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches now; for hooks of subclasses, before a run or an epoch.

        The result is in `optimal_batch_size`; None in a `fast_dev_run`.
        """
        if trainer.fast_dev_run:
            rank_zero_warn("Skipping batch size scaler since `fast_dev_run` is enabled.")
            self.optimal_batch_size = None
        else:
            self._check_loaders(trainer)
            restore = capture_attribute(pl_module, self._batch_arg_name)
            try:
                found = self._search_sizes(trainer, pl_module)
            except BaseException:
                restore()
                raise
            if found is None:
                restore()
            self.optimal_batch_size = found
        if self._early_exit:
            raise _TunerExitException

    def _check_loaders(self, trainer: Trainer) -> None:
        verb = str(trainer.state.fn.value)  # type: ignore[union-attr]
        loop = {"validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}.get(verb)
        if loop is not None and loop.loaders is not None and len(loop.loaders.flattened) > 1:
            what = f"The Batch size finder cannot be used with multiple {KINDS[verb]} dataloaders:"
            raise MisconfigurationException(f"{what} each may have a size of its own. Search with one of them.")

    def _search_sizes(self, trainer: Trainer, module: LightningModule) -> int | None:
        """The size that is found, which the attribute has then; None if the process was told to end."""
        steps = self._steps_per_trial
        training = trainer.state.fn == TrainerFn.FITTING
        kind = KINDS[str(trainer.state.fn.value)]  # type: ignore[union-attr]
        limits = (
            {"limit_train_batches": 1.0, "limit_val_batches": steps} if training else {f"limit_{kind}_batches": steps}
        )
        search = SizeSearch(min(self._init_val, self._max_val), self._max_val)
        with trainer.open_trials([], **limits) as trials:

            def try_size(size: int) -> bool:
                lightning_setattr(module, self._batch_arg_name, size)
                try:
                    trials.run_loop(steps if training else inf)
                except RuntimeError as error:
                    if not is_oom_error(error) or size == 1:
                        raise
                    return False
                finally:
                    search.limit_size(trials.num_samples)
                return True

            left = self._max_trials
            on_device = trainer.strategy.root_device.type != "cpu"
            while left > 0 and not search.is_over and not trials.interrupted:
                fitted = search.run_trial(try_size, halve=self._mode == "power")
                left -= fitted or self._mode == "power"
                if on_device or not fitted:
                    garbage_collection_cuda()
            if trials.interrupted:
                return None
            found = self._apply_margin(search)
            lightning_setattr(module, self._batch_arg_name, found)
            trials.reload_afterwards(now=self._early_exit)
        rank_zero_info(f"The batch size is {found}.")
        return found

    def _apply_margin(self, search: SizeSearch) -> int:
        if self._mode == "power" or not search.fits:
            return search.fits or search.size
        reduced = max(1, int(search.fits * (1 - self._margin)))
        if reduced < search.fits:
            rank_zero_info(f"A margin of {self._margin:.1%} reduces the batch size from {search.fits} to {reduced}.")
        return reduced


@dataclass
class SizeSearch:
    """The state of a search: the size to try next, and between which sizes the answer lies."""

    size: int
    largest: float  # that makes sense
    fits: int = 0  # the largest that fitted; 0 for none yet
    too_large: float = inf  # the smallest that did not
    is_over: bool = False

    def limit_size(self, num_samples: float) -> None:
        """Batches of more samples than there are would be the same ones."""
        if 0 < num_samples < self.largest:
            self.largest = num_samples
        self.size = int(min(self.size, self.largest))

    def run_trial(self, try_size: Callable[[int], bool], halve: bool) -> bool:
        """Tries a size, and chooses the next one. Did it fit?

        Arguments:
            try_size: whether a size fits into memory.
            halve: go back to half of a size that does not fit; else look between it and the one that fitted.
        """
        fitted = try_size(self.size)
        tried = self.size  # there may be fewer samples
        if fitted:
            self.fits = tried
            following = 2 * tried if halve or self.too_large == inf else (tried + self.too_large) // 2
        else:
            self.too_large = tried
            following = tried // 2 if halve else (tried + (self.fits or 1)) // 2
        following = min(following, self.largest)
        self.is_over = self.fits > 0 and not self.fits < following < self.too_large
        rank_zero_info(f"A batch size of {tried} {'fits' if fitted else 'does not fit'}.")
        if not self.is_over:
            self.size = int(following)
        return fitted
