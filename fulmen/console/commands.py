"""The `fulmen` command: finds out what is to be done, and imports only that."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fulmen.utilities.errors import suggest_name

OWN_VERSION: str = sys.modules["fulmen"].__version__


class Command(NamedTuple):
    """One command.

    Attributes:
        purpose: what the list of commands says about it.
        function: ``module:name`` of the function that is called with the arguments after the command's name.
        package: the optional package without which it cannot run.
        extra: the extra of fulmen that brings this package.
    """

    purpose: str
    function: str
    package: str = ""
    extra: str = ""


_TRAINING = "fulmen.console.training"
COMMANDS = {
    "fit": Command("train a model that is named by its import path", f"{_TRAINING}:run_fit", "jsonargparse", "cli"),
    "validate": Command("run its validation alone", f"{_TRAINING}:run_validate", "jsonargparse", "cli"),
    "test": Command("run its test", f"{_TRAINING}:run_test", "jsonargparse", "cli"),
    "predict": Command("run its prediction", f"{_TRAINING}:run_predict", "jsonargparse", "cli"),
    "run": Command("run a script or module that was written for Lightning", "fulmen.console.run:run_program"),
    "check": Command(
        "say which names of Lightning a program uses, and how far each is served", "fulmen.compat.check:run_check"
    ),
    "demo": Command("train, test and predict on small images of digits", "fulmen.console.demo:run_demo"),
    "doctor": Command(
        "say what is installed here, what is missing and what is wrong", "fulmen.console.doctor:run_doctor"
    ),
    "fabric": Command("run a script that uses Fabric on several processes", "fulmen.fabric.cli:main"),
    "consolidate": Command("make one file from a sharded checkpoint", "fulmen.checkpoint.consolidate:main"),
    "upgrade": Command("bring checkpoints of older versions up to date", "fulmen.checkpoint.upgrade:main"),
}


def describe_usage() -> str:
    """What `fulmen -h` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fulmen COMMAND ...", "", *rows, "", "`fulmen COMMAND -h` explains each of them."])


def run_command(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name; the program's own arguments by default.

    Raises:
        SystemExit: with status 2 if there is no such command, with 1 if the package it needs is not installed, else as
            the command itself ends.

    Example:
        >>> run_command(["--version"])
        fulmen 0...
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in ("-h", "--help"):
        print(describe_usage())
    elif name in ("-V", "--version"):
        print(f"fulmen {OWN_VERSION}")
    elif name in COMMANDS:
        _load_function(name, COMMANDS[name])(given[1:])
    else:
        mistake = f"There is no command {name!r}.{suggest_name(name, COMMANDS)}" if name else "Name a command."
        print(f"{describe_usage()}\n\n{mistake}", file=sys.stderr)
        sys.exit(2)


def _load_function(name: str, command: Command) -> Callable[[list[str]], None]:
    if command.package and importlib.util.find_spec(command.package) is None:
        what = f"`fulmen {name}` needs `{command.package}`, which is not installed."
        sys.exit(f'{what} Run `pip install "fulmen[{command.extra}]"`.')
    module, _, function = command.function.partition(":")
    found: Callable[[list[str]], None] = vars(importlib.import_module(module))[function]
    return found
