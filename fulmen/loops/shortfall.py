"""Loaders that gave fewer batches than they promised, or none: said once, and an error where nothing can be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_warn, warn_user

if TYPE_CHECKING:
    from fulmen.loops.fit import FitLoop


class ShortLoaderMonitor:
    """What was said in one run about loaders that gave too few batches, and how many epochs had none."""

    def __init__(self) -> None:
        self.said: set[tuple[int, bool]] = set()  # index of the loader, and whether it gave any batch
        self.empty_epochs = 0  # in a row

    def handle_stop_iteration(self, loop: FitLoop) -> None:
        """`training_step` let a `StopIteration` through: the epoch is over, and its last step was the one before."""
        trainer = loop.trainer
        if not loop.iterator_feed:
            name = f"`{type(trainer.lightning_module).__name__}.training_step`"
            what = (
                f"{name} raised StopIteration: epoch {loop.progress.epochs} ends here, without a step for this batch."
            )
            rank_zero_warn(f"{what} An iterator of your own is used up. Make it again, or catch the exception.")
        trainer.book.close_batch()
        self.end_epoch_late(loop)

    def after_batches(self, loop: FitLoop) -> None:
        """No batch is left. If the last one was not known as such, what belongs to the end of the epoch follows now."""
        if loop.feed.shortfalls and loop.progress.batch and not loop.progress.is_last_batch:  # type: ignore[union-attr]
            self.end_epoch_late(loop)

    def end_epoch_late(self, loop: FitLoop) -> None:
        """The end of an epoch, without a step."""
        loop.optimization.stepped = False
        loop.skip_epoch()
        if loop.validated_at != loop.progress.batches and loop.validation_due():
            loop.validate()

    def after_epoch(self, loop: FitLoop) -> None:
        """All processes call this together where one of them may have fewer batches than promised.

        Raises:
            MisconfigurationException: if epochs without a batch would follow each other for ever.
        """
        trainer, short = loop.trainer, loop.feed.shortfalls  # type: ignore[union-attr]
        told = trainer.strategy.exchange_objects(short) if loop.uneven and loop.doubtful else [short]
        for rank, of_rank in enumerate(told) if trainer.is_global_zero else ():
            self.warn_short_loaders(
                trainer.sources.source_of("train").display_name, loop.loaders, of_rank, rank if len(told) > 1 else None
            )
        empty = any(not given for of_rank in told for given, _ in of_rank.values()) and not loop.progress.batch
        self.empty_epochs = self.empty_epochs + 1 if empty else 0
        if self.empty_epochs > 1 and loop.max_epochs == -1:
            self.refuse_empty_run(loop, f"in {self.empty_epochs} epochs in a row")

    def after_training(self, loop: FitLoop) -> None:
        """Refuses a run in which nothing was trained, and warns of one without an optimizer step.

        Raises:
            MisconfigurationException: if no epoch had a batch.
        """
        if self.empty_epochs and not loop.progress.batches:
            self.refuse_empty_run(loop, "in any epoch: nothing was trained")
        module, progress = loop.trainer.lightning_module, loop.progress
        if progress.batches and not progress.steps and not module.automatic_optimization and loop.trainer.optimizers:
            what = f"`{type(module).__name__}.training_step` made no optimizer step, in manual optimization."
            fix = "Call `self.manual_backward(loss)` and `self.optimizers().step()` in it"
            rank_zero_warn(f"{what} {fix}, or leave `self.automatic_optimization` True.", category=PossibleUserWarning)

    def refuse_empty_run(self, loop: FitLoop, when: str) -> None:
        label = loop.trainer.sources.source_of("train").display_name
        what = f"No training batches: the loaders given by {label} gave none {when}."
        why = "Their data is empty, or used up: a generator or an iterator can be read only once."
        fix = "Give a `DataLoader`, or an iterable whose `__iter__` begins anew."
        raise MisconfigurationException(f"{what} {why} {fix}")

    def warn_short_loaders(
        self, label: str, loaders: Any, short: dict[int, tuple[int, float]], rank: int | None = None
    ) -> None:
        """Names the loaders that are `short`, once each.

        Arguments:
            label: names the hook or argument that the loaders come from.
            short: by index of the loader, the batches it gave and those it promised.
            rank: of the process they are in, where there are several.
        """
        several = len(loaders.flattened) > 1
        for index, (given, promised) in short.items():
            if (index, given > 0) in self.said:
                continue
            self.said.add((index, given > 0))
            loader = loaders if several and loaders.mode != "sequential" else loaders.flattened[index]
            loader = vars(loader).get("loader", loader) if hasattr(loader, "__dict__") else loader  # dealt out by batch
            data = getattr(loader, "dataset", loader)
            name = f"`{type(loader).__name__}`" + (f" over `{type(data).__name__}`" if data is not loader else "")
            name += f" (number {index})" if several and loader is not loaders else ""
            name += f" on rank {rank}" if rank is not None else ""
            if not given:
                what = f"No batches: the {name}, given by {label}, gave none."
                warn_user(f"{what} Its data may be used up (a generator can be read once), or empty.")
                continue
            what = f"The {name}, given by {label}, promised {promised} batches with `len()` and gave {given}."
            why = "It ends after the last one, whatever `len()` says."
            fix = "Correct `__len__`: what is planned by it (bars, schedules, fractions of an epoch) is off otherwise."
            warn_user(f"{what} {why} {fix}")
