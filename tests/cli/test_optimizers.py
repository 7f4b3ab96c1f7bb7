"""Optimizers and schedulers on the command line: made for the module, linked to it, or injected into it."""

from __future__ import annotations

import pytest
import torch
from command_line import Injected, make_cli
from support import Regression
from torch.optim.lr_scheduler import ConstantLR, StepLR

from fulmen.cli import LightningCLI, ReduceLROnPlateau, instantiate_class
from fulmen.utilities.errors import MisconfigurationException


def test_options_replace_the_optimizers_of_the_module():
    with pytest.warns(
        UserWarning, match="`Net.configure_optimizers` will be overridden by `LightningCLI.configure_opt"
    ):
        cli = make_cli("fit", "--optimizer=Adam", "--optimizer.lr=0.25")
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.filterwarnings("ignore:.*will be overridden")
def test_schedulers():
    cli = make_cli(
        "--optimizer=SGD", "--optimizer.lr=1", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=3", run=False
    )
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert type(scheduler) is StepLR and scheduler.step_size == 3 and scheduler.optimizer is optimizer
    cli = make_cli("--optimizer=SGD", "--optimizer.lr=1", "--lr_scheduler=ReduceLROnPlateau",
                   "--lr_scheduler.monitor=train_loss", "--lr_scheduler.patience=4", run=False)  # fmt: skip
    found = cli.model.configure_optimizers()["lr_scheduler"]
    assert type(found["scheduler"]) is ReduceLROnPlateau
    assert (found["monitor"], found["scheduler"].monitor, found["scheduler"].patience) == (
        "train_loss",
        "train_loss",
        4,
    )


def test_nothing_asked_for_changes_nothing():
    cli = make_cli("fit")
    assert "configure_optimizers" not in vars(cli.model)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    with pytest.warns(UserWarning, match="`--lr_scheduler` has no effect without `--optimizer`"):
        make_cli("--lr_scheduler=StepLR", "--lr_scheduler.step_size=3", run=False)


def test_the_options_can_be_left_out(capsys):
    with pytest.raises(SystemExit):
        make_cli("--optimizer=Adam", auto_configure_optimizers=False, run=False)
    assert "--optimizer=Adam" in capsys.readouterr().err


class FixedClasses(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_optimizer_args(torch.optim.Adam)
        parser.add_lr_scheduler_args(StepLR)


class OwnRule(FixedClasses):
    @staticmethod
    def configure_optimizers(lightning_module, optimizer, lr_scheduler=None):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:.*will be overridden")
def test_fixed_classes_and_a_rule_of_ones_own():
    args = ("--optimizer.lr=0.5", "--lr_scheduler.step_size=2")
    cli = make_cli("fit", *args, cls=FixedClasses)
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam
    assert type(cli.trainer.lr_scheduler_configs[0].scheduler) is StepLR
    assert make_cli("fit", *args, cls=OwnRule).trainer.lr_scheduler_configs[0].interval == "step"


class TwoOptimizers(LightningCLI):
    links = ("AUTOMATIC", "AUTOMATIC")

    def add_arguments_to_parser(self, parser):
        parser.add_optimizer_args((torch.optim.Adam, torch.optim.SGD), "first", link_to=self.links[0])
        parser.add_optimizer_args(torch.optim.SGD, "second", link_to=self.links[1])


class TwoLinked(TwoOptimizers):
    links = ("model.first", "model.second")


class TwoInits(Regression):
    def __init__(self, first: dict, second: dict):
        super().__init__()
        self.first = first
        self.second = second


def test_several_optimizers_are_linked_to_the_module():
    with pytest.raises(MisconfigurationException, match=r"at most one optimizer .* found \['first', 'second', 'lr_sch"):
        make_cli("--first=Adam", "--second.lr=1", cls=TwoOptimizers, run=False)
    cli = make_cli("--first=Adam", "--second.lr=0.5", cls=TwoLinked, model=TwoInits, run=False)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    first = instantiate_class(parameters, cli.model.first)
    second = instantiate_class(parameters, cli.model.second)
    assert (type(first), type(second)) == (torch.optim.Adam, torch.optim.SGD)
    assert second.param_groups[0]["lr"] == 0.5


def test_optimizers_and_schedulers_are_injected():
    cli = make_cli("fit", "--model.part=command_line.Part", "--model.optimizer=Adam", "--model.optimizer.lr=0.03",
                   "--model.scheduler=StepLR", "--model.scheduler.step_size=5", model=Injected)  # fmt: skip
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.03
    assert cli.trainer.lr_scheduler_configs[0].scheduler.step_size == 5
    default = make_cli("fit", "--model.part=command_line.Part", model=Injected)
    assert type(default.trainer.lr_scheduler_configs[0].scheduler) is ConstantLR


def test_what_a_class_path_makes():
    assert instantiate_class((), {"class_path": "torch.nn.ReLU"}).__class__ is torch.nn.ReLU
    assert instantiate_class(3, {"class_path": "torch.nn.Linear", "init_args": {"out_features": 2}}).in_features == 3
    with pytest.raises(ValueError, match="`class_path='Adam'` has no module"):
        instantiate_class((), {"class_path": "Adam"})
