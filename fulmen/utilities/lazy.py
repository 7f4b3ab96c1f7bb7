"""Public names and sub-modules that are imported the first time somebody asks for them (PEP 562)."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def has_module(name: str) -> bool:
    """Could the module be imported? Its parents are imported to find out."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or was put together by hand
        return False


def lazy_exports(module_name: str, file: str) -> tuple[Callable, Callable, list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package whose names live in other modules.

    The names and where they live are read from the imports under `if TYPE_CHECKING:` in the package's own file, so that
    type checkers see the same list: ``__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)``.
    """
    with open(file, encoding="utf-8") as source:
        blocks = [node for node in ast.parse(source.read()).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    table = {alias.name: str(node.module) for node in imports for alias in node.names}

    def __getattr__(name: str) -> Any:
        submodule = f"{module_name}.{name}"
        if name in table:
            value = getattr(importlib.import_module(table[name]), name)
        elif not name.startswith("_") and has_module(submodule):
            value = importlib.import_module(submodule)
        else:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}", name=name)
        # Kept in the package, so the next access does not come here.
        setattr(sys.modules[module_name], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module_name]), *table})

    return __getattr__, __dir__, sorted(table)
