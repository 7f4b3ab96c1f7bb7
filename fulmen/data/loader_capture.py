"""Loaders that are read for a trial: everything that reading changes is put back, so that a run finds them untouched."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch.utils.data import DataLoader

from fulmen.data.combined import CombinedLoader
from fulmen.data.loader_state import RngSnapshot, dataset_of, find_generators
from fulmen.data.sample_order import samplers_of
from fulmen.utilities.capture import Restore
from fulmen.utilities.rank_zero import rank_zero_warn


class LoaderCapture:
    """The loaders that trial runs have asked for, as they were before the first of them was read."""

    def __init__(self) -> None:
        self._restores: dict[int, Restore] = {}  # by id of a loader, which the function keeps alive

    def add_loaders(self, given: Any) -> None:
        """Remembers what a hook or an argument gave: a loader, or any nesting of them."""
        combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given)
        for loader in combined.flattened:
            if id(loader) not in self._restores:
                self._restores[id(loader)] = _capture_loader(loader)

    def restore_loaders(self) -> None:
        """All of them are as they were."""
        for restore in self._restores.values():
            restore()


def _capture_loader(loader: Any) -> Restore:
    """Remember random generators, states and epochs; running workers wait aside, and trials get others."""
    if isinstance(loader, Iterator):
        what = f"The batches that trial runs read of the `{type(loader).__name__}` are lost for the run after them:"
        rank_zero_warn(
            f"{what} it can be read only once. Give a `DataLoader`, or an iterable whose `__iter__` begins anew."
        )
    random_state = RngSnapshot(list(find_generators(loader).values()))
    parts: list[Any] = [loader, dataset_of(loader)]
    stateful = list(filter(_has_state, parts))[:1]
    states = [deepcopy(part.state_dict()) for part in stateful]
    epochs = [(sampler, sampler.epoch) for sampler in samplers_of(loader) if _counts_epochs(sampler)]
    workers = _exchange_workers(loader, None)

    def restore_loader() -> None:
        for part, state in zip(stateful, states):
            part.load_state_dict(state)
        for sampler, epoch in epochs:
            sampler.set_epoch(epoch)
        random_state.restore_all()
        _exchange_workers(loader, workers)

    return restore_loader


def _has_state(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _counts_epochs(sampler: Any) -> bool:
    return hasattr(sampler, "epoch") and hasattr(sampler, "set_epoch")


def _exchange_workers(loader: Any, workers: Any) -> Any:
    """Gives a loader other workers that stay from one pass to the next, or none; returns those that it had."""
    if not isinstance(loader, DataLoader):
        return None
    before = vars(loader).get("_iterator")
    vars(loader)["_iterator"] = workers
    return before
