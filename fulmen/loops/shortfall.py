"""Loaders that gave fewer batches than they promised, or none: a warning, and an error where nothing can be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.data.loader_state import describe_loader
from fulmen.data.samplers import RoundRobinLoader
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_warn, warn_user

if TYPE_CHECKING:
    from fulmen.data.combined import CombinedLoader
    from fulmen.data.feed import Shortfall
    from fulmen.loops.fit import FitLoop


class ShortLoaderMonitor:
    """Watches for loaders that give too few batches in one run, and for epochs without any."""

    def __init__(self) -> None:
        self.warned: set[tuple[int, bool]] = set()  # index of the loader, and whether it gave any batch
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
        if not loop.validation.is_done() and loop.validation.is_due():
            loop.validate()

    def after_epoch(self, loop: FitLoop) -> None:
        """All processes call this together where one of them may have fewer batches than promised.

        Raises:
            MisconfigurationException: if epochs without a batch would follow each other for ever.
        """
        ranks = loop.join.gather_shortfalls(loop.feed.shortfalls)  # type: ignore[union-attr]
        if loop.trainer.is_global_zero:
            label = loop.trainer.sources.source_of("train").display_name
            for rank, shortfalls in enumerate(ranks):
                self.warn_short_loaders(label, loop.loaders, shortfalls, rank if len(ranks) > 1 else None)
        empty = (
            any(not short.given for shortfalls in ranks for short in shortfalls.values()) and not loop.progress.batch
        )
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
        module = loop.trainer.lightning_module
        progress = loop.progress
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
        self, label: str, loaders: CombinedLoader | None, shortfalls: dict[int, Shortfall], rank: int | None = None
    ) -> None:
        """Names the loaders that gave too few batches, once each.

        Arguments:
            label: names the hook or argument that the loaders come from.
            shortfalls: by index of the loader.
            rank: of the process they are in, where there are several.
        """
        if loaders is None:
            return
        several = len(loaders.flattened) > 1
        for index, (given, promised) in shortfalls.items():
            if (index, given > 0) in self.warned:
                continue
            self.warned.add((index, given > 0))
            loader = loaders if several and loaders.mode != "sequential" else loaders.flattened[index]
            name = describe_loader(loader.loader if isinstance(loader, RoundRobinLoader) else loader)
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
