"""Hyper-parameters under a command line: stored as class paths and arguments, and objects again when they are loaded."""

from __future__ import annotations

import pickle
import subprocess  # noqa: F401  # imported, so that only its kind is the reason for refusing it
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import Data, Injected, Net, Part, Wide, make_cli
from support import Regression

from fulmen import LightningModule
from fulmen.cli import LightningCLI, instantiate_module

NAME = "lightning.pytorch.cli.instantiate_module"
SAVING = {"enable_checkpointing": True}


class HoldsPart(torch.nn.Module):
    """Holds another."""

    def __init__(self, inner: Part):
        super().__init__()
        self.inner = inner


class HoldsModules(Regression):
    def __init__(self, outer: torch.nn.Module, inner_model: Net, factor: float = 2.0):
        super().__init__()
        self.save_hyperparameters()
        self.outer = outer
        self.inner_model = inner_model


def saved(cli) -> str:
    return cli.trainer.checkpoint_callback.best_model_path


def test_objects_are_stored_as_paths_and_arguments_and_are_objects_again_when_loaded():
    cli = make_cli("fit", "--model.part=command_line.Part", "--model.part.size=9", "--model.optimizer=Adam",
                   "--model.optimizer.lr=0.5", model=Injected, trainer=SAVING)  # fmt: skip
    stored = torch.load(saved(cli), weights_only=True)["hyper_parameters"]
    assert stored["part"] == {"class_path": "command_line.Part", "init_args": {"size": 9}}
    assert stored["optimizer"]["class_path"] == "torch.optim.Adam" and stored["optimizer"]["init_args"]["lr"] == 0.5
    assert stored["_instantiator"] == NAME and "_class_path" not in stored
    loaded = Injected.load_from_checkpoint(saved(cli))
    assert type(loaded.part) is Part and loaded.part.size == 9
    optimizer = loaded.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["initial_lr"] == 0.5
    part = Part(4)
    assert Injected.load_from_checkpoint(saved(cli), part=part).part is part
    data = torch.load(saved(cli), weights_only=True)["datamodule_hyper_parameters"]
    assert data == {"batch_size": 4, "_instantiator": NAME}
    assert Data.load_from_checkpoint(saved(cli)).batch_size == 4


def test_the_subclass_is_stored_and_models_inside_keep_their_own():
    cli = make_cli(
        "fit", "--model=HoldsModules", "--model.outer=HoldsPart", "--model.outer.inner.size=5", "--model.inner_model=command_line.Wide",
        "--model.inner_model.height=6", model=None, trainer=SAVING,
    )  # fmt: skip
    assert (
        cli.model.inner_model.hparams == {"width": 8, "scale": 1.0, "height": 6}
        or dict(cli.model.inner_model.hparams)["height"] == 6
    )
    assert "_instantiator" not in cli.model.inner_model.hparams
    stored = torch.load(saved(cli), weights_only=True)["hyper_parameters"]
    assert next(iter(stored)) == "_class_path" and stored["_class_path"].endswith("HoldsModules")
    loaded = LightningModule.load_from_checkpoint(saved(cli))
    assert type(loaded) is HoldsModules and type(loaded.inner_model) is Wide and loaded.inner_model.height == 6
    assert loaded.outer.inner.size == 5


class Chosen(LightningModule):
    def __init__(self, width: int = 3, secret: str = "s"):
        super().__init__()
        self.save_hyperparameters("width")


class Ignoring(LightningModule):
    def __init__(self, width: int = 3, secret: str = "s"):
        super().__init__()
        self.save_hyperparameters(ignore="secret")


class Own(LightningModule):
    def __init__(self, width: int = 3, options: dict | None = None):
        super().__init__()
        self.save_hyperparameters({"x": width + 1})


@pytest.mark.parametrize(("model", "expected"), [
    (Chosen, {"width": 8}), (Ignoring, {"width": 8, "_instantiator": NAME}),
    (Own, {"x": 9}),
])  # fmt: skip
def test_what_save_hyperparameters_is_asked_to_keep(model, expected):
    assert make_cli("--model.width=8", model=model, run=False).model.hparams == expected


def test_without_support_objects_are_kept_as_they_are():
    cli = make_cli("--model.part=command_line.Part", model=Injected, run=False, load_from_checkpoint_support=False)
    assert cli.model.hparams.part is cli.model.part
    assert "_instantiator" not in cli.model.hparams


def test_a_checkpoint_on_the_command_line_brings_its_hyper_parameters(capsys):
    path = saved(make_cli("fit", "--model.width=7", trainer=SAVING))
    cli = make_cli("test", f"--ckpt_path={path}")
    assert cli.model.width == 7 and cli.config.test.model.width == 7
    with pytest.warns(UserWarning, match=r"`--model.width=11` is replaced by 7"):
        assert make_cli("test", f"--ckpt_path={path}", "--model.width=11").model.width == 7
    with pytest.raises(SystemExit):
        make_cli("test", f"--ckpt_path={path}", model=Own)
    assert f"Parsing of ckpt_path hyperparameters failed! They are those in {path!r}" in capsys.readouterr().err


class LinksWidth(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.batch_size", "model.width")


def test_only_what_the_user_gave_is_said_to_be_replaced():
    path = saved(make_cli("fit", "--model.width=7", trainer=SAVING))
    options = ["test", f"--ckpt_path={path}", "--data.batch_size=5"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cli = make_cli(*options, cls=LinksWidth)
    assert cli.model.width == 5  # what is linked is what the user gave
    assert not [str(one.message) for one in said if "is replaced by" in str(one.message)]


def test_so_does_one_of_a_subclass():
    path = saved(make_cli("fit", "--model=command_line.Wide", "--model.height=4", model=None, trainer=SAVING))
    cli = make_cli("validate", "--model=command_line.Wide", f"--ckpt_path={path}", model=None)
    assert type(cli.model) is Wide and cli.model.height == 4


def test_a_file_from_anywhere_builds_parts_of_models_only():
    path = saved(make_cli("fit", "--model.part=command_line.Part", model=Injected, trainer=SAVING))
    checkpoint = torch.load(path, weights_only=True)
    marker = Path("made")
    for bad in ({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}},
                {"class_path": "not.imported.Part"}):  # fmt: skip
        checkpoint["hyper_parameters"]["part"] = bad
        torch.save(checkpoint, "bad.ckpt")
        with pytest.raises(pickle.UnpicklingError, match=f"wants a `{bad['class_path']}` to be made.*add_safe_globals"):
            Injected.load_from_checkpoint("bad.ckpt")
    assert "subprocess" in sys.modules and not marker.exists()


def test_a_module_from_its_configuration():
    made = instantiate_module(Net, {"width": 5, "_instantiator": NAME})
    assert type(made) is Net and made.width == 5
    made = instantiate_module(torch.nn.Module, {"_class_path": "command_line.Part", "size": 6})
    assert type(made) is Part and made.size == 6
    with pytest.raises(ValueError, match="`command_line.Part` is no subclass of `LightningModule`"):
        instantiate_module(LightningModule, {"_class_path": "command_line.Part"})
