"""Import finders that serve the table of paths: one for ours, always on, and one for the original package names."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from types import ModuleType
from typing import Any

from fulmen.compat.names import API_VERSION, DISTRIBUTIONS, PATHS, ROOTS, absent_advice
from fulmen.utilities.lazy import has_module

# The module name under which `python -m fulmen run script.py` runs the script, and the variable with the script's path.
# Processes started later (`spawn`, `python -m`) import their main module by this name and so get the same names.
SCRIPT_MODULE = "fulmen.compat.script"
SCRIPT_VARIABLE = "FULMEN_SCRIPT"


class ViewModule(ModuleType):
    """A module without content of its own: reading and writing its names happens in the modules it shows."""

    def __init__(self, name: str, homes: Sequence[str]) -> None:
        super().__init__(name, f"The names of {', '.join(homes)}.")
        vars(self).update(_homes=tuple(homes), _originals={})

    def _modules(self) -> Iterator[ModuleType]:
        return map(importlib.import_module, self._homes)

    def _holder(self, name: str) -> ModuleType | None:
        return next((module for module in self._modules() if hasattr(module, name)), None)

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            public = (getattr(module, "__all__", None) or vars(module) for module in self._modules())
            return sorted({name for names in public for name in names if not name.startswith("_")})
        if name.startswith("__"):  # the import system asks for several before anything should be imported
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        # A path of the table goes before a module that one of the homes happens to import.
        below = f"{self.__name__}.{name}"
        if has_module(below):
            return importlib.import_module(below)
        if holder := self._holder(name):
            return getattr(holder, name)
        text = f"module {self.__name__!r} has no attribute {name!r}; fulmen looked in {', '.join(self._homes)}"
        raise AttributeError(text, name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        belongs_here = name.startswith("__") or getattr(value, "__name__", None) == f"{self.__name__}.{name}"
        holder = None if belongs_here else self._holder(name) or next(self._modules(), None)
        if holder is None:
            return super().__setattr__(name, value)
        if hasattr(holder, name):
            self._originals.setdefault(name, getattr(holder, name))
        setattr(holder, name, value)

    def __delattr__(self, name: str) -> None:
        holder = None if name in vars(self) else self._holder(name)
        if holder is None:
            super().__delattr__(name)
        elif name in self._originals:
            # Patching tools see no such name in this module's dictionary, and undo with a deletion.
            setattr(holder, name, self._originals.pop(name))
        else:
            delattr(holder, name)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *(name for module in self._modules() for name in dir(module))})


class ViewLoader(Loader):
    def __init__(self, homes: Sequence[str], version: str | None = None) -> None:
        self.homes = homes
        self.version = version

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ViewModule(spec.name, self.homes)

    def exec_module(self, module: ModuleType) -> None:
        spec = importlib.util.find_spec(self.homes[0])
        if spec is not None and spec.has_location:
            module.__file__ = spec.origin
        if self.version is not None:
            module.__version__ = self.version  # type: ignore[attr-defined]


class DeepPaths(MetaPathFinder):
    """Serves `fulmen.` paths that are no files here. It is asked last, so a file always wins."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith("fulmen."):
            return None
        if fullname == SCRIPT_MODULE and SCRIPT_VARIABLE in os.environ:
            return self._script(os.environ[SCRIPT_VARIABLE])
        below = fullname.removeprefix("fulmen.")
        if homes := [home for home in PATHS.get(below, ()) if has_module(home)]:
            return ModuleSpec(fullname, ViewLoader(homes), is_package=True)
        if advice := absent_advice(below):
            raise ModuleNotFoundError(f"`{fullname}` is not part of fulmen. {advice}", name=fullname)
        return None

    @staticmethod
    def _script(path: str) -> ModuleSpec | None:
        install()
        folder = os.path.dirname(path)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        return importlib.util.spec_from_file_location(SCRIPT_MODULE, path)


class OriginalNames(MetaPathFinder):
    """Serves `lightning`, `pytorch_lightning` and `lightning_fabric`: each module is a view of ours."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        root = max((root for root in ROOTS if f"{fullname}.".startswith(f"{root}.")), key=len, default="")
        # `lightning` itself has the public names and two packages, and no other sub-modules.
        if not root or (root == "lightning" and fullname != root):
            return None
        home = ROOTS[root] + fullname.removeprefix(root)
        try:
            ours = importlib.util.find_spec(home)
        except ModuleNotFoundError as error:
            if error.name != home:
                return None
            # Left out on purpose, and the message says what to do.
            raise ModuleNotFoundError(str(error).replace(home, fullname), name=fullname) from None
        if ours is None:
            return None
        homes = ours.loader.homes if isinstance(ours.loader, ViewLoader) else (home,)
        return ModuleSpec(fullname, ViewLoader(homes, API_VERSION if fullname == root else None), is_package=True)

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        wanted = (getattr(context, "name", None) or "").replace("_", "-").lower()
        return (ApiVersion(name) for name in DISTRIBUTIONS if wanted in ("", name))


class ApiVersion(Distribution):
    """Answers `importlib.metadata.version("lightning")` with the version of the API, because packages ask."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        text = f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {API_VERSION}\n"
        return text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"`{self._name}` is answered by fulmen and has no files of its own.")


def serve_deep_paths() -> None:
    """Make the paths of the table importable below `fulmen`; called once, when `fulmen` is imported."""
    sys.meta_path.append(DeepPaths())


def install() -> None:
    """From now on ``import lightning`` (and `pytorch_lightning`, `lightning_fabric`) gives fulmen.

    A RuntimeError says so if the real package was imported before.
    """
    if any(isinstance(finder, OriginalNames) for finder in sys.meta_path):
        return
    if real := sorted(ROOTS.keys() & sys.modules.keys()):
        what = f"`{real[0]}` has already been imported from {getattr(sys.modules[real[0]], '__file__', 'elsewhere')}."
        raise RuntimeError(f"{what} Its classes would be mixed with ours. Call `fulmen.compat.install()` before that.")
    sys.meta_path.insert(0, OriginalNames())
    # Scripts choose how much they want to read with `logging.getLogger("lightning.pytorch").setLevel(...)`.
    for name in ROOTS:
        logging.root.manager.loggerDict[name] = logging.getLogger("fulmen")
