"""Files of older and newer versions."""

from __future__ import annotations

import warnings

import pytest

from fulmen.checkpoint.migrate import API_VERSION, migrate_checkpoint
from fulmen.utilities.errors import PossibleUserWarning

OLD_KEY = (
    "ModelCheckpoint{'monitor': 'v', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None, 'save_on_train_epoch_end': True}"
)
KEY = (
    "ModelCheckpoint{'monitor': 'v', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)


def test_a_file_of_our_version_is_left_alone():
    checkpoint = {"pytorch-lightning_version": API_VERSION, "callbacks": {OLD_KEY: 1}}
    assert migrate_checkpoint(dict(checkpoint)) == checkpoint


@pytest.mark.parametrize("version", ["2.6.7", "3.0.0.dev1", "2.10.0"])
def test_a_newer_file_is_warned_about(version):
    with pytest.warns(PossibleUserWarning, match=version):
        migrate_checkpoint({"pytorch-lightning_version": version})


@pytest.mark.parametrize("version", ["2.6.6", "2.6.6.post1", "2.0.0", "unknown"])
def test_other_files_are_not_warned_about(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        migrate_checkpoint({"pytorch-lightning_version": version})


def test_a_file_without_version_is_no_checkpoint_of_a_trainer():
    with pytest.raises(KeyError, match="layer.weight"):
        migrate_checkpoint({"layer.weight": 1})


def test_an_older_file_says_which_version_wrote_it():
    checkpoint = migrate_checkpoint({"pytorch-lightning_version": "2.5.0"})
    assert checkpoint == {"pytorch-lightning_version": API_VERSION, "legacy_pytorch-lightning_version": "2.5.0"}


def test_states_of_callbacks_and_precision_are_found_under_their_names_of_today():
    checkpoint = migrate_checkpoint(
        {
            "pytorch-lightning_version": "2.0.9",
            "callbacks": {OLD_KEY: {"best": 1}, "Other": {}},
            "MixedPrecisionPlugin": {"scale": 2.0},
        }
    )
    assert checkpoint["callbacks"] == {KEY: {"best": 1}, "Other": {}}
    assert checkpoint["MixedPrecision"] == {"scale": 2.0}
    assert "MixedPrecisionPlugin" not in checkpoint
