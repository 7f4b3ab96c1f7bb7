"""Public names and sub-modules that are imported the first time somebody asks for them (PEP 562)."""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import itertools
import opcode
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from fulmen.utilities.errors import find_nearest_name, suggest_name


def has_module(name: str) -> bool:
    """Could the module be imported? Its parents are imported to find out."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or was put together by hand
        return False


def lazy_exports(module_name: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names live in other modules.

    The names and where they live are those of the imports under `if TYPE_CHECKING:` in the module that calls this, so
    that type checkers see the same list::

        if TYPE_CHECKING:
            from package.place import Name
        else:
            __getattr__, __dir__ = lazy_exports(__name__)
    """
    table = _find_skipped_imports(sys._getframe(1).f_code)

    def __getattr__(name: str) -> Any:
        submodule = f"{module_name}.{name}"
        if table.get(name, module_name) != module_name:
            value = getattr(importlib.import_module(table[name]), name)
        elif not name.startswith("_") and has_module(submodule):
            value = importlib.import_module(submodule)
        else:
            raise missing_name(sys.modules[module_name], name, table, sys._getframe(1))
        # Kept in the package, so the next access does not come here.
        setattr(sys.modules[module_name], name, value)
        return value

    def __dir__() -> list[str]:
        special = (name for name in vars(sys.modules[module_name]) if name.startswith("__"))
        return sorted({*special, *table})

    return __getattr__, __dir__


def _find_skipped_imports(code: CodeType) -> dict[str, str]:
    """The module of each name that is imported under `if TYPE_CHECKING:`.

    Read from the compiled module: sources may lie in an archive, or not be there at all.
    """
    table = {}
    module = ""
    steps = itertools.dropwhile(
        lambda step: step.argval != "TYPE_CHECKING" or "LOAD" not in step.opname, dis.get_instructions(code)
    )
    for step in steps:
        if step.opname == "IMPORT_NAME":
            module = step.argval
        elif step.opname == "IMPORT_FROM":
            table[step.argval] = module
    return table


def missing_name(module: Any, name: str, known: Iterable[str], asked_from: FrameType, where: str = "") -> Exception:
    """The error for a name that a module does not have, with the one that was meant.

    Python replaces the AttributeError of ``from module import name`` by an error of its own, so that statement gets
    the final one.
    """
    hint = "" if name.startswith("__") else _suggestion(name, tuple(known))
    here = asked_from.f_code.co_code[asked_from.f_lasti] if asked_from.f_lasti >= 0 else None
    if here == opcode.opmap["IMPORT_FROM"]:
        path = module.__file__ if hasattr(module, "__file__") else None
        text = f"cannot import name {name!r} from {module.__name__!r} ({path or 'unknown location'}){where}.{hint}"
        return ImportError(text, name=module.__name__, path=path)
    return AttributeError(f"module {module.__name__!r} has no attribute {name!r}{where}.{hint}", name=name)


@functools.lru_cache(maxsize=1024)
def _suggestion(name: str, known: tuple[str, ...]) -> str:
    """Asked again and again by those who only try whether a package has a name."""
    return suggest_name(name, known)


def missing_module(name: str, asked_from: FrameType) -> ModuleNotFoundError | None:
    """The error of an import statement for a module that is not there, if one of that package is nearly called so.

    None where somebody only asks whether there is such a module.
    """
    package, _, last = name.rpartition(".")
    if asked_from.f_code.co_name != "_find_and_load_unlocked":
        return None
    parent = sys.modules.get(package)  # a package: Python itself complains about what lies below a module
    known = [] if parent is None else [module.name for module in pkgutil.iter_modules(parent.__path__)]
    hint = suggest_name(name, [f"{package}.{module}" for module in known if find_nearest_name(last, [module])])
    return ModuleNotFoundError(f"No module named {name!r}.{hint}", name=name) if hint else None
