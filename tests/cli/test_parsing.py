"""Where values come from: files, environment, defaults and links; what is printed; how mistakes are answered."""

from __future__ import annotations

import importlib
import inspect
import re
import sys

import jsonargparse
import pytest
import torch
import yaml
from command_line import Data, Net, make_cli

import fulmen as pl
from fulmen.cli import LightningCLI
from fulmen.cli.parser import DOORS


def write(path, text):
    path.write_text(text)
    return str(path)


def printed(capsys, *args, **kwargs) -> str:
    with pytest.raises(SystemExit) as ended:
        make_cli(*args, **kwargs)
    assert ended.value.code == 0
    return capsys.readouterr().out


def refused(capsys, *args, **kwargs) -> str:
    """The error a mistake is answered with, without the usage above it."""
    with pytest.raises(SystemExit) as ended:
        make_cli(*args, **kwargs)
    assert ended.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


def test_files_are_merged_in_their_order_and_options_win_by_theirs(tmp_path):
    first = write(tmp_path / "first.yaml", "seed_everything: 1\nmodel: {width: 1, scale: 1.5}\n")
    second = write(tmp_path / "second.json", '{"model": {"width": 2}, "data": {"batch_size": 6}}')
    cli = make_cli("fit", "-c", first, "--config", second, "--trainer.max_epochs=2")
    assert (cli.model.width, cli.model.scale, cli.datamodule.batch_size) == (2, 1.5, 6)
    assert (cli.config.fit.seed_everything, cli.trainer.max_epochs) == (1, 2)
    late = make_cli("--model.width=9", "--config", first, run=False)
    assert late.model.width == 1
    assert make_cli("--config", first, "--model.width=9", run=False).model.width == 9


def test_one_file_for_all_commands_and_one_for_a_part(tmp_path):
    whole = write(tmp_path / "whole.yaml", "fit: {model: {width: 4}}\ntest: {model: {width: 5}}\n")
    part = write(tmp_path / "part.yaml", "width: 12\n")
    assert make_cli("--config", whole, "fit").model.width == 4
    assert make_cli("--model", part, run=False).model.width == 12


def test_the_environment_is_read_if_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PL_FIT__MODEL__WIDTH", "77")
    monkeypatch.setenv("PL_FIT__CONFIG", write(tmp_path / "env.yaml", "model: {width: 5, scale: 3.5}\n"))
    cli = make_cli("fit", parser_kwargs={"default_env": True})
    assert (cli.model.width, cli.model.scale) == (77, 3.5)
    assert make_cli("fit", "--model.width=1", parser_kwargs={"default_env": True}).model.width == 1
    assert make_cli("fit").model.width == 3


def test_parser_kwargs_for_all_and_for_one_command(tmp_path):
    whole = write(tmp_path / "whole.yaml", "fit: {model: {width: 21}}\n")
    own = write(tmp_path / "own.yaml", "model: {width: 31}\n")
    assert make_cli("fit", parser_kwargs={"default_config_files": [whole]}).model.width == 21
    assert make_cli("fit", parser_kwargs={"fit": {"default_config_files": [own]}}).model.width == 31


class Linked(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.batch_size", "model.width")
        parser.link_arguments("data.batch_size", "model.scale", compute_fn=lambda size: size / 2)


class LinkedObjects(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments(
            "data", "model.width", compute_fn=lambda data: data.batch_size + 1, apply_on="instantiate"
        )


def test_links_between_arguments():
    cli = make_cli("--data.batch_size=6", cls=Linked, run=False)
    assert (cli.model.width, cli.model.scale) == (6, 3.0)
    cli = make_cli("fit", "--data.batch_size=6", cls=LinkedObjects)
    assert cli.model.width == 7
    assert cli.model.hparams["width"] == 7  # the value, not that it is linked


def test_print_config(capsys):
    text = printed(capsys, "fit", "--model.width=9", "--print_config")
    config = yaml.safe_load(text)
    assert text.startswith(f"# fulmen=={pl.__version__}\n")
    assert config["model"] == {"width": 9, "scale": 1.0} and config["trainer"]["precision"] is None
    assert [*config] == [
        "seed_everything",
        "trainer",
        "model",
        "data",
        "optimizer",
        "lr_scheduler",
        "ckpt_path",
        "weights_only",
    ]
    assert config["trainer"].keys() == inspect.signature(pl.Trainer).parameters.keys()
    assert "precision" not in yaml.safe_load(printed(capsys, "fit", "--print_config=skip_null"))["trainer"]
    changed = yaml.safe_load(printed(capsys, "fit", "--model.width=9", "--print_config=skip_default"))
    assert changed == {"model": {"width": 9}}


def test_help_explains_each_argument(capsys):
    text = printed(capsys, "fit", "-h")
    flat = " ".join(text.split())
    for name in inspect.signature(pl.Trainer).parameters:
        entry = flat.partition(f"--trainer.{name} ")[2]
        assert entry, name
    assert "Training ends after this many epochs; -1 is no limit." in flat
    assert "how many %s of them (type: int, default: 3)" in flat
    assert "--optimizer.help" in text and "--ckpt_path" in text and "--data.batch_size" in text
    assert "fulmen.callbacks.EarlyStopping" in flat
    assert "--train_dataloaders" not in text
    top = printed(capsys, "-h")
    assert "{fit,validate,test,predict}" in top and "One pass over the validation loaders." in " ".join(top.split())


def test_help_of_a_class(capsys):
    text = printed(capsys, "--trainer.callbacks.help=EarlyStopping", run=False)
    assert "--trainer.callbacks.monitor MONITOR" in text


@pytest.mark.parametrize("door", DOORS)
def test_public_classes_need_no_more_on_a_command_line_than_in_python(door):
    module = importlib.import_module(f"fulmen.{door}")
    for name in module.__all__:
        cls = getattr(module, name)
        if not inspect.isclass(cls) or inspect.isabstract(cls):
            continue
        parameters = inspect.signature(cls).parameters.values()
        needed = {
            p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "made", fail_untyped=False)
        lines = parser.format_help().split("--made.")
        required = {re.match(r"\w+", line)[0] for line in lines if "(required" in line}
        assert required <= needed, (name, required - needed)


def test_mistakes_in_options_name_the_nearest(capsys):
    message = refused(capsys, "--model.widht=7", run=False)
    assert "unrecognized arguments: --model.widht=7" in message and "Did you mean `model.width`?" in message
    message = refused(capsys, "fit", "--trainer.max_epohcs=7")
    assert "Did you mean `trainer.max_epochs`?" in message
    message = refused(capsys, "--trainer.callbacks=EarlyStoping", run=False)
    assert "Did you mean `EarlyStopping`?" in message
    message = refused(capsys, "--model.width=many", run=False)
    assert 'key "model.width"' in message and "int" in message and "many" in message
    message = refused(capsys, "--model=torch.nn.Linear", model=None, run=False)
    assert "LightningModule" in message and "torch.nn.Linear" in message
    assert "fit" in refused(capsys, "fitt")


@pytest.mark.parametrize(("text", "expected"), [
    ("seed_everything: 1\nmodel:\n  widht: 3\n", ["line 3", "widht", "Did you mean `model.width`?"]),
    ("seed_everything: 1\nmodel:\n  width: x\n", ["line 3", "model.width", "int"]),
    ("model: [\n", ["line 2"]),
    ("modle:\n  width: 3\n", ["line 2", "modle", "Did you mean `model.width`?"]),
    ("trainer:\n  callbacks:\n    class_path: EarlyStoping\n", ["EarlyStoping", "Did you mean `EarlyStopping`?"]),
])  # fmt: skip
@pytest.mark.parametrize("command", [[], ["fit"]])
def test_mistakes_in_files_name_the_line(capsys, tmp_path, text, expected, command):
    good = write(tmp_path / "good.yaml", "model:\n  width: 3\n")
    path = write(tmp_path / "wrong.yaml", text)
    message = refused(capsys, *command, "--config", good, "--config", path, run=bool(command))
    if expected[0].startswith("line"):
        assert f"In {path!r}, " in message
    assert all(part in message for part in expected), message


def test_a_missing_file_is_named(capsys):
    assert "nowhere.yaml" in refused(capsys, "--config=nowhere.yaml", run=False)


def test_the_missing_package_is_named(monkeypatch):
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "jsonargparse" or name.startswith("fulmen.cli")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pl, "cli", raising=False)
    monkeypatch.setattr("fulmen.utilities.optional.is_installed", lambda *_: False)
    with pytest.raises(ModuleNotFoundError, match=r"`jsonargparse` is needed.*pip install 'fulmen\[cli\]'"):
        importlib.import_module("fulmen.cli")


def test_functions_of_torch_are_printed_by_their_path(capsys):
    class WithFunction(Net):
        def __init__(self, function: "callable" = torch.softmax):  # noqa: UP037
            super().__init__()

    from collections.abc import Callable

    WithFunction.__init__.__annotations__["function"] = Callable
    assert "function: torch.softmax" in printed(capsys, "--print_config", model=WithFunction, data=Data, run=False)
