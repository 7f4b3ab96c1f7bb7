"""Whatever hyper-parameters and metrics are, a logger records them readably and never ends a run."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import enum
import functools
import importlib.util
import pathlib

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from fulmen.loggers.logger import plain_params


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int = 3


class Unshowable:
    def __repr__(self):
        raise ValueError("nobody may look")


def odd_values():
    numpy = pytest.importorskip("numpy")
    inside: dict = {"a": 1}
    inside["itself"] = inside
    found = {
        "array": numpy.ones((2, 2)), "scalar": numpy.float64(0.5), "date": numpy.datetime64("2020-01-01"),
        "many": numpy.ones(10_000), "tensor": torch.ones(2), "one": torch.ones(1), "none": torch.zeros(0),
        "nowhere": torch.ones(3, device="meta"), "nowhere too": torch.ones(1, device="meta"), "sparse": torch.ones(2).to_sparse(),
        "complex": 1j, "complex tensor": torch.ones(1, dtype=torch.complex64), "enum": Color.RED, "path": pathlib.Path("x"),
        "dataclass": Config(), "namespace": argparse.Namespace(a=1), "function": lambda: 0, "class": Config,
        "partial": functools.partial(int, base=2), "module": torch.nn.ReLU(), "odd": Unshowable(), "bytes": b"x",
        "itself": inside, "list": [Config(), {"a": torch.ones(2)}], "empty": {}, "nothing": None, 3: "a number as name",
        "a//b": 1, "e@": 2, "nan": float("nan"), "text": "two\nlines", "odd bytes": "a\udcff", "set": {1}, "pair": (1, (Config(),)),
    }  # fmt: skip
    if importlib.util.find_spec("omegaconf"):
        create = importlib.import_module("omegaconf").OmegaConf.create
        found["config"] = create({"a": "${b}", "b": 1, "missing": "???", "unknown": "${nowhere}"})
        found["configs"] = create([{"a": 1}])
    return found


def several_elements():
    return {"loss": 1.0, "tensor": torch.arange(4.0), "array": torch.ones(2, 2).numpy(), "none": torch.zeros(0)}


@pytest.fixture(params=[CSVLogger, TensorBoardLogger, MLFlowLogger, WandbLogger, CometLogger])
def make_logger(request, tmp_path, monkeypatch):
    kind = request.param
    needed = {MLFlowLogger: "mlflow", WandbLogger: "wandb", CometLogger: "comet_ml", TensorBoardLogger: "tensorboard"}
    if kind in needed:
        pytest.importorskip(needed[kind])
    for name, value in {"WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true", "COMET_DISABLE_AUTO_LOGGING": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    options: dict = {WandbLogger: {"offline": True}, MLFlowLogger: {}}
    options[CometLogger] = {"online": False, "offline_directory": str(tmp_path), "project": "p"}
    yield functools.partial(kind, **options.get(kind, {"save_dir": str(tmp_path)}))
    if kind is WandbLogger:
        importlib.import_module("wandb").finish()


@pytest.mark.filterwarnings("ignore")
def test_no_hyper_parameter_and_no_metric_ends_a_run(make_logger):
    class Odd(Regression):
        def __init__(self, odd):
            super().__init__()
            self.save_hyperparameters()

        def on_train_epoch_end(self):
            self.logger.log_metrics(several_elements(), step=self.global_step)

    trainer = make_trainer(logger=make_logger())
    trainer.fit(Odd(odd_values()), make_loader())
    assert trainer.state.finished
    logger = make_logger()
    for params in (odd_values(), Config(), argparse.Namespace(a=1)):
        logger.log_hyperparams(params)
    logger.finalize("success")


def test_they_are_readable():
    shown = plain_params(odd_values())
    assert shown["array"] == [[1.0, 1.0], [1.0, 1.0]] and shown["tensor"] == [1.0, 1.0] and shown["one"] == 1.0
    assert "..." in shown["many"] and len(shown["many"]) < 100
    assert shown["dataclass"] == {"width": 3} and shown["list"] == [{"width": 3}, {"a": [1.0, 1.0]}]
    assert shown["pair"] == (1, ({"width": 3},))
    assert (shown["enum"], shown["path"], shown["odd"], shown["3"]) == ("RED", "x", "<Unshowable>", "a number as name")
    if "config" in shown:
        assert shown["config"]["b"] == 1 and shown["configs"] == [{"a": 1}]


def test_each_element_of_a_tensor_is_a_metric_and_that_is_said(tmp_path):
    logger = CSVLogger(tmp_path, prefix="p")
    with pytest.warns(UserWarning, match="`fresh` has 2 elements.*`fresh_0`"):
        logger.log_metrics({**several_elements(), "fresh": torch.ones(2)}, step=1)
    logger.finalize("success")
    with open(f"{logger.log_dir}/metrics.csv") as file:
        [row] = csv.DictReader(file)
    assert {name: row[f"p-{name}"] for name in ("loss", "tensor_3", "array_0")} == {
        "loss": "1.0", "tensor_3": "3.0", "array_0": "1.0"
    }  # fmt: skip


class Own(CSVLogger):
    """What subclasses of loggers do."""

    name = property(lambda self: "own")
    version = property(lambda self: "mine")
    save_dir = property(lambda self: self.folder)

    def __init__(self, folder, *, name="other"):
        self.folder, self.asked = str(folder), []
        super().__init__(folder, name=name)

    def save(self):
        self.asked.append("save")

    def finalize(self, status):
        self.asked.append(status)
        super().finalize(status)


def test_subclasses_may_define_properties_and_override_what_is_called(tmp_path):
    logger = Own(tmp_path)
    make_trainer(max_epochs=2, logger=logger, log_every_n_steps=1).fit(Regression(), make_loader())
    assert logger.log_dir == str(tmp_path / "own" / "mine")
    rows = logger.experiment.metrics
    assert len(rows) == 6 and not (tmp_path / "own" / "mine" / "metrics.csv").exists()
    assert logger.asked[-2:] == ["success", "save"] and logger.asked.count("save") >= 6
    for kind in (TensorBoardLogger, MLFlowLogger, WandbLogger, CometLogger):
        taken = {name: property(lambda self: "x") for name in ("name", "version", "save_dir")}
        package = {MLFlowLogger: "mlflow", WandbLogger: "wandb", CometLogger: "comet_ml"}.get(kind, "tensorboard")
        if importlib.util.find_spec(package):
            options = {"save_dir": str(tmp_path)} if kind is TensorBoardLogger else {}
            assert type("Sub", (kind,), taken)(**options).name == "x"


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_an_overridden_experiment_is_asked_each_time(tmp_path, kind):
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    written = []

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            if name in ("log_metrics", "add_scalar"):
                written.append(name)
            return getattr(self.inner, name)

    class Wrapped(kind):
        @property
        def experiment(self):
            return Wrapper(super().experiment)

    make_trainer(max_epochs=2, logger=Wrapped(tmp_path), log_every_n_steps=1).fit(Regression(), make_loader())
    assert len(written) >= 6


class Opened(CSVLogger):
    order: list = []

    @property
    def experiment(self):
        if self._name not in self.order:
            self.order.append(self._name)
        return super().experiment


def test_a_logger_that_watches_others_is_opened_first(tmp_path):
    watching = Opened(tmp_path, "watching")
    watching.opens_first = True
    trainer = make_trainer(logger=[Opened(tmp_path, "a"), watching])
    trainer.fit(Regression(), make_loader())
    assert Opened.order == ["watching", "a"]
    assert WandbLogger.opens_first and not getattr(TensorBoardLogger, "opens_first", False)


def test_what_a_failing_tracker_was_given_before_is_kept_by_the_others(tmp_path):
    class Failing(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if step == 3:
                raise OSError("the tracker is gone")
            super().log_metrics(metrics, step)

    good, failing = CSVLogger(tmp_path, "good"), Failing(tmp_path, "failing")
    trainer = make_trainer(max_epochs=2, logger=[good, failing], log_every_n_steps=1)
    with pytest.raises(OSError, match="the tracker is gone"):
        trainer.fit(Regression(), make_loader())
    for logger, count in ((good, 4), (failing, 3)):
        with open(f"{logger.log_dir}/metrics.csv") as file:
            assert len(list(csv.DictReader(file))) == count
