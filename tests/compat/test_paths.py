"""Deep module paths of the API: other names for the same things."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fulmen
from fulmen.compat.finder import PATHS


def test_one_class_has_many_paths():
    from fulmen.callbacks.early_stopping import EarlyStopping
    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.core.module import LightningModule
    from fulmen.trainer.states import RunningStage, TrainerFn
    from fulmen.utilities.types import RunningStage as ours

    assert ModelCheckpoint is fulmen.callbacks.ModelCheckpoint and EarlyStopping is fulmen.callbacks.EarlyStopping
    assert LightningModule is fulmen.LightningModule
    assert RunningStage is ours and TrainerFn.FITTING == "fit"


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_path_of_the_table_can_be_imported(path):
    module = importlib.import_module(f"fulmen.{path}")
    assert module.__name__ == f"fulmen.{path}"
    assert dir(module)


def test_paths_are_reached_as_attributes():
    assert fulmen.callbacks.progress.rich_progress.RichProgressBar is fulmen.callbacks.RichProgressBar
    assert fulmen.plugins.precision.MixedPrecision is fulmen.plugins.MixedPrecision


def test_unknown_names_are_named():
    with pytest.raises(ImportError, match="no_such_thing"):
        from fulmen.core.module import no_such_thing  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="fulmen.core.nothing"):
        importlib.import_module("fulmen.core.nothing")


def test_importing_a_view_imports_nothing_it_shows():
    code = "import sys, fulmen.core.module; assert 'fulmen.module' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)
