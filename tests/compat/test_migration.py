"""Old checkpoints and old pickles, under the names of the API."""

from __future__ import annotations

import pickle
import sys

import pytest

from fulmen.utilities.migration import migrate_checkpoint, pl_legacy_patch
from fulmen.utilities.migration.utils import migrate_checkpoint as same

KEY = "pytorch-lightning_version"


def test_what_was_done_is_returned_by_version():
    assert same is migrate_checkpoint
    checkpoint = {KEY: "1.9.5", "NativeMixedPrecisionPlugin": {"scale": 2.0}, "loops": {"fit_loop": {}}}
    migrated, done = migrate_checkpoint(checkpoint)
    assert migrated is checkpoint and migrated["MixedPrecision"] == {"scale": 2.0}
    assert migrated[KEY] == "2.6.6" and migrated[f"legacy_{KEY}"] == "1.9.5"
    assert list(done) == ["2.0.0"]
    assert migrate_checkpoint(checkpoint) == (checkpoint, {})  # nothing is left to do
    old = {KEY: "1.5.0", "epoch": 2, "global_step": 10, "state_dict": {}}
    with pytest.warns(UserWarning, match="numbers of epochs and steps"):
        migrated, done = migrate_checkpoint(old)
    assert list(done) == ["1.6.0", "1.9.0", "2.0.0"]
    assert migrated["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 2


def test_a_file_of_today_or_of_the_target_stays_as_it_is():
    today = {KEY: "2.6.6", "state_dict": {}}
    assert migrate_checkpoint(dict(today)) == (today, {})
    older = {KEY: "1.9.0", "loops": {}}
    assert migrate_checkpoint(dict(older), target_version="1.9.0") == (older, {})
    with pytest.warns(UserWarning, match="newer than 2.6.6"):
        assert migrate_checkpoint({KEY: "9.0.0"}) == ({KEY: "9.0.0"}, {})
    with pytest.raises(KeyError, match=KEY):
        migrate_checkpoint({"state_dict": {}})


def test_pickles_that_name_what_is_gone_are_read_inside_the_context():
    with pl_legacy_patch():
        import pytorch_lightning.utilities.argparse_utils as gone
        import pytorch_lightning.utilities.enums as enums

        stored = {"default": gone._gpus_arg_default, "mode": enums._FaultTolerantMode.MANUAL}
        assert stored["default"](3) == 3 and stored["mode"] == "manual"
        with pl_legacy_patch():
            pass
        assert "pytorch_lightning.utilities.argparse_utils" in sys.modules
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    hand_made = b"cpytorch_lightning.utilities.argparse_utils\n_gpus_arg_default\n."
    with pytest.raises(ModuleNotFoundError, match="pytorch_lightning"):
        pickle.loads(hand_made)
    with pl_legacy_patch():
        assert pickle.loads(hand_made)(4) == 4
