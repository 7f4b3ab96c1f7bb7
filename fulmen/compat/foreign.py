"""The import names of Lightning: `lightning.pytorch`, `lightning.fabric`, `pytorch_lightning` and `lightning_fabric`.

An import finder that is asked first serves a *view module* for each of their paths. A view shows the module of `fulmen`
at the same path: a class is the same under all its names, and what is assigned to a view is assigned to that module, so
that mocks and patches reach the code that runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder, PathEntryFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from fulmen.compat.finder import PATHS, PRIVATE_NAMES
from fulmen.compat.versions import VARIABLE, check_version, current_version
from fulmen.utilities.lazy import has_module, missing_module, missing_name

if TYPE_CHECKING:
    from importlib.metadata import Distribution, DistributionFinder

# Where the names below each root stand.
ROOTS = {
    "lightning.pytorch": "fulmen",
    "lightning.fabric": "fulmen.fabric",
    "lightning.data": "litdata",  # a package of its own, which Lightning passes on
    "lightning": "fulmen",
    "pytorch_lightning": "fulmen",
    "lightning_fabric": "fulmen.fabric",
}
PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")
# All that `lightning` itself has: its other names are below `lightning.pytorch` and `lightning.fabric`.
TOP_NAMES = (
    "Callback", "Fabric", "LightningDataModule", "LightningModule", "Trainer", "fabric", "pytorch", "seed_everything",
)  # fmt: skip
# Packages of Lightning that are something else than training, and where what they did is found.
OTHERS = {
    "app": "Lightning Apps ended with Lightning 2.5. Start programs by a scheduler, torchrun or Ray",
    "data": "it is a package of its own: `pip install litdata` and import `litdata`",
    "store": "it belongs to a hosted service. Save with `ModelCheckpoint` or `torch.save`",
    "lite": "it became Fabric: use `lightning.fabric.Fabric`",
}
# On which programs set levels and handlers.
LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
LISTING = "fulmen-views:"  # begins the entry of a view's `__path__` that lists paths which are no files
DISTRIBUTIONS_HOME = "fulmen.compat.distributions"


def home_of(path: str) -> str | None:
    """The module of fulmen that a path shows; None if it is below none of the roots.

    Example:
        >>> home_of("lightning.pytorch.callbacks.early_stopping")
        'fulmen.callbacks.early_stopping'
    """
    for root, home in ROOTS.items():
        if path == root or (path.startswith(f"{root}.") and root != "lightning"):
            return home + path[len(root) :]
    return None


class ForeignView(ModuleType):
    """The module of fulmen of the same path, under a foreign name. That module is imported when a name is asked for."""

    def __init__(self, name: str, home: str) -> None:
        super().__init__(name, f"The names of {home}.")
        vars(self).update(_home_name=home, _is_served=False)

    def _home(self) -> ModuleType:
        return importlib.import_module(vars(self)["_home_name"])

    def _names(self) -> Iterable[str]:
        return TOP_NAMES if self.__name__ == "lightning" else dir(self._home())

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return current_version()
        if name == "__all__":
            return _exported_names(self._home(), self._names())
        if name.startswith("__"):  # the import system asks for several of those before anything should be imported
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name)
        below = f"{self.__name__}.{name}"
        if below in ROOTS:
            return importlib.import_module(below)
        home = self._home()
        holder = find_holder(self.__name__, home, name)
        if holder is None:
            known = [known for known in self._names() if not known.startswith("_")]
            raise missing_name(self, name, known, sys._getframe(1), describe_absence(below))
        value = getattr(holder, name)
        shown = isinstance(value, ModuleType) and value.__name__ == f"{home.__name__}.{name}"
        return importlib.import_module(below) if shown else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        elif isinstance(value, ForeignView) and value.__name__ == f"{self.__name__}.{name}":
            # By the import system, or to undo a patch: the name has to be found again, and that is all.
            home = sys.modules.get(vars(self)["_home_name"])
            shown = sys.modules.get(vars(value)["_home_name"])
            if home is not None and shown is not None and not hasattr(home, name):
                setattr(home, name, shown)
        else:
            setattr(self._home(), name, value)

    def __delattr__(self, name: str) -> None:
        if name.startswith("__"):
            super().__delattr__(name)
        else:
            delattr(self._home(), name)

    def __dir__(self) -> list[str]:
        return sorted({*(name for name in vars(self) if name.startswith("__")), "__version__", *self._names()})


def find_holder(path: str, home: ModuleType, name: str) -> ModuleType | None:
    """The module that has a name of a view: the one that is shown, or the one that holds what is private."""
    if hasattr(home, name) and (path != "lightning" or name in TOP_NAMES):
        return home
    private = importlib.import_module(PRIVATE_NAMES)
    known = name.startswith("_") or f"{home.__name__.removeprefix('fulmen.')}.{name}" in vars(private)["PLACES"]
    return private if known and hasattr(private, name) else None


def _exported_names(home: ModuleType, names: Iterable[str]) -> list[str]:
    """What ``from view import *`` brings: what it brings from the module that is shown."""
    public = [name for name in names if not name.startswith("_")]
    return [name for name in home.__all__ if name in public] if hasattr(home, "__all__") else public


def describe_absence(path: str) -> str:
    """Why there is no such name here, and what does its work, where that is known."""
    root, _, rest = path.partition(".")
    part = rest.removeprefix("pytorch.").partition(".")[0]
    return f": {OTHERS[part]}" if root in PACKAGES and part in OTHERS else ""


class ForeignPaths(MetaPathFinder, Loader):
    """Serves the views, and tells `importlib.metadata` of the distributions that they stand in for.

    Attributes:
        after_import: what is done once a module has been imported, so that nothing is imported for it.
    """

    def __init__(self) -> None:
        self.after_import: dict[str, Callable[[], None]] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname in self.after_import:
            return self._find_followed(fullname, path)
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        home = home_of(fullname)
        if home is not None and has_module(home):
            return _make_spec(fullname, home, self)
        asked_from = sys._getframe(2)
        if asked_from.f_code.co_name == "_find_and_load_unlocked" and not fullname.endswith(".__main__"):
            raise missing_module(fullname, asked_from) or _absent_module(fullname)
        return None  # somebody only asks whether there is such a module

    def _find_followed(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = FollowedLoader(spec.loader, self.after_import[fullname])
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ForeignView(spec.name, home_of(spec.name) or "")

    def exec_module(self, module: ModuleType) -> None:
        """A view has no code; when it is reloaded, so is the module that it shows."""
        fields = vars(module)
        home = sys.modules.get(fields["_home_name"])
        if fields["_is_served"] and home is not None:
            importlib.reload(home)
        fields["_is_served"] = True

    def get_code(self, fullname: str) -> CodeType:
        """For ``python -m``: the module of fulmen is run."""
        code = f"import runpy; runpy.run_module({home_of(fullname)!r}, run_name='__main__', alter_sys=True)"
        return compile(code, fullname, "exec")

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        """Called by `importlib.metadata` alone, which is therefore imported already."""
        stand_ins: Iterator[Distribution] = importlib.import_module(DISTRIBUTIONS_HOME).find_stand_ins(context)
        return stand_ins


class FollowedLoader(Loader):
    """Loads as another loader does, and then does one thing more."""

    def __init__(self, loader: Loader, sequel: Callable[[], None]) -> None:
        self._loader = loader
        self._sequel = sequel

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._sequel()


class ViewListing(PathEntryFinder):
    """What `pkgutil` finds below a view beside files: the deep paths."""

    def __init__(self, entry: str) -> None:
        if not entry.startswith(LISTING):
            raise ImportError(f"{entry!r} lists no views.")
        self._package = entry.removeprefix(LISTING)

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> None:
        return None

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        for name in _names_below(self._package):
            yield prefix + name, bool(_names_below(f"{self._package}.{name}"))


def _names_below(package: str) -> list[str]:
    """The last parts of the paths right below a view that are no files."""
    if package == "lightning":
        return ["fabric", "pytorch"]
    below = f"{home_of(package)}.".removeprefix("fulmen.")
    return sorted({path.removeprefix(below).partition(".")[0] for path in PATHS if path.startswith(below)})


def _make_spec(fullname: str, home: str, loader: Loader) -> ModuleSpec:
    """Says of a view what is true of the module that it shows: its file, and whether it is a package."""
    shown = importlib.util.find_spec(home)
    folders = list(shown.submodule_search_locations or ()) if shown else []
    in_file = importlib.util.find_spec(PATHS.get(home.removeprefix("fulmen."), [home])[0])
    has_views = bool(_names_below(fullname))
    origin = in_file.origin if in_file else None
    spec = ModuleSpec(fullname, loader, origin=origin, is_package=bool(folders) or has_views)
    spec.has_location = origin is not None
    if spec.submodule_search_locations is not None:
        spec.submodule_search_locations += [] if fullname == "lightning" else folders
        spec.submodule_search_locations += [LISTING + fullname] if has_views else []
    return spec


def _absent_module(path: str) -> ModuleNotFoundError:
    reason = describe_absence(path) or ". fulmen stands in for Lightning here and has no such module."
    return ModuleNotFoundError(f"No module named {path!r}{reason}", name=path)


FINDER = ForeignPaths()


def install(version: str | None = None) -> None:
    """Makes programs and libraries that were written for Lightning run on fulmen, from this line on.

    ``import lightning``, ``lightning.pytorch``, ``lightning.fabric``, ``pytorch_lightning`` and ``lightning_fabric`` give
    what fulmen has at these paths, whether Lightning itself is installed or not. A second call changes at most the version.

    Args:
        version: what `__version__` and `importlib.metadata` answer, from "2.0.0" to "2.6.6"; by default that of the
            variable FULMEN_LIGHTNING_VERSION, of the installed stand-in, or "2.6.6".

    Raises:
        ImportError: Lightning itself has been imported in this process already.
        MisconfigurationException: there is no such version.

    Example:
        >>> import fulmen.compat
        >>> fulmen.compat.install()
        >>> import lightning.pytorch as pl
        >>> pl.Trainer.__module__
        'fulmen.trainer'
    """
    _refuse_real_package()
    if version is not None:
        os.environ[VARIABLE] = check_version(version)
    if FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, FINDER)
    sys.path_hooks.insert(0, ViewListing)
    followed = {
        "fulmen.trainer": _attach_views,
        "fulmen.utilities.rank_zero": follow_loggers,
        "lightning_utilities.core.rank_zero": _share_rank,
        "multiprocessing.spawn": _serve_new_processes,
    }
    for module, action in followed.items():
        if module in sys.modules:
            action()
        else:
            FINDER.after_import[module] = action


def serve_instead(name: str) -> None:
    """Puts the view in the place of the package of that name which is being imported and stands in for Lightning."""
    sys.modules.pop(name)
    install()
    importlib.import_module(name)


def _refuse_real_package() -> None:
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is not None and not isinstance(module, ForeignView):
            file = module.__file__ if hasattr(module, "__file__") else None
            what = f"Lightning itself has been imported in this process already: {name!r} from {file or 'no file'}."
            why = "Its classes and those of fulmen know nothing of each other."
            fix = "Call `fulmen.compat.install()` before anything imports it, or use `python -m fulmen run script.py`."
            raise ImportError(f"{what} {why} {fix}", name=name, path=file)


def _attach_views() -> None:
    """The private attributes that programs read, on the Trainer and its loops."""
    importlib.import_module("fulmen.compat.internals").attach_views()


def _share_rank() -> None:
    """One rank for all who ask whether they are the first process."""
    importlib.import_module("fulmen.compat.internals").share_rank()


def _serve_new_processes() -> None:
    importlib.import_module("fulmen.compat.spawned").serve_new_processes()


# ---------------------------------------------------------------------- messages


def follow_loggers() -> None:
    """Puts the logger of fulmen below those of Lightning, once it is there; a second call changes nothing.

    Programs quieten a training by ``logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)``, and send its
    messages to a file by a handler of ``logging.getLogger("lightning.pytorch")``.
    """
    own = logging.getLogger("fulmen")
    own.addFilter(is_wanted)
    own.parent = logging.getLogger("lightning.pytorch")


def is_wanted(record: logging.LogRecord) -> bool:
    """Whether the levels that the program gave to these loggers let a record pass.

    Examples:
        >>> record = logging.makeLogRecord({"levelno": logging.INFO})
        >>> is_wanted(record)
        True
        >>> logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        >>> is_wanted(record)
        False
        >>> logging.getLogger("pytorch_lightning").setLevel(logging.NOTSET)
    """
    known = logging.root.manager.loggerDict
    named = [known[name] for name in LOGGERS if name in known]
    return all(logger.level <= record.levelno for logger in named if isinstance(logger, logging.Logger))
