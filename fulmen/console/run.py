"""``fulmen run``: a script or module that was written for Lightning, on fulmen."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from fulmen.compat.foreign import install
from fulmen.utilities.errors import MisconfigurationException


def make_parser() -> argparse.ArgumentParser:
    """The options that stand before the program; all behind it is its own."""
    parser = argparse.ArgumentParser(
        prog="fulmen run", usage="fulmen run [--lightning-version VERSION] (SCRIPT | -m MODULE) ...", allow_abbrev=False,
        description="Runs a program that was written for Lightning on fulmen, otherwise as `python` would run it.",
    )  # fmt: skip
    answered = "what programs that ask for Lightning's version are answered, from 2.0.0 to 2.6.6"
    parser.add_argument("--lightning-version", metavar="VERSION", help=answered)
    parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module, as for `python -m`")
    parser.add_argument("program", metavar="SCRIPT", help="a Python file, or with -m a module")
    return parser


def run_program(arguments: Sequence[str]) -> None:
    """Runs a program under the import names of Lightning.

    Raises:
        SystemExit: as the program ends; with status 2 if there is no such file, and 1 if there is no such module.
    """
    own_from = _count_options(arguments) + 1
    parser = make_parser()
    options = parser.parse_args(arguments[:own_from])
    path = os.path.abspath(options.program)
    folder = os.getcwd() if options.is_module else os.path.dirname(os.path.realpath(path))
    try:
        install(options.lightning_version)
    except (ImportError, MisconfigurationException) as error:
        parser.error(str(error))
    if not (sys.version_info >= (3, 11) and sys.flags.safe_path):
        sys.path[0] = folder
    try:
        code, main = load_module(options.program) if options.is_module else load_script(path)
    except OSError as error:
        parser.error(f"`{options.program}` cannot be read: {error.strerror}.")
    sys.argv[:] = [str(main.__file__) if options.is_module else options.program, *arguments[own_from:]]
    sys.modules["__main__"] = main
    try:
        exec(code, vars(main))
    except BaseException:
        hide_frames_before(code.co_filename)
        raise


def _count_options(arguments: Sequence[str]) -> int:
    """How many words stand before the program."""
    count = 0
    while count < len(arguments) and arguments[count].startswith("-"):
        count += 2 if arguments[count] == "--lightning-version" else 1
    return count


def load_script(path: str) -> tuple[CodeType, ModuleType]:
    """The code of a file, and the main module that it is to run in.

    Raises:
        OSError: it cannot be read.
    """
    with io.open_code(path) as file:
        source = file.read()
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    try:
        return compile(source, path, "exec", dont_inherit=True), main
    except SyntaxError:
        hide_frames_before(path)
        raise


def load_module(name: str) -> tuple[CodeType, ModuleType]:
    """The code of a module, or of the `__main__` of a package, and the main module that it is to run in.

    Raises:
        SystemExit: there is none, or none that can be run.
    """
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        sys.exit(f"fulmen run: {error}")
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    if spec is None or code is None:
        sys.exit(f"fulmen run: There is no module {name!r} that could be run. A package needs a module `__main__`.")
    main = ModuleType("__main__")
    main.__spec__ = spec
    main.__loader__ = loader
    main.__package__ = spec.parent
    main.__file__ = spec.origin
    return code, main


def hide_frames_before(file: str) -> None:
    """Lets the traceback that ends the process begin where the program does."""
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename != file:
            trace = trace.tb_next
        hook(kind, error.with_traceback(trace), trace)

    sys.excepthook = show
