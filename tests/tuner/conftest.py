"""Fixtures for the tests of the tuner."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
from searches import state_of
from support import make_trainer

import fulmen as pl


@pytest.fixture
def compare_around() -> Callable[..., type[pl.Callback]]:
    """Makes a finder of one of its classes that notes the state before and after each search."""

    def derive(base: type, names: str = "lr_find") -> type:
        def search(self, trainer, pl_module):
            before = state_of(trainer, pl_module)
            try:
                getattr(base, names)(self, trainer, pl_module)
            finally:
                self.notes.append((before, state_of(trainer, pl_module)))

        return type("Compared", (base,), {names: search, "notes": [], "on_fit_start": lambda self, *args: None})

    return derive


@pytest.fixture
def trainer(tmp_path) -> pl.Trainer:
    return make_trainer(default_root_dir=tmp_path, max_epochs=2)


@pytest.fixture(autouse=True, scope="module")
def frozen_objects() -> Iterator[None]:
    """A search collects garbage after each trial; what the tests before have left would be gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
