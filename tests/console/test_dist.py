"""The archives that are published: what is in them, and that they work where nothing else is installed.

`make test-dist` installs what builds them and runs this.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fulmen

ROOT = Path(__file__).parents[2]
NAME = f"fulmen-{fulmen.__version__}"
ABOUT = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
UNPUBLISHED = (".ci/",)
SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import fulmen as pl

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = pl.Trainer(max_epochs=2, log_every_n_steps=1)
trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4))
again = Model.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
assert trainer.global_step == 4 and again.net.weight.shape == (1, 2)
print(trainer.logger.log_dir)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed: run `make test-dist`"
    ),
]


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """The source archive and the wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target / f"{NAME}.tar.gz", target / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def read_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked_files() -> set[str]:
    """What belongs to the project, of what is under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a checkout: there is no list of files to compare with")
    return {name for name in done.stdout.split("\0") if name and not name.startswith(UNPUBLISHED)}


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    names = set(read_wheel(archives[1]))
    package = {name for name in tracked_files() if name.startswith("fulmen/")}
    assert names == package | {f"{NAME}.dist-info/{name}" for name in ABOUT}
    assert "fulmen/py.typed" in names


def test_the_source_archive_holds_the_project_and_nothing_else(archives):
    with tarfile.open(archives[0]) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    assert names == tracked_files() | {"PKG-INFO"}


def test_the_source_archive_builds_the_same_wheel(archives, tmp_path):
    with tarfile.open(archives[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    _, again = build(tmp_path / NAME, tmp_path / "again")
    assert read_wheel(again) == read_wheel(archives[1])


def test_the_wheel_names_what_it_needs_and_the_command(archives):
    content = read_wheel(archives[1])
    about = content[f"{NAME}.dist-info/METADATA"].decode()
    needed = [line for line in about.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(re.findall(r"Requires-Dist: (\w+)", "\n".join(needed))) == ["torch", "tqdm"]
    assert "fulmen = fulmen.console.commands:run_command" in content[f"{NAME}.dist-info/entry_points.txt"].decode()


def requirements_of(name: str, found: set[str]) -> Iterator[importlib.metadata.Distribution]:
    """An installed distribution and all that it requires, without extras."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    found.add(key)
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # for another system or Python
    yield distribution
    for requirement in distribution.requires or []:
        if "extra ==" not in requirement:
            yield from requirements_of(re.match(r"[\w.-]+", requirement).group(), found)


@pytest.fixture(scope="module")
def clean_bin(archives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it requires; torch is linked, not downloaded again."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False, symlinks=True)
    (packages,) = home.glob("lib/python3*/site-packages")
    found: set[str] = set()
    for distribution in [*requirements_of("torch", found), *requirements_of("tqdm", found)]:
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if not (packages / top).exists():
                (packages / top).symlink_to(target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(home / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run([*command, str(archives[1])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return home / "bin"


def run_clean(program: Path, *arguments: str, folder: Path) -> str:
    """What it prints, with an environment that points nowhere else."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    command = [str(program), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_installed_wheel_trains_where_nothing_else_is(clean_bin, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    log_dir = run_clean(clean_bin / "python", "script.py", folder=tmp_path).splitlines()[-1]
    assert (tmp_path / log_dir / "metrics.csv").is_file()


def test_the_installed_command_finds_what_is_missing_and_no_problem(clean_bin, tmp_path):
    found = json.loads(run_clean(clean_bin / "fulmen", "doctor", "--json", folder=tmp_path))
    assert found["problems"] == [] and found["versions"]["fulmen"] == fulmen.__version__
    assert {name for name in found["packages"] if found["packages"][name]} <= {"fsspec", "numpy"}  # torch's own
    assert found["install"]["rich"] == 'pip install "fulmen[bar]"'
    assert Path(found["versions"]["interpreter"]).parent == clean_bin


def test_the_installed_demo_runs_without_another_package(clean_bin, tmp_path):
    said = run_clean(clean_bin / "fulmen", "demo", "--epochs", "2", folder=tmp_path)
    assert re.search(r"^data +drawn$", said, re.MULTILINE) and re.search(r"^test loss +0\.\d+", said, re.MULTILINE)
    assert list((tmp_path / "fulmen-demo" / "version_0" / "checkpoints").glob("*.ckpt"))
