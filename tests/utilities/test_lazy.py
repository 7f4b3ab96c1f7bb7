"""Names that are imported when somebody asks for them, also where the package's sources are not plain files."""

from __future__ import annotations

import compileall
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fulmen

PACKAGE = Path(fulmen.__file__).parent
PACKAGES = ("fulmen", "fulmen.callbacks", "fulmen.loggers", "fulmen.strategies", "fulmen.plugins", "fulmen.utilities")
SCRIPT = """
import json, sys, warnings
import torch
import fulmen as pl
from fulmen.callbacks import EarlyStopping
from fulmen.callbacks.model_checkpoint import ModelCheckpoint
from fulmen.supervision.stack_sampler import error_location
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.net(batch[0]).square().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def trainer():
    return pl.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[ModelCheckpoint("c")]
    )

loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    one = trainer()
    one.fit(Model(), loader)
try:
    pl.Trainer(max_epochs="many")
except Exception as error:
    blamed = error_location(error)
print(json.dumps({
    "file": pl.__file__, "steps": one.global_step, "checkpoint": one.checkpoint_callback.best_model_path,
    "warned_at": sorted({warning.filename for warning in caught}), "names": dir(pl.callbacks), "blamed": blamed,
    "monitor": EarlyStopping("x").monitor,
}))
"""


def make_archive(folder: Path) -> str:
    """All sources in one zip file, which goes on `sys.path`."""
    path = folder / "fulmen.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(PACKAGE.rglob("*.py")):
            archive.write(file, file.relative_to(PACKAGE.parent))
    return str(path)


def make_sourceless_tree(folder: Path) -> str:
    """Compiled files alone, compiled in another place than where they lie."""
    built = folder / "built"
    shutil.copytree(PACKAGE, built / "fulmen", ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(built, quiet=1, legacy=True, force=True)
    for file in built.rglob("*.py"):
        file.unlink()
    return str(built.rename(folder / "compiled"))


@pytest.mark.slow
@pytest.mark.parametrize("make_tree", [make_archive, make_sourceless_tree])
def test_the_package_trains_from_an_archive_and_without_sources(make_tree, tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": tree, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"].startswith(tree + os.sep)
    assert found["steps"] == 2 and found["monitor"] == "x" and Path(found["checkpoint"]).is_file()
    assert found["names"] == dir(fulmen.callbacks)
    assert found["blamed"].startswith("script.py:")  # frames of the package are known as such


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_lists_what_type_checkers_see(name: str) -> None:
    package = importlib.import_module(name)
    public = [name for name in dir(package) if not name.startswith("_")]
    assert set(package.__all__) <= set(public) and not {"TYPE_CHECKING", "lazy_exports", "annotations"} & set(public)
    assert [name for name in public if not hasattr(package, name)] == []
