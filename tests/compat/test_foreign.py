"""The import names of Lightning, switched on in this process and off again."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest

import fulmen
import fulmen.compat
from fulmen.checkpoint.lightning_format import API_VERSION
from fulmen.compat.finder import PATHS
from fulmen.compat.foreign import FINDER, PACKAGES, ForeignView, ViewListing
from fulmen.compat.versions import NEWEST, VARIABLE
from fulmen.utilities.errors import MisconfigurationException

FILES = [module.name for module in pkgutil.walk_packages(fulmen.__path__, "fulmen.") if "__main__" not in module.name]


def take_away() -> None:
    """What `install` did to this process."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
        sys.path_hooks.remove(ViewListing)
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    spawn = importlib.import_module("multiprocessing.spawn")
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)
    monkeypatch.setenv(VARIABLE, "")
    fulmen.compat.install()
    yield
    take_away()


def test_a_class_is_the_same_under_all_names():
    import lightning as L
    import lightning.pytorch as pl
    import lightning_fabric
    import pytorch_lightning
    from lightning.fabric import Fabric
    from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint
    from pytorch_lightning.core.module import LightningModule

    assert L.Trainer is pl.Trainer is pytorch_lightning.Trainer is fulmen.Trainer
    assert Fabric is lightning_fabric.Fabric is L.Fabric is fulmen.Fabric
    assert ModelCheckpoint is fulmen.callbacks.ModelCheckpoint and LightningModule is fulmen.LightningModule
    assert pl.callbacks.progress.rich_progress.RichProgressBar is fulmen.callbacks.RichProgressBar
    assert L.pytorch is pl and L.fabric is sys.modules["lightning.fabric"]


@pytest.mark.parametrize("root", ["lightning.pytorch", "pytorch_lightning"])
def test_every_deep_path_is_there(root):
    for path in PATHS:
        view = importlib.import_module(f"{root}.{path}")
        assert view.__name__ == f"{root}.{path}" and view.__spec__.name == view.__name__
        assert set(dir(view)) >= {name for name in dir(sys.modules[f"fulmen.{path}"]) if not name.startswith("__")}


def test_private_names_are_there_where_fulmen_has_a_file_of_that_path_too():
    from fulmen.compat.private_names import PLACES

    for full in PLACES:
        path, _, name = full.rpartition(".")
        root = "lightning." if path.startswith("fabric.") else "lightning.pytorch."
        assert hasattr(importlib.import_module(root + path), name), full
    with pytest.raises(ImportError, match="TPUAccelerator"):
        from lightning.pytorch.callbacks import TPUAccelerator  # noqa: F401  (it is known at another path)


def test_star_imports_bring_what_they_bring_from_fulmen():
    for path in ("", ".callbacks", ".loggers", ".core.module", ".trainer.states", ".utilities.rank_zero"):
        ours: dict[str, object] = {}
        foreign: dict[str, object] = {}
        exec(f"from fulmen{path} import *", ours)
        exec(f"from lightning.pytorch{path} import *", foreign)
        assert foreign.keys() == ours.keys() and len(foreign) > 1, path
    names: dict[str, object] = {}
    exec("from lightning import *", names)
    assert {"Trainer", "Fabric", "LightningModule", "LightningDataModule", "Callback", "seed_everything"} <= set(names)


def test_what_a_root_does_not_have_is_not_there():
    lightning = importlib.import_module("lightning")
    assert not hasattr(lightning, "callbacks") and not hasattr(lightning, "SyncBatchNorm")
    assert importlib.util.find_spec("lightning.callbacks") is None
    assert importlib.util.find_spec("lightning.app") is None
    assert importlib.util.find_spec("lightning.pytorch.callbacks.timer") is not None


@pytest.mark.parametrize(
    ("statement", "kind", "words"),
    [
        ("import lightning.app", ModuleNotFoundError, ["lightning.app", "scheduler"]),
        ("from lightning.app import LightningApp", ModuleNotFoundError, ["lightning.app", "scheduler"]),
        ("import lightning.pytorch.calbacks", ModuleNotFoundError, ["calbacks", "`lightning.pytorch.callbacks`"]),
        ("import lightning.pytorch.core.modul", ModuleNotFoundError, ["`lightning.pytorch.core.module`"]),
        ("import pytorch_lightning.nothing", ModuleNotFoundError, ["pytorch_lightning.nothing", "fulmen"]),
        ("import lightning.trainer", ModuleNotFoundError, ["lightning.trainer"]),
        ("from lightning.pytorch import Trainr", ImportError, ["Trainr", "lightning.pytorch", "`Trainer`"]),
        ("from lightning import Callbak", ImportError, ["Callbak", "`Callback`"]),
        ("from lightning.pytorch.core.module import LightningModul", ImportError, ["`LightningModule`"]),
        ("import lightning; lightning.app", AttributeError, ["lightning", "app", "scheduler"]),
        ("import lightning.pytorch as pl; pl.callbacks.Timr", AttributeError, ["Timr", "`Timer`"]),
    ],
)
def test_what_is_missing_is_named_with_what_was_meant(statement, kind, words):
    with pytest.raises(kind) as raised:
        exec(statement, {})
    assert all(word in str(raised.value) for word in words), raised.value


def test_mocks_and_assignments_reach_the_code_that_runs_and_are_undone():
    import lightning.pytorch as pl
    import lightning.pytorch.callbacks.model_checkpoint as view

    import fulmen.callbacks.checkpointing as checkpointing

    real = checkpointing.ModelCheckpoint
    with mock.patch("lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint", "patched"):
        assert checkpointing.ModelCheckpoint == view.ModelCheckpoint == "patched"
    assert checkpointing.ModelCheckpoint is view.ModelCheckpoint is real

    trainer = fulmen.Trainer
    for _ in range(2):  # what the first time left would show
        with mock.patch("pytorch_lightning.Trainer", "patched"):
            assert fulmen.Trainer == pl.Trainer == "patched"
        assert fulmen.Trainer is pl.Trainer is trainer
    with mock.patch.object(pl.callbacks, "Timer") as timer:
        assert fulmen.callbacks.Timer is timer
    assert inspect.isclass(fulmen.callbacks.Timer)
    with mock.patch("lightning.pytorch.callbacks", "patched"):
        assert fulmen.callbacks == pl.callbacks == "patched"
    assert (
        fulmen.callbacks is sys.modules["fulmen.callbacks"]
        and pl.callbacks is sys.modules["lightning.pytorch.callbacks"]
    )

    view.added = 1
    assert checkpointing.added == 1
    del view.added
    assert not hasattr(checkpointing, "added") and not hasattr(view, "added")
    with mock.patch("lightning.pytorch.added_by_mock", 2, create=True):
        assert fulmen.added_by_mock == 2
    assert not hasattr(fulmen, "added_by_mock")


def test_a_name_of_several_modules_is_put_back_where_it_was():
    states = importlib.import_module("lightning.pytorch.utilities.parsing")
    homes = [importlib.import_module(home) for home in PATHS["utilities.parsing"]]
    before = [dict(vars(home)) for home in homes]
    owner = next(home for home in homes[1:] if (set(vars(home)) - set(dir(homes[0]))))
    name = next(name for name in sorted(set(vars(owner)) - set(dir(homes[0]))) if not name.startswith("_"))
    with mock.patch.object(states, name, "patched"):
        assert sum(vars(home).get(name) == "patched" for home in homes) == 1
    assert [dict(vars(home)) for home in homes] == before


def test_pickles_by_old_names_load():
    for path in ("lightning.pytorch.callbacks.early_stopping", "pytorch_lightning.callbacks"):
        assert pickle.loads(f"c{path}\nEarlyStopping\n.".encode()) is fulmen.callbacks.EarlyStopping
    states = importlib.import_module("pytorch_lightning.trainer.states")
    assert pickle.loads(pickle.dumps(states.TrainerFn.FITTING)) is states.TrainerFn.FITTING


def test_packages_list_what_is_below_them():
    import lightning.pytorch as pl

    assert [(module.name, module.ispkg) for module in pkgutil.iter_modules(sys.modules["lightning"].__path__)] == [
        ("fabric", True), ("pytorch", True)
    ]  # fmt: skip
    found = {module.name for module in pkgutil.walk_packages(pl.__path__, "lightning.pytorch.")}
    # Those below what is a file here and a package there are listed by that package itself.
    assert found >= {f"lightning.pytorch.{path}" for path in PATHS if path.startswith(("core.", "tuner."))}
    assert found >= {name.replace("fulmen", "lightning.pytorch", 1) for name in FILES}
    assert {module.name for module in pkgutil.iter_modules(pl.plugins.__path__)} == {
        "environments", "io", "layer_sync", "precision"
    }  # fmt: skip
    assert {module.name for module in pkgutil.iter_modules(pl.core.__path__)} == {
        "datamodule", "hooks", "mixins", "module", "optimizer", "saving"
    }  # fmt: skip


def test_views_say_of_themselves_what_is_true():
    import lightning.pytorch as pl
    import lightning.pytorch.callbacks.timer as timer

    assert pl.__file__ == fulmen.__file__ and pl.__path__[0] == os.path.dirname(fulmen.__file__)
    assert timer.__file__ == sys.modules["fulmen.callbacks.timer"].__file__ and not hasattr(timer, "__path__")
    assert pl.__package__ == "lightning.pytorch" and timer.__package__ == "lightning.pytorch.callbacks"
    assert timer.__spec__.parent == "lightning.pytorch.callbacks" and timer.__spec__.origin == timer.__file__
    assert inspect.getmodule(timer) is timer and inspect.getsource(timer).startswith('"""')
    assert inspect.getmodule(pl.Trainer) is sys.modules["fulmen.trainer"]
    assert "lightning.pytorch" in repr(pl) and "Trainer" in dir(pl) and isinstance(pl, ModuleType)


def test_reloading_a_view_reloads_what_it_shows():
    view = importlib.import_module("lightning.pytorch.utilities.memory")
    home = importlib.import_module("fulmen.utilities.memory")
    before = vars(home).copy()
    try:
        home.is_oom_error = None
        assert importlib.reload(view) is view
        assert callable(view.is_oom_error) and home.is_oom_error is view.is_oom_error
        assert importlib.reload(importlib.import_module("lightning.pytorch.core.module"))
        assert importlib.reload(sys.modules["lightning.pytorch"]).Trainer is fulmen.Trainer
    finally:
        vars(home).update(before)


def test_versions_are_answered_in_every_way_that_asks():
    import lightning
    import lightning.fabric
    import lightning.pytorch
    from lightning_utilities.core.imports import RequirementCache, compare_version

    assert NEWEST == API_VERSION
    assert lightning.__version__ == lightning.pytorch.__version__ == lightning.fabric.__version__ == NEWEST
    for version in ("2.0.0", "2.4.0.post0", "2.5.1"):
        fulmen.compat.install(version)
        assert lightning.__version__ == lightning.pytorch.__version__ == version
        for name in ("lightning", "pytorch-lightning", "pytorch_lightning", "lightning.fabric"):
            assert importlib.metadata.version(name) == version
    assert importlib.metadata.metadata("lightning")["Summary"] == "stand-in by fulmen"
    assert importlib.metadata.distribution("pytorch-lightning").requires == ["fulmen"]
    assert {"lightning", "pytorch-lightning"} <= {one.metadata["Name"] for one in importlib.metadata.distributions()}
    assert RequirementCache("lightning>=2.5.1") and not RequirementCache("lightning>=2.5.2")
    assert RequirementCache("pytorch-lightning<2.6") and RequirementCache("lightning_fabric==2.5.1")
    assert compare_version("lightning", lambda found, wanted: found >= wanted, "2.5")


@pytest.mark.parametrize("version", ["1.9.5", "2.6.7", "3.0.0", "new", "2.5", ""])
def test_versions_that_never_were_are_refused(version):
    with pytest.raises(MisconfigurationException, match="2.6.6"):
        fulmen.compat.install(version)
    assert importlib.metadata.version("lightning") == NEWEST


def test_installing_twice_is_installing_once():
    before = list(sys.meta_path), list(sys.path_hooks)
    fulmen.compat.install()
    assert (list(sys.meta_path), list(sys.path_hooks)) == before and sys.meta_path[0] is FINDER


def test_the_real_package_in_the_same_process_is_refused(tmp_path, monkeypatch):
    take_away()
    real = ModuleType("pytorch_lightning")
    real.__file__ = str(tmp_path / "pytorch_lightning" / "__init__.py")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", real)
    with pytest.raises(ImportError, match=r"imported .* already: 'pytorch_lightning' from .*__init__.py") as raised:
        fulmen.compat.install("2.5.0")
    assert raised.value.name == "pytorch_lightning" and raised.value.path == real.__file__
    assert FINDER not in sys.meta_path and os.environ[VARIABLE] == ""


def test_fulmen_answers_first_where_the_real_package_is_installed(tmp_path, monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('this is the real one')")
    (tmp_path / "lightning-2.1.0.dist-info").mkdir()
    (tmp_path / "lightning-2.1.0.dist-info" / "METADATA").write_text("Name: lightning\nVersion: 2.1.0\nSummary: real\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(importlib.import_module("lightning"), ForeignView)
    assert isinstance(importlib.import_module("pytorch_lightning.callbacks"), ForeignView)
    assert importlib.metadata.version("lightning") == NEWEST


def test_installing_imports_nothing_that_takes_time():
    code = "\n".join((
        "import sys, fulmen.compat; fulmen.compat.install(); import lightning.pytorch.callbacks.early_stopping",
        "slow = {'torch', 'fulmen.trainer', 'importlib.metadata', 'multiprocessing.spawn'} & set(sys.modules)",
        "assert not slow, slow",
        "import lightning.pytorch as pl; assert pl.Trainer and 'torch' in sys.modules",
        "assert type(sys.modules['fulmen.trainer'].__loader__).__name__ == 'SourceFileLoader'",
    ))  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)
