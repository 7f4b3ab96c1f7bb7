"""What a command line makes and runs: models and data by class, function and path; commands, hooks, override points."""

from __future__ import annotations

import sys

import pytest
import torch
from command_line import QUIET, Data, Net, Wide, build_data, build_net, build_trainer, make_cli, names_of

import fulmen
import fulmen as pl
import fulmen.fabric.loggers
import fulmen.fabric.strategies
from fulmen.callbacks import EarlyStopping, LearningRateMonitor, Timer
from fulmen.cli import LightningArgumentParser, LightningCLI
from fulmen.utilities.errors import MisconfigurationException


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_each_command_runs_that_method_with_the_options_given(command):
    cli = make_cli(command, "--model.width=7", "--data.batch_size=2", "--trainer.max_epochs=2")
    assert cli.subcommand == command
    assert (cli.model.width, cli.datamodule.batch_size, cli.trainer.max_epochs) == (7, 2, 2)
    assert cli.trainer.state.fn == command and cli.trainer.state.finished
    assert cli.trainer.datamodule is cli.datamodule and cli.trainer.lightning_module is cli.model
    assert cli.trainer.global_step == (2 if command == "fit" else 0)


def test_without_run_the_objects_are_made_and_nothing_else():
    cli = make_cli("--model.width=7", "--seed_everything=3", run=False)
    assert cli.subcommand is None
    assert (cli.model.width, cli.trainer.global_step, cli.config.seed_everything) == (7, 0, 3)
    assert cli.config_init.model is cli.model
    assert cli.config_dump["model"] == {"width": 7, "scale": 1.0}


def test_functions_make_the_model_the_data_and_the_trainer():
    cli = make_cli("fit", "--model.width=4", "--data.batch_size=6", "--trainer.max_epochs=3",
                   model=build_net, data=build_data, trainer_class=build_trainer)  # fmt: skip
    assert (cli.model.width, cli.model.scale, cli.datamodule.batch_size) == (4, 2.0, 6)
    assert (cli.trainer.max_epochs, cli.trainer.global_step) == (3, 3)


def test_a_function_must_say_what_it_returns():
    def build(width: int):
        return Net(width)

    with pytest.raises(MisconfigurationException, match=r"`build` does not say what it returns.*-> MyModule"):
        make_cli(model=build, run=False)


@pytest.mark.parametrize("source", [int, torch.nn.Linear])
def test_other_classes_are_refused(source):
    with pytest.raises(MisconfigurationException, match="Cannot add arguments from: .*LightningModule"):
        make_cli(model=source, run=False)


class NetNamedOnlyHere(Net):
    """Its name is enough to find it."""


def test_any_subclass_can_be_named_by_its_path_or_its_name():
    cli = make_cli("--model=command_line.Wide", "--model.height=9", "--data=command_line.Data", "--data.batch_size=2",
                   model=None, data=None, run=False)  # fmt: skip
    assert type(cli.model) is Wide
    assert (cli.model.height, cli.model.width, cli.datamodule.batch_size) == (9, 8, 2)
    assert make_cli("--model=NetNamedOnlyHere", model=None, data=None, run=False).datamodule is None


def test_subclass_mode_starts_from_the_class_given():
    cli = make_cli(
        "--model=command_line.Wide",
        "--data=command_line.Data",
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
    )
    assert type(cli.model) is Wide and type(cli.datamodule) is Data


class Talkative(LightningCLI):
    """Writes down what it is asked."""

    def __init__(self, *args, **kwargs):
        self.told = []
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self):
        self.told.append(f"before: {hasattr(self, 'model')}")

    def after_instantiate_classes(self):
        self.told.append(f"after: {self.subcommand}")

    def before_fit(self):
        self.told.append(f"before_fit: {self.trainer.global_step}")

    def after_fit(self):
        self.told.append(f"after_fit: {self.trainer.global_step}")

    def validate(self, model, **kwargs):
        self.told.append(f"validate: {sorted(kwargs)}")


def test_hooks_and_methods_named_like_a_command():
    assert make_cli("fit", cls=Talkative).told == ["before: False", "after: fit", "before_fit: 0", "after_fit: 1"]
    told = make_cli("validate", cls=Talkative).told
    assert told[-1] == "validate: ['ckpt_path', 'datamodule', 'verbose', 'weights_only']"


class TrainerWithMore(pl.Trainer):
    def grow(self, model: pl.LightningModule, by: int, fast: bool = False) -> None:
        """Grows the model by 100%.

        Args:
            model: The model
            by: How much, in %s
            fast: Whether quickly
        """
        self.grown = (model, by, fast)


class MoreCommands(LightningCLI):
    @staticmethod
    def subcommands():
        return {**LightningCLI.subcommands(), "grow": {"model"}}


def test_other_methods_of_the_trainer_become_commands(capsys):
    options = {"cls": MoreCommands, "trainer_class": TrainerWithMore, "trainer": QUIET, "data": None}
    cli = make_cli("grow", "--by=3", **options)
    assert cli.trainer.grown == (cli.model, 3, False)
    for args in (["-h"], ["grow", "-h"]):
        with pytest.raises(SystemExit):
            make_cli(*args, **options)
    text = capsys.readouterr().out
    assert "{fit,validate,test,predict,grow}" in text and "Grows the model by 100%." in text
    assert "How much, in %s (required, type: int)" in text and "--model MODEL" not in text


def test_callbacks_of_the_configuration_come_before_those_that_are_always_added():
    class Program(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(EarlyStopping, "stop")
            parser.set_defaults({"stop.monitor": "train_loss", "stop.patience": 5})

    presets = {"callbacks": [LearningRateMonitor()], "logger": True}
    cli = make_cli("--stop.patience=9", "--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:01:00:00",
                   "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", cls=Program,
                   trainer=presets, run=False)  # fmt: skip
    found = names_of(cli.trainer.callbacks)
    assert found[:4] == ["Timer", "EarlyStopping", "EarlyStopping", "LearningRateMonitor"]
    assert [c.patience for c in cli.trainer.callbacks if isinstance(c, EarlyStopping)] == [3, 9]
    # A second one has as many, and those that are passed replace those of the configuration.
    assert names_of(cli.instantiate_trainer().callbacks) == found
    again = cli.instantiate_trainer(max_epochs=7, callbacks=[Timer()])
    assert again.max_epochs == 7 and names_of(again.callbacks)[:3] == ["Timer", "EarlyStopping", "LearningRateMonitor"]


def test_a_callback_that_need_not_be_chosen():
    class Program(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(pl.Callback, "extra", subclass_mode=True, required=False)

    without = make_cli(run=False, cls=Program)
    assert without.config.extra is None
    assert "Timer" not in names_of(without.trainer.callbacks)
    chosen = make_cli("--extra=fulmen.callbacks.Timer", run=False, cls=Program)
    assert "Timer" in names_of(chosen.trainer.callbacks)


def test_a_trainer_without_that_argument_gets_no_callbacks():
    class Plain(pl.Trainer):
        def __init__(self, max_epochs: int = 4):
            super().__init__(**{**QUIET, "max_epochs": max_epochs})

    with pytest.warns(UserWarning, match="Plain` class does not expose the `callbacks` argument"):
        assert make_cli(trainer_class=Plain, run=False).trainer.max_epochs == 4


def test_a_name_means_the_trainers_class_when_fabrics_of_that_name_is_imported_too():
    assert fulmen.fabric.loggers.CSVLogger is not fulmen.loggers.CSVLogger
    assert fulmen.fabric.strategies.DDPStrategy is not fulmen.strategies.DDPStrategy
    cli = make_cli("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.strategy=DDPStrategy",
                   "--trainer.strategy.find_unused_parameters=true", "--trainer.devices=1", run=False)  # fmt: skip
    assert type(cli.trainer.logger) is fulmen.loggers.CSVLogger
    assert type(cli.trainer.strategy) is fulmen.strategies.DDPStrategy


def test_plug_ins_of_the_trainer_by_path_and_by_name(tmp_path):
    cli = make_cli(
        "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.profiler=simple",
        "--trainer.strategy.class_path=fulmen.strategies.DDPStrategy",
        "--trainer.strategy.find_unused_parameters=true", "--trainer.devices=1",
        "--trainer.plugins=fulmen.plugins.environments.LightningEnvironment", "--trainer.max_time=00:00:01:00",
        run=False,
    )  # fmt: skip
    assert names_of([cli.trainer.logger, cli.trainer.profiler]) == ["CSVLogger", "SimpleProfiler"]
    assert cli.trainer.logger.save_dir == str(tmp_path)
    assert type(cli.trainer.strategy).__name__ == "DDPStrategy"
    assert names_of([cli.trainer.strategy.cluster_environment]) == ["LightningEnvironment"]


def test_all_methods_that_make_the_parser_can_be_overridden():
    class OtherParser(LightningArgumentParser):
        pass

    class Program(LightningCLI):
        def init_parser(self, **kwargs):
            return super().init_parser(**{"env_prefix": "MINE", **kwargs})

        def setup_parser(self, add_subcommands, main_kwargs, subparser_kwargs):
            self.setup = (add_subcommands, main_kwargs, subparser_kwargs)
            super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)

        def add_default_arguments_to_parser(self, parser):
            parser.add_argument("--seed_everything", type=int, default=11)

        def add_core_arguments_to_parser(self, parser):
            super().add_core_arguments_to_parser(parser)
            parser.add_argument("--name", type=str, default="core")

        def parse_arguments(self, parser, args):
            super().parse_arguments(parser, [*args, "--name=parsed"])

        def instantiate_classes(self):
            super().instantiate_classes()
            self.model.name = self.config.name

    cli = make_cli(cls=Program, parser_class=OtherParser, run=False)
    assert cli.setup == (False, {}, {})
    assert type(cli.parser) is OtherParser and cli.parser.env_prefix == "MINE"
    assert (cli.config.seed_everything, cli.model.name) == (11, "parsed")


@pytest.mark.parametrize(("default", "args", "seed"), [
    (True, [], 0), (42, [], 42), (False, [], False), (0, [], 0), (False, ["--seed_everything=5"], 5),
    (True, ["--seed_everything=false"], False),
])  # fmt: skip
def test_the_seed(default, args, seed):
    torch.manual_seed(123)
    before = torch.initial_seed()
    cli = make_cli(*args, seed_everything_default=default, run=False)
    assert cli.config.seed_everything is seed if seed is False else cli.config.seed_everything == seed
    assert torch.initial_seed() == (before if seed is False else seed)


def test_arguments_from_python(monkeypatch):
    options = {"trainer_defaults": QUIET, "run": False, "save_config_callback": None}
    cli = LightningCLI(Net, Data, args={"model": {"width": 9}}, **options)
    assert cli.model.width == 9
    assert LightningCLI(Net, Data, args=cli.config, **options).model.width == 9
    monkeypatch.setattr(sys, "argv", ["program.py", "--model.width=2"])
    assert LightningCLI(Net, Data, **options).model.width == 2
    with pytest.warns(UserWarning, match="LightningCLI's args parameter .*--model.width=2.*--model.width=4"):
        assert LightningCLI(Net, Data, args=["--model.width=4"], **options).model.width == 4
