"""Files of older and newer versions; counters written by them and by us mean the same place in training.

`golden_loops.json` holds the "loops" chapter of files that the reference implementation wrote inside a given hook, and
the batch its own run trained next.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from fulmen.checkpoint.lightning_format import API_VERSION, from_loops, migrate_checkpoint, to_loops
from fulmen.utilities.errors import PossibleUserWarning

GOLDEN = json.loads((Path(__file__).parent / "golden_loops.json").read_text())
INSIDE = ("BATCH_DONE", "VALIDATING", "VALIDATED")
POSITIONS = ("EPOCH_START", "IN_BATCH", *INSIDE, "EPOCH_END")

OLD_KEY = (
    "ModelCheckpoint{'monitor': 'v', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None, 'save_on_train_epoch_end': True}"
)
KEY = (
    "ModelCheckpoint{'monitor': 'v', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)

golden = pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])


def loops_of(case):
    return migrate_checkpoint({"pytorch-lightning_version": case["version"], "loops": case["loops"]})["loops"]


def next_batch(progress):
    over = progress["position"] == "EPOCH_END" or (progress["is_last_batch"] and progress["position"] in INSIDE)
    return {
        "epoch": progress["epochs"] + over,
        "batch": 0 if over else progress["batch"],
        "global_step": progress["steps"],
        "log_step": progress["log_step"],
    }


@golden
def test_a_recorded_file_is_placed_where_its_own_run_went_on(case):
    progress = from_loops(loops_of(case))
    assert progress["position"] == case["position"]
    assert next_batch(progress) == case["next"]


@golden
def test_whether_an_accumulation_window_is_open_is_read_from_the_file(case):
    assert from_loops(loops_of(case))["stepped"] is not case["accumulating"]


@golden
def test_what_we_write_reads_back_as_the_same_place(case):
    progress = from_loops(loops_of(case))
    assert from_loops(to_loops(progress)) == progress


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_survives_the_way_through_a_file(position, automatic):
    between = position == "EPOCH_START"
    progress = {
        "epochs": 2,
        "batch": 0 if between else 3,
        "batches": 11,
        "steps": 22 if not automatic else 11,
        "log_step": 11,
        "position": position,
        "is_last_batch": position == "EPOCH_END",
        "automatic": automatic,
        "val_batches": 4,
        "stepped": True,
    }
    assert from_loops(to_loops(progress)) == progress


def test_the_written_chapter_has_the_recorded_layout():
    def layout(tree):
        return {key: layout(value) for key, value in tree.items()} if isinstance(tree, dict) else type(tree)

    recorded = next(case for case in GOLDEN if case["name"] == "batch_end")["loops"]
    assert layout(to_loops({})) == layout(recorded)


@pytest.mark.parametrize("name", ["batch_end", "validation_end_epoch", "val_interval_end", "manual2_batch_end"])
def test_the_written_chapter_equals_the_recorded_one(name):
    recorded = next(case for case in GOLDEN if case["name"] == name)["loops"]
    assert to_loops(from_loops(recorded))["fit_loop"] == recorded["fit_loop"]


def test_a_file_without_counters_starts_at_the_beginning():
    progress = from_loops({})
    assert progress["position"] == "EPOCH_START"
    assert progress["epochs"] == progress["steps"] == progress["batch"] == progress["log_step"] == 0


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
