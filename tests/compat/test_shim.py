"""The distribution that holds the packages of Lightning's names: an ordinary import, in every process."""

from __future__ import annotations

import email
import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "shim"

LOOK = """
import importlib.metadata, subprocess, sys
import {first}
import lightning, lightning.pytorch as pl, pytorch_lightning, lightning_fabric
from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint
import fulmen
assert pl.Trainer is lightning.Trainer is pytorch_lightning.Trainer is fulmen.Trainer
assert lightning_fabric.Fabric is lightning.fabric.Fabric is fulmen.Fabric
assert ModelCheckpoint is fulmen.callbacks.ModelCheckpoint
assert sys.modules["{first}"].__class__.__name__ == "ForeignView"
versions = [importlib.metadata.version(name) for name in ("lightning", "pytorch-lightning", "lightning-fabric")]
assert versions == [lightning.__version__] * 3 == [pl.__version__] * 3
child = "import pytorch_lightning as pl; assert pl.Trainer.__module__ == 'fulmen.trainer'"
if "{first}" == "lightning":
    subprocess.run([sys.executable, "-c", child], check=True)
print(lightning.__version__, importlib.metadata.metadata("lightning")["Summary"])
"""


def python(*words: str, **variables: str) -> str:
    path = os.pathsep.join([str(SHIM), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *words], env=environment, check=True, text=True, stdout=subprocess.PIPE, timeout=1200
    ).stdout


def test_a_path_serves_the_names_to_a_process_and_those_it_starts():
    assert python("-c", LOOK.format(first="lightning")) == "2.6.6 stand-in by fulmen\n"


def test_any_of_the_packages_may_be_imported_first_and_the_version_chosen():
    for first in ("pytorch_lightning", "lightning_fabric.utilities"):
        code = f"import {first}, lightning, sys; assert lightning.__version__ == '2.3.1'; assert 'torch' not in sys.modules"
        python("-c", code, FULMEN_LIGHTNING_VERSION="2.3.1")


def test_the_metadata_are_there_before_anything_is_imported():
    code = "import importlib.metadata as m; print([m.version(n) for n in ('lightning', 'pytorch_lightning', 'lightning-fabric')])"
    assert python("-c", code) == "['2.6.6', '2.6.6', '2.6.6']\n"


def test_modules_run_by_their_old_names(tmp_path):
    said = python("-m", "lightning.pytorch.utilities.upgrade_checkpoint", "-h")
    assert said.startswith("usage: ") and "checkpoint" in said


def test_the_real_package_in_the_same_process_is_refused(tmp_path):
    (tmp_path / "pytorch_lightning").mkdir()
    (tmp_path / "pytorch_lightning" / "__init__.py").touch()
    code = """
import pytorch_lightning
try:
    import lightning
except ImportError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), str(SHIM), str(ROOT)])
    said = python("-c", code, PYTHONPATH=path)
    assert "already: 'pytorch_lightning' from" in said and str(tmp_path) in said


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="`make test-dist` installs what builds wheels"
)
def test_wheels_satisfy_pip_for_all_names(tmp_path):
    build = str(SHIM / "build_wheels.py")
    python(build, "2.5.0", "--out", str(tmp_path))
    wheels = sorted(path.name.partition("-")[0] for path in tmp_path.glob("*-2.5.0-py3-none-any.whl"))
    assert wheels == ["fulmen_lightning_shim", "lightning", "lightning_fabric", "pytorch_lightning"]
    for wheel in tmp_path.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
            packages = {
                name.partition("/")[0] for name in archive.namelist() if not name.partition("/")[0].endswith("-info")
            }
        assert metadata["Summary"] == "stand-in by fulmen" and metadata["Version"] == "2.5.0"
        assert any(one.startswith("fulmen") for one in metadata.get_all("Requires-Dist"))
        assert "lightning-utilities>=0.10" in metadata.get_all("Requires-Dist")
        one = wheel.name.partition("-")[0]
        assert packages == ({one} if "fulmen" not in one else {"lightning", "lightning_fabric", "pytorch_lightning"})
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip"]
    names = [str(wheel) for wheel in tmp_path.glob("*.whl")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", *names], check=True)
    frozen = subprocess.run([*pip, "list"], check=True, text=True, stdout=subprocess.PIPE).stdout
    assert all(
        f"{name} 2.5.0" in " ".join(frozen.split()) for name in ("lightning", "lightning-fabric", "pytorch-lightning")
    )
    wanted = ["lightning>=2.0,<2.6", "pytorch-lightning==2.5.0", "lightning-fabric!=2.6.2"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", *wanted], check=True)


@pytest.mark.parametrize("version", ["1.9.0", "2.6.7", "x"])
def test_wheels_of_other_versions_are_refused(version, tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        python(str(SHIM / "build_wheels.py"), version, "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())
