"""Public names: what type checkers, `dir` and `import *` see, and what a misspelt one is answered with."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen import callbacks, loggers, strategies
from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.rank_zero import warn_user

ROOT = Path(pl.__file__).parent
TORCH_FOLDER = Path(importlib.util.find_spec("torch").origin).parents[1]
DOORS = ["fulmen"] + [
    f"fulmen.{name}"
    for name in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies", "utilities")
]


@pytest.mark.parametrize("door", DOORS)
def test_the_list_of_names_is_literal_and_each_of_them_is_there(door):
    module = importlib.import_module(door)
    tree = ast.parse(Path(module.__file__).read_text())
    literal = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and "__all__" in ast.unparse(n)
    )
    imports = [
        n for block in tree.body if isinstance(block, ast.If) for n in block.body if isinstance(n, ast.ImportFrom)
    ]
    names = [alias for n in imports for alias in n.names]
    assert sorted(literal) == sorted(alias.name for alias in names if alias.asname is None) == sorted(module.__all__)
    assert all(alias.asname in (None, alias.name) for alias in names)
    assert all(getattr(module, alias.name) is not None for alias in names)
    public = [name for name in dir(module) if not name.startswith("__")]
    assert public == sorted(alias.name for alias in names), "dir() shows what users may use, and nothing else"


def test_dir_of_a_trainer_shows_what_users_may_use():
    shown = {name for name in dir(make_trainer()) if not name.startswith("__")}
    assert {"fit", "callback_metrics", "max_epochs", "current_epoch", "save_checkpoint", "logger"} <= shown
    assert not [name for name in shown if name.startswith("_")]
    assert not shown & {"book", "signals", "sources", "hooks", "compile_hooks", "pack_results", "report"}


@pytest.mark.parametrize(
    "code, error, text",
    [
        ("import fulmen as pl; pl.Trainr", AttributeError, "'fulmen' has no attribute 'Trainr'. Did you mean `Trainer`?"),
        ("import fulmen as pl; pl.callbacks.EarlyStoping", AttributeError, "Did you mean `EarlyStopping`?"),
        ("from fulmen import Trainr", ImportError, "cannot import name 'Trainr' from 'fulmen' .*mean `Trainer`?"),
        ("from fulmen.callbacks import ModelChekpoint", ImportError, "Did you mean `ModelCheckpoint`?"),
        ("from fulmen.loggers import WandBLogger", ImportError, "Did you mean `WandbLogger`?"),
        ("from fulmen.strategies import DDPStrategi", ImportError, "Did you mean `DDPStrategy`?"),
        ("from fulmen.callbacks.model_checkpoint import ModelCheckpiont", ImportError, "Did you mean `ModelCheckpoint`?"),
        ("from fulmen.utilities.exceptions import Misconfiguration", ImportError, "mean `MisconfigurationException`"),
        ("import fulmen.callback", ModuleNotFoundError, "No module named 'fulmen.callback'. Did you mean `fulmen.callbacks`"),
        ("from fulmen.loggers.tensorbord import X", ModuleNotFoundError, "Did you mean `fulmen.loggers.tensorboard`?"),
        ("import fulmen.nothing_of_the_kind", ModuleNotFoundError, "No module named 'fulmen.nothing_of_the_kind'$"),
        ("import fulmen as pl; pl.nothing_of_the_kind", AttributeError, "has no attribute 'nothing_of_the_kind'"),
    ],
)  # fmt: skip
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(code, error, text):
    with pytest.raises(error, match=text) as raised:
        exec(code, {})
    assert type(raised.value) is error


def test_asking_whether_a_name_or_module_is_there_stays_a_question():
    assert not hasattr(pl, "Trainr") and importlib.util.find_spec("fulmen.callback") is None
    assert getattr(pl.callbacks, "EarlyStoping", None) is None


@pytest.mark.parametrize(
    "call, wrong, right",
    [
        (callbacks.ModelCheckpoint, "monitr", "monitor"), (callbacks.EarlyStopping, "patence", "patience"),
        (callbacks.TQDMProgressBar, "refresh", "refresh_rate"), (callbacks.ModelSummary, "max_deph", "max_depth"),
        (callbacks.Timer, "durations", "duration"), (loggers.CSVLogger, "save_dr", "save_dir"),
        (loggers.TensorBoardLogger, "nam", "name"), (loggers.WandbLogger, "projet", "project"),
        (strategies.FSDPStrategy, "cpu_ofload", "cpu_offload"), (strategies.DDPStrategy, "find_unused_parameter", "find_"),
        (strategies.SingleDeviceStrategy, "devise", "device"), (pl.Trainer, "max_epoch", "max_epochs"),
        (pl.Trainer.fit, "train_dataloader", "train_dataloaders"), (pl.Trainer.validate, "val_dataloaders", "dataloaders"),
        (pl.Trainer.test, "verbos", "verbose"), (pl.Trainer.predict, "return_prediction", "return_predictions"),
    ],
)  # fmt: skip
def test_a_misspelt_keyword_is_answered_with_the_one_that_was_meant(call, wrong, right):
    assert wrong not in inspect.signature(call).parameters
    assert not [p for p in inspect.signature(pl.Trainer.fit).parameters.values() if p.kind is p.VAR_KEYWORD]
    given = (make_trainer(), Regression()) if inspect.isfunction(call) else ()
    with pytest.raises(TypeError, match=f"{wrong}.*Did you mean `{right}") as raised:
        call(*given, **{wrong: 1})
    assert type(raised.value) is TypeError


def test_keywords_that_are_passed_on_to_a_library_are_passed_on(tmp_path):
    logger = loggers.TensorBoardLogger(tmp_path, flush_secs=1)
    logger.experiment.flush()

    class Mine(callbacks.EarlyStopping):
        def __init__(self, **kwargs):
            super().__init__("loss", **kwargs)

    assert Mine(patience=7).patience == 7


# ---------------------------------------------------------------------- warnings


def test_a_warning_shows_the_users_line_and_obeys_filters():
    """Of the call that led to it, whoever of this package warns; filters by module mean who warns."""

    def provoke():
        make_trainer().fit(Regression(), make_loader())
        return inspect.currentframe().f_lineno - 1

    with pytest.warns(PossibleUserWarning, match="no validation batches") as caught:
        line = provoke()
    [told] = [warning for warning in caught if "no validation batches" in str(warning.message)]
    assert (told.filename, told.lineno) == (__file__, line)
    for options in (
        {"module": "fulmen.loops"},
        {"message": ".*no validation batches"},
        {"category": PossibleUserWarning},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", **options)
            warnings.filterwarnings("ignore", message=".*workers|.*last_batch")
            provoke()


def test_a_warning_is_shown_once_per_line_as_python_does_it():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_user("seen once")
        warn_user("seen once")
    assert len(caught) == 2


# ---------------------------------------------------------------------- type checkers

USER = """
from typing import Any
import torch
from torch import Tensor
import fulmen as pl
from fulmen import LightningDataModule, LightningModule, Trainer, seed_everything
from fulmen.accelerators import CPUAccelerator
from fulmen.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.plugins import MixedPrecision
from fulmen.profilers import SimpleProfiler
from fulmen.strategies import DDPStrategy
from fulmen.utilities import rank_zero_only, rank_zero_warn
from fulmen.utilities.types import STEP_OUTPUT, OptimizerLRScheduler


class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer, self.lr = torch.nn.Linear(4, 1), lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> STEP_OUTPUT:
        loss: Tensor = self.layer(batch[0]).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}}


class Mine(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_warn("x")


class Data(LightningDataModule):
    def train_dataloader(self) -> Any: ...


checkpoint = ModelCheckpoint(monitor="loss")
trainer = pl.Trainer(
    callbacks=[checkpoint, EarlyStopping("loss"), RichProgressBar(), Mine(), pl.callbacks.ModelSummary()],
    logger=[CSVLogger("."), TensorBoardLogger(".")], profiler=SimpleProfiler(), strategy=DDPStrategy(),
)
trainer.fit(Net(), datamodule=Data())
results: list[dict[str, float]] = trainer.test(Net(), Data())
loaded: Net = Net.load_from_checkpoint(checkpoint.best_model_path, lr=0.2)
print(seed_everything(0), CPUAccelerator, MixedPrecision, pl.loggers.WandbLogger, rank_zero_only)
"""
WRONG = """
import fulmen as pl
from fulmen.callbacks import ModelChekpoint
pl.Trainr
pl.Trainer(max_epoch=3)
pl.Trainer().fit(pl.LightningModule(), train_dataloader=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_accept_what_is_there_and_nothing_else(tmp_path, checker):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.mypy]\nstrict = true\nmypy_path = "{ROOT.parent}"\n[tool.pyright]\nextraPaths = ["{ROOT.parent}", "{TORCH_FOLDER}"]\n'
    )

    command = [sys.executable, "-m", checker, "user.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    told = done.stdout + done.stderr
    places = [line.strip().split(":")[:2] for line in told.splitlines() if "error" in line and line.count(":") >= 2]
    assert {(Path(file).name, int(line)) for file, line in places} == {("wrong.py", line) for line in (3, 4, 5, 6)}, (
        told
    )


def test_modules_are_suggested_beside_finders_of_others(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    with pytest.raises(ModuleNotFoundError, match="Did you mean `fulmen.callbacks`"):
        importlib.import_module("fulmen.callback")
