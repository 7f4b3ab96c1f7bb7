"""``fulmen check``: what a program uses of Lightning, found without running it."""

from __future__ import annotations

import json

import pytest

from fulmen.compat.check import GRADES, check_program, grade_name
from fulmen.console.commands import run_command

PROGRAM = """
raise AssertionError("this is never run")
import lightning as L
import lightning.pytorch as pl
import lightning.fabric.utilities.seed
from pytorch_lightning.callbacks import ModelCheckpoint, EarlyStoping as Stop
from lightning.app import LightningApp
from lightning.pytorch import *
from . import lightning as mine
import torch, numpy as pl2

class Model(L.LightningModule):
    def training_step(self, batch, batch_idx):
        self.trainer._checkpoint_connector.dump_checkpoint()
        self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        pl2.linspace(0, 1)

trainer = pl.Trainer(callbacks=[pl.callbacks.Timer(), pl.callbacks.Tymer()])
trainer._run_stage()
trainer.fit(L.pytorch.demos.BoringModel())
trainer.fit(L.pytorch.demos.boring_classes.BoringModel())
ModelCheckpoint._monitor_candidates, ModelCheckpoint._no_such_member, ModelCheckpoint.state_dict
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM)
    return tmp_path / "train.py"


def test_every_use_is_listed_with_its_place_and_grade(program):
    found = {finding.name: finding for finding in check_program([program])}
    full = {
        "lightning", "lightning.pytorch", "lightning.fabric.utilities.seed", "lightning.LightningModule",
        "lightning.pytorch.Trainer", "lightning.pytorch.callbacks.Timer", "pytorch_lightning.callbacks.ModelCheckpoint",
        "lightning.pytorch.demos.boring_classes.BoringModel",
        "pytorch_lightning.callbacks.ModelCheckpoint.state_dict",
    }  # fmt: skip
    private = {"trainer._checkpoint_connector.dump_checkpoint", "trainer.fit_loop.epoch_loop.batch_progress"}
    full |= private & GRADES.keys()
    candidates = found["pytorch_lightning.callbacks.ModelCheckpoint._monitor_candidates"]
    assert (candidates.grade == "full") == ("ModelCheckpoint._monitor_candidates" in GRADES)
    assert {name for name, finding in found.items() if finding.grade == "full"} >= full
    absent = {name: finding.note for name, finding in found.items() if finding.grade == "absent"}
    assert absent["pytorch_lightning.callbacks.EarlyStoping"] == "Did you mean `EarlyStopping`?"
    assert absent["lightning.pytorch.callbacks.Tymer"] == "Did you mean `Timer`?"
    assert "scheduler" in absent["lightning.app.LightningApp"]
    assert absent.get("trainer._run_stage", "") == GRADES.get("trainer._run_stage", ("", ""))[1]
    assert "pytorch_lightning.callbacks.ModelCheckpoint._no_such_member" in absent
    assert found["lightning.app.LightningApp"].places == [f"{program}:7"]
    assert not any(name.startswith(("torch", "numpy", "mine")) for name in found)


def test_the_status_says_whether_something_is_absent(program, capsys, tmp_path):
    good = tmp_path / "good" / "deep" / "good.py"
    good.parent.mkdir(parents=True)
    good.write_text("import lightning.pytorch as pl\npl.Trainer()\npl.Trainer()\n")
    (tmp_path / "good" / ".hidden").mkdir()
    (tmp_path / "good" / ".hidden" / "bad.py").write_text("import lightning.app")
    for words, status in (([str(tmp_path / "good")], 0), ([str(program)], 1), ([str(tmp_path)], 1)):
        with pytest.raises(SystemExit) as ended:
            run_command(["check", *words])
        assert ended.value.code == status
        said = capsys.readouterr().out
        assert ("absent     lightning.app.LightningApp" in said) == bool(status)
        assert ("good.py:2 and 1 more" in said) == (status == 0)


def test_findings_as_json(program, capsys):
    with pytest.raises(SystemExit):
        run_command(["check", "--json", str(program)])
    found = json.loads(capsys.readouterr().out)
    assert found[0]["grade"] == "absent" and {"name", "grade", "note", "places"} == set(found[0])


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "wrong.py").write_text("x = = 1")
    for path in ("wrong.py", "missing.py"):
        with pytest.raises(SystemExit) as ended:
            run_command(["check", str(tmp_path / path)])
        assert ended.value.code == 2 and path in capsys.readouterr().err
    (tmp_path / "none.py").write_text("import torch")
    with pytest.raises(SystemExit) as ended:
        run_command(["check", str(tmp_path / "none.py")])
    assert ended.value.code == 0 and "No name of Lightning" in capsys.readouterr().out


def test_grades_of_private_names_are_those_of_the_table():
    modules = [
        path
        for path in GRADES
        if not path.startswith(("trainer._", "trainer.fit_loop", "trainer.", "ModelC", "LightningO"))
    ]
    for path in modules:
        assert grade_name(f"lightning.pytorch.{path}") == GRADES[path], path
