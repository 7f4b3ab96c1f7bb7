"""`fulmen fit` and its like: classes named by import paths, from the current folder, with the options of their arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason='jsonargparse is not installed: `pip install "fulmen[cli]"`')

from fulmen.console.commands import run_command

ROOT = Path(__file__).parents[2]
PROJECT = """
import json
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
import fulmen as pl
from fulmen.cli import LightningCLI

def load(count):
    return DataLoader(TensorDataset(torch.ones(count, 2)), batch_size=2)

class Model(pl.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        return None

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def teardown(self, stage):
        trainer = self.trainer
        name = trainer.state.fn.value
        said = [name, trainer.global_step, self.lr, trainer.datamodule.count, trainer.world_size]
        Path(f"said-{name}-{trainer.global_rank}.json").write_text(json.dumps(said))

class Data(pl.LightningDataModule):
    def __init__(self, count: int = 4):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        return load(self.count)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

class MyCLI(LightningCLI):
    def __init__(self):
        super().__init__(Model, Data, save_config_callback=None, trainer_defaults={"max_epochs": 3})

answer = 42
"""
QUIET = [
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch) -> str:
    """A module in the current folder; each test has one of its own name, because modules stay imported."""
    name = f"project_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(PROJECT)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    return name


def said(stage: str, rank: int = 0) -> list:
    return json.loads(Path(f"said-{stage}-{rank}.json").read_text())


def error_of(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        run_command(arguments)
    assert isinstance(exited.value.code, str)
    return exited.value.code


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_each_verb_runs_a_module_with_its_data(project, stage):
    run_command(
        [
            stage,
            f"{project}.Model",
            f"{project}:Data",
            "--model.lr=0.5",
            "--data.count=6",
            "--trainer.max_epochs=1",
            *QUIET,
        ]
    )
    assert said(stage) == [stage, 3 if stage == "fit" else 0, 0.5, 6, 1]


def test_a_command_line_of_ones_own_keeps_its_defaults(project):
    run_command(["fit", f"{project}:MyCLI", "--model.lr=0.25", *QUIET])
    assert said("fit") == ["fit", 6, 0.25, 4, 1]


def test_classes_can_be_named_by_options_and_files(project, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model:\n  class_path: {project}.Model\n  init_args:\n    lr: 0.125\n")
    run_command(
        ["fit", "--config=run.yaml", f"--data={project}.Data", "--data.count=2", "--trainer.max_epochs=2", *QUIET]
    )
    assert said("fit") == ["fit", 2, 0.125, 2, 1]


def test_help_explains_what_can_be_named_and_the_options(project, capsys):
    with pytest.raises(SystemExit) as exited:
        run_command(["fit", f"{project}.Model", "--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0 and text.startswith("usage: fulmen fit [CLI | MODEL [DATA]] [OPTIONS]")
    assert "--model.lr" in text and "--trainer.max_epochs" in text


def test_what_cannot_be_named_is_one_line(project):
    assert error_of(["fit", f"{project}.Modle"]) == (
        f"fulmen fit: `{project}.Modle`: the module `{project}` has no class `Modle`. Did you mean `Model`?"
    )
    assert "has a int, which is no class, called `answer`" in error_of(["test", f"{project}:answer"])
    assert "there is no module `no_such_module`" in error_of(["fit", "no_such_module.Model"])
    expected = "Expected a `LightningCLI`, or a `LightningModule` that may be followed by a `LightningDataModule`"
    assert f"{expected}, received `{project}.Data`." in error_of(["fit", f"{project}.Data"])
    assert expected in error_of(["fit", f"{project}.Model", f"{project}.Model"])
    assert expected in error_of(["fit", f"{project}.MyCLI", f"{project}.Data"])


def test_an_import_that_fails_inside_of_the_module_is_shown_whole(tmp_path, project):
    (tmp_path / f"{project}_broken.py").write_text("import a_package_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        run_command(["fit", f"{project}_broken.Model"])


@pytest.mark.slow
def test_several_processes_are_started_with_the_same_command(project, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "fulmen",
        "fit",
        f"{project}:MyCLI",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]
    done = subprocess.run([*command, *QUIET], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said("fit", 0) == said("fit", 1) == ["fit", 3, 0.1, 4, 2]
