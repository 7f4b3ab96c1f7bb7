"""``fulmen fit``, ``validate``, ``test`` and ``predict``: a `LightningCLI` for classes named by their import paths."""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, cast

from fulmen.cli.lightning_cli import LightningCLI
from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule
from fulmen.utilities.errors import suggest_name

IMPORT_PATH = re.compile(r"[^\W\d]\w*([.:][^\W\d]\w*)+")
USAGE = """usage: fulmen {stage} [CLI | MODEL [DATA]] [OPTIONS]

  CLI    a subclass of `LightningCLI`
  MODEL  a `LightningModule` class, whose arguments are --model.* then; without it, choose one with --model
  DATA   a `LightningDataModule` class, whose arguments are --data.* then; without it, choose one with --data

Classes are written package.module.Class or package.module:Class, and are found from the current folder, too.
"""


class TargetError(ValueError):
    """What was named to be trained is not there, or is something else."""


def import_target(path: str) -> type[Any]:
    """The class under ``package.module.Class`` or ``package.module:Class``.

    Raises:
        TargetError: there is no such module or name, or it is not a class.

    Example:
        >>> import_target("fulmen:LightningModule").__name__
        'LightningModule'
    """
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise TargetError(f"`{path}`: there is no module `{error.name}` on the path or in {os.getcwd()}.") from None
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:
        found = None
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        what = "has no class" if found is None else f"has a {type(found).__name__}, which is no class, called"
        raise TargetError(f"`{path}`: the module `{module_name}` {what} `{name}`.{suggest_name(name, classes)}")
    return cast(type[Any], found)


def make_command_line(targets: Sequence[str]) -> functools.partial[LightningCLI]:
    """What makes the command line, and so runs it, for the import paths that were given.

    Raises:
        TargetError: they are not a `LightningCLI`, or a `LightningModule` with or without a `LightningDataModule`.
    """
    classes = [import_target(path) for path in targets]
    if not classes:
        return functools.partial(LightningCLI)
    first = classes[0]
    if len(classes) == 1 and issubclass(first, LightningCLI):
        return functools.partial(first)
    if len(classes) <= 2 and issubclass(first, LightningModule) and issubclass(classes[-1], LightningDataModule):
        return functools.partial(LightningCLI, first, classes[1])
    if len(classes) == 1 and issubclass(first, LightningModule):
        return functools.partial(LightningCLI, first)
    received = ", ".join(f"`{path}`" for path in targets)
    what = "Expected a `LightningCLI`, or a `LightningModule` that may be followed by a `LightningDataModule`"
    raise TargetError(f"{what}, received {received}.")


def run_stage(stage: str, arguments: Sequence[str]) -> None:
    """Runs a verb of the Trainer with what the command line says."""
    words = list(arguments)
    targets = []
    while words and IMPORT_PATH.fullmatch(words[0]):
        targets.append(words.pop(0))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        run_command_line = make_command_line(targets)
    except TargetError as error:
        sys.exit(f"fulmen {stage}: {error}")
    if "-h" in words or "--help" in words:
        print(USAGE.format(stage=stage))
    sys.argv = ["fulmen", stage, *words]  # processes that are started again are given the original ones
    run_command_line()


run_fit = functools.partial(run_stage, "fit")
run_validate = functools.partial(run_stage, "validate")
run_test = functools.partial(run_stage, "test")
run_predict = functools.partial(run_stage, "predict")
