"""What somebody meets who tries the package for the first time: what tools show, and what mistakes are answered with."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException


@pytest.fixture
def run_script(tmp_path):
    """Runs a script as a user would, and returns what it printed on both streams."""

    def run(code: str, *options: str, status: int = 0, **environment: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(code)
        environment = {**os.environ, "PYTHONPATH": str(Path(pl.__file__).parents[1]), **environment}
        done = subprocess.run(
            [sys.executable, *options, str(path)], capture_output=True, text=True, env=environment, timeout=1200
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_help_and_tools_see_the_arguments_of_the_trainer():
    names = list(inspect.signature(pl.Trainer).parameters)
    assert names[:4] == ["accelerator", "strategy", "devices", "num_nodes"] and len(names) == 42
    assert ["self", *names] == list(inspect.signature(pl.Trainer.__init__).parameters)
    assert {p.kind for p in inspect.signature(pl.Trainer).parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_arguments_passed_twice_or_too_often_are_a_type_error():
    with pytest.raises(TypeError, match="multiple values for argument 'accelerator'"):
        pl.Trainer("cpu", accelerator="cpu")
    with pytest.raises(TypeError, match="at most 42 arguments, but 43 were given"):
        pl.Trainer(*[None] * 43)


def test_what_is_on_or_imported_leaves_the_random_numbers_of_a_run_alone(run_script):
    """Rich draws while it is imported, and so does the client of this logger; runs with and without draw the same."""
    print(run_script(DRAWS))


DRAWS = """
import random, sys
import numpy, torch
import fulmen as pl
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.loggers.logger import ExperimentLogger, rank_zero_experiment

class Client(ExperimentLogger):
    name, version = "client", 0
    def _open_experiment(self):
        return random.random(), numpy.random.rand(), torch.rand(2)
    def log_hyperparams(self, params): self._open_experiment()
    def log_metrics(self, metrics, step=None): assert self.experiment
    def finalize(self, status): self._open_experiment()

class Shows(pl.callbacks.ProgressBar):
    def setup(self, *args): super().setup(*args); random.random(); numpy.random.rand(); torch.rand(2)
    on_train_epoch_end = on_fit_end = on_sanity_check_start = lambda self, *args: [torch.rand(2), random.random()]
    def disable(self): ...
    enable = disable

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout())
        self.save_hyperparameters({"lr": 0.1})
        self.example_input_array = torch.ones(3, 2)
        self.drawn = []
    def forward(self, x): return self.layer(x + 0 * torch.rand(()))
    def draw(self, *_): self.drawn.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
    setup = on_fit_start = on_train_start = on_train_epoch_end = on_fit_end = draw
    def training_step(self, batch, batch_idx):
        self.draw()
        loss = self(batch[0]).sum()
        self.log("loss", loss, prog_bar=True)
        return loss
    def validation_step(self, batch, batch_idx): self.log("val", self(batch[0]).sum())
    test_step = validation_step
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)

def run(on, *loggers, **more):
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, enable_progress_bar=on or bool(more), enable_model_summary=on,
        logger=loggers, enable_checkpointing=on, **more,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2)), batch_size=2, shuffle=True)
    model = Model()
    model.draw()
    trainer.fit(model, data, data)
    model.draw()
    trainer.test(model, data, verbose=on)
    model.draw()
    return model.drawn

expected = run(False)
assert "rich.console" not in sys.modules and len(expected) == 14
assert run(True, Client(), CSVLogger("."), TensorBoardLogger(".", log_graph=True)) == expected
assert "rich.console" in sys.modules
assert run(False, callbacks=[Shows()]) == expected
"""


class Model(pl.LightningModule):
    """A class to be passed by mistake."""


@pytest.mark.parametrize(
    "mistake, said",
    [
        (lambda: make_trainer(callbacks=[pl.callbacks.EarlyStopping]), r"pass `EarlyStopping\(...\)`, not `EarlyStopping`"),
        (lambda: make_trainer(callbacks=pl.callbacks.Timer), r"the class `Timer`.*instances of `Callback`"),
        (lambda: make_trainer(logger=pl.loggers.CSVLogger), r"the class `CSVLogger`.*pass `CSVLogger\(...\)`"),
        (lambda: make_trainer(logger=[pl.loggers.CSVLogger]), r"the class `CSVLogger`"),
        (lambda: make_trainer(profiler=pl.profilers.SimpleProfiler), r"profiler=...\)` received the class `SimpleProfiler`"),
        (lambda: make_trainer(strategy=pl.strategies.DDPStrategy), r"`strategy` received the class `DDPStrategy`"),
        (lambda: make_trainer(plugins=[pl.plugins.MixedPrecision]), r"`plugins` received the class `MixedPrecision`"),
        (lambda: make_trainer().fit(Model), r"requires a `LightningModule`, got: the class `Model`"),
        (lambda: make_trainer().fit(Regression(), datamodule=pl.LightningDataModule), "got: the class `LightningDataModule`"),
        (lambda: make_trainer().fit(Regression(), pl.LightningDataModule), r"pass `LightningDataModule\(...\)`"),
        (lambda: make_trainer().test(Regression(), torch.utils.data.DataLoader), r"pass `DataLoader\(...\)`, not"),
        (lambda: make_trainer().fit(Regression(), make_loader(), pl.LightningDataModule()), "Pass it as `datamodule=`"),
        (lambda: make_trainer().fit(ModuleWithCallbackClass(), make_loader()), r"`configure_callbacks\(\)` received the class"),
    ],
)  # fmt: skip
def test_a_class_instead_of_an_instance_is_refused_with_the_way_to_make_one(mistake, said):
    with pytest.raises((TypeError, ValueError, MisconfigurationException), match=said):
        mistake()


class ModuleWithCallbackClass(Regression):
    def configure_callbacks(self):
        return [pl.callbacks.EarlyStopping]


def test_a_forgotten_base_constructor_is_named():
    class WithLayers(pl.LightningModule):
        def __init__(self):
            self.layer = torch.nn.Linear(1, 1)

    class WithoutLayers(Regression):
        def __init__(self):
            self.lr = 1

    class Late(pl.LightningModule):
        def __init__(self):
            self.prepare()

        def prepare(self):
            super().__init__()

    with pytest.raises(AttributeError, match=r"`WithLayers.__init__` does not call `super\(\).__init__\(\)`"):
        WithLayers()
    with pytest.raises(TypeError, match=r"`WithoutLayers.__init__` does not call `super\(\).__init__\(\)`"):
        WithoutLayers()
    with pytest.raises(TypeError, match=r"`Regression.__init__` does not call"):
        make_trainer().fit(Regression.__new__(Regression), make_loader())
    assert isinstance(Late(), pl.LightningModule)
    assert str(inspect.signature(WithoutLayers)) == "()"


# Of each argument of the Trainer: which of these wrong values it takes after all.
WRONG = {"object": object(), "text": "text", "number": 1.5, "list": ["a"], "dict": {"a": 1}, "class": int, "set": {2.5}}
RIGHT = {"default_root_dir": ["text"], "deterministic": ["text"], "gradient_clip_val": ["number"]}


@pytest.mark.parametrize("name", list(inspect.signature(pl.Trainer).parameters))
def test_a_wrong_type_of_any_argument_is_refused_when_the_trainer_is_made(name):
    known = (TypeError, ValueError, MisconfigurationException)
    for kind, value in WRONG.items():
        if kind in RIGHT.get(name, ()):
            assert make_trainer(**{name: value})
            torch.use_deterministic_algorithms(False)
            continue
        with pytest.raises(known, match=name) as raised:
            make_trainer(**{name: value})
        text = str(raised.value)
        shown = value.__name__ if isinstance(value, type) else repr(value)
        assert shown[:20].strip("[]{}") in text, f"{name}={value!r}: {text}"
        assert len(text) > 50, f"no way out is named: {text}"


@pytest.mark.parametrize(
    "name", ["enable_progress_bar", "detect_anomaly", "inference_mode", "sync_batchnorm", "benchmark"]
)
def test_switches_take_what_means_on_or_off(name):
    import numpy

    before = torch.backends.cudnn.benchmark
    for value in (True, False, 0, 1, None, numpy.bool_(False)):
        assert make_trainer(**{name: value})
    torch.backends.cudnn.benchmark = before
    with pytest.raises(TypeError, match=f"{name}=...\\)` received 'False', a str. Pass True or False"):
        make_trainer(**{name: "False"})
