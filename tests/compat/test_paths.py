"""Module paths of the API we follow, below `fulmen` and below the original package names."""

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import fulmen
from fulmen.compat.names import ABSENT, PATHS, ROOTS, absent_advice


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(fulmen.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


def test_one_class_has_many_paths():
    from fulmen.callbacks.early_stopping import EarlyStopping as from_file
    from fulmen.callbacks.model_checkpoint import ModelCheckpoint
    from fulmen.utilities.exceptions import MisconfigurationException

    assert fulmen.callbacks.EarlyStopping is from_file
    assert fulmen.callbacks.ModelCheckpoint is ModelCheckpoint
    assert fulmen.utilities.errors.MisconfigurationException is MisconfigurationException


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_path_of_the_table_can_be_imported(path):
    parent = "fulmen." + path.rpartition(".")[0] if "." in path else "fulmen"
    homes = [home for home in PATHS[path] if _exists(home)]
    if not homes or not _exists(parent):
        pytest.skip("what it shows is not part of this version")
    module = import_module(f"fulmen.{path}")
    assert set(module.__all__) <= set(dir(module))


def _exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_the_table_has_one_grade_for_each_path():
    assert not set(PATHS) & set(ABSENT)
    assert absent_advice("trainer.connectors.data_connector") == ABSENT["trainer.connectors"]
    assert absent_advice("trainer") is None


def test_what_was_left_out_says_what_to_do_instead():
    with pytest.raises(ModuleNotFoundError, match=r"fulmen\.loggers\.litlogger.*any other logger"):
        import_module("fulmen.loggers.litlogger")
    assert not hasattr(fulmen.loggers, "litlogger")


def test_unknown_names_are_named():
    with pytest.raises(ModuleNotFoundError, match=r"fulmen\.utilities\.nothing"):
        import_module("fulmen.utilities.nothing")
    with pytest.raises(ImportError, match="Nothing"):
        from fulmen.utilities.exceptions import Nothing  # noqa: F401
    with pytest.raises(AttributeError, match="Nothing"):
        _ = fulmen.utilities.exceptions.Nothing


def test_patching_a_view_patches_the_real_module(monkeypatch):
    import fulmen.utilities.errors as real
    import fulmen.utilities.exceptions as view

    original = real.MisconfigurationException
    with monkeypatch.context() as patch:
        patch.setattr("fulmen.utilities.exceptions.MisconfigurationException", ValueError)
        assert real.MisconfigurationException is ValueError
    assert real.MisconfigurationException is view.MisconfigurationException is original
    view.added = 1
    assert real.added == 1
    del view.added
    assert not hasattr(real, "added")


def test_importing_a_view_imports_nothing_it_shows():
    code = "import sys, fulmen.utilities.exceptions, fulmen.callbacks.progress.rich_progress as view; "
    code += "assert 'fulmen.callbacks.rich_bar' not in sys.modules and not hasattr(view, '__wrapped__')"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_original_names_are_views_of_ours():
    code = """
import fulmen.compat
fulmen.compat.install()
fulmen.compat.install()
import importlib.metadata, logging
import lightning as L
import lightning.pytorch as pl
import pytorch_lightning
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.seed import seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import *
import fulmen, fulmen.utilities.errors
assert ModelCheckpoint is fulmen.callbacks.ModelCheckpoint is pl.callbacks.model_checkpoint.ModelCheckpoint
assert MisconfigurationException is fulmen.utilities.errors.MisconfigurationException
assert seed_everything is fulmen.seed_everything is L.seed_everything is pl.utilities.seed.seed_everything
assert rank_zero_only is pl.utilities.rank_zero.rank_zero_only
versions = {importlib.metadata.version(name) for name in ("lightning", "pytorch-lightning", "lightning_fabric")}
assert versions == {L.__version__} == {pl.__version__} == {"2.6.6"}
assert logging.getLogger("lightning.pytorch") is logging.getLogger("fulmen")
pl.utilities.exceptions.MisconfigurationException = KeyError
assert fulmen.utilities.errors.MisconfigurationException is KeyError
for line in ("import lightning.app", "import lightning.callbacks", "from lightning.pytorch import Nothing"):
    try:
        exec(line)
    except ImportError as error:
        assert "lightning." in str(error), error
    else:
        raise AssertionError(line)
try:
    import pytorch_lightning.profilers.xla
except ImportError as error:
    assert "pytorch_lightning.profilers.xla" in str(error) and "TPU" in str(error)
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_it_refuses_to_mix_with_the_real_package(tmp_path):
    (tmp_path / "pytorch_lightning.py").touch()
    code = "import sys; sys.path.insert(0, '.'); import pytorch_lightning, fulmen.compat; fulmen.compat.install()"
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode != 0
    assert "RuntimeError: `pytorch_lightning` has already been imported from" in result.stderr


SCRIPT = """
import sys
import neighbour
import lightning.pytorch as pl
from torch.multiprocessing import get_context

def in_worker(queue):
    import fulmen
    queue.put(pl.seed_everything is fulmen.seed_everything)

if __name__ == "__main__":
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_worker, args=(queue,))
    process.start()
    print(pl.__version__, sys.argv[1:], __file__ == sys.argv[0], queue.get(timeout=60))
    process.join()
    sys.exit(3)
"""


def test_a_script_runs_unchanged_and_so_do_the_processes_it_starts(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "neighbour.py").touch()
    (folder / "train.py").write_text(SCRIPT)
    result = run_python("-m", "fulmen", "run", "scripts/train.py", "--lr", "1", cwd=tmp_path)
    assert result.stdout.strip() == "2.6.6 ['--lr', '1'] True True", result.stderr
    assert result.returncode == 3


def test_the_command_line_explains_itself(tmp_path):
    assert "usage" in run_python("-m", "fulmen", "--help").stdout
    wrong = run_python("-m", "fulmen", "walk")
    assert wrong.returncode == 2 and "usage" in wrong.stderr
    missing = run_python("-m", "fulmen", "run", str(tmp_path / "nothing.py"))
    assert missing.returncode == 2 and "nothing.py" in missing.stderr


def test_every_root_has_a_home():
    assert set(ROOTS.values()) == {"fulmen", "fulmen.fabric"}
