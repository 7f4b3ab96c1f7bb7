"""The example as a user runs it: a script started from a shell."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "mnist_autoencoder.py"
SHARED_MNIST = ROOT.parent / "shared" / "data"
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(folder / "out"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def said(output: str, name: str) -> str:
    match = re.search(rf"^{name} +(.+)$", output, re.MULTILINE)
    assert match, f"no line `{name}` in:\n{output}"
    return match[1]


def assert_tells_where_everything_is(output: str, folder: Path) -> None:
    picture = folder / said(output, "picture")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert "val_loss" in (folder / said(output, "metrics")).read_text().splitlines()[0]
    checkpoint = torch.load(folder / said(output, "checkpoint"), weights_only=True)
    assert "encoder.layers.0.weight" in checkpoint["state_dict"]


def assert_loss_fell(output: str, *names: str) -> None:
    for name in names or ("train loss", "val loss"):
        first, last = map(float, said(output, name).split(" -> "))
        assert last < first, f"{name} rose from {first} to {last}"


def write_idx(path: Path, values: torch.Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, values.dim())) + sizes + bytes(values.flatten().tolist())))


def write_small_mnist(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 240), ("t10k", 40)):
        labels = torch.arange(count) % 10
        # Each label has a bright row of its own: something to learn.
        images = torch.randint(0, 40, (count, 28, 28), generator=generator)
        images[torch.arange(count), 2 * labels + 4] = 250
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)


def test_digits_are_learned_and_every_file_is_where_the_last_lines_say(tmp_path: Path) -> None:
    first = run(tmp_path, "--epochs", "3")
    assert first.returncode == 0, first.stderr[-3000:]
    assert_loss_fell(first.stdout)
    assert_tells_where_everything_is(first.stdout, tmp_path)
    assert "encoder" in first.stdout + first.stderr  # the summary table

    second = run(tmp_path, "--epochs", "1")
    assert_tells_where_everything_is(second.stdout, tmp_path)
    # The first run's files are still there, beside the second's.
    assert said(first.stdout, "metrics") != said(second.stdout, "metrics")
    assert (tmp_path / said(first.stdout, "metrics")).is_file()


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_mnist_is_read_from_the_files_in_the_data_folder(tmp_path: Path, place: str) -> None:
    write_small_mnist(tmp_path / "data" / place)
    done = run(tmp_path, "--data", "mnist", "--data-dir", "data", "--epochs", "15", "--batch-size", "20")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_loss_fell(done.stdout)
    assert_tells_where_everything_is(done.stdout, tmp_path)


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    write_small_mnist(tmp_path / "data")
    path = tmp_path / "data" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:1000]))
    done = run(tmp_path, "--data", "mnist", "--epochs", "1")
    assert done.returncode != 0
    assert "train-images-idx3-ubyte.gz is not an IDX file" in done.stderr


@pytest.mark.skipif(not SHARED_MNIST.is_dir(), reason=f"no MNIST in {SHARED_MNIST}")
@pytest.mark.shared
@pytest.mark.slow
def test_the_real_mnist_is_learned(tmp_path: Path) -> None:
    done = run(tmp_path, "--data", "mnist", "--data-dir", str(SHARED_MNIST), "--epochs", "1", "--batch-size", "128")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_loss_fell(done.stdout, "train loss")  # one epoch has one validation
    assert_tells_where_everything_is(done.stdout, tmp_path)
    assert float(said(done.stdout, "test loss")) < 0.045


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("mnist_autoencoder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_absent_files_are_fetched_and_checked(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    write_small_mnist(tmp_path / "mirror")
    hashes = {
        name: hashlib.sha256(gzip.decompress((tmp_path / "mirror" / f"{name}.gz").read_bytes())).hexdigest()
        for name in NAMES
    }
    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(example, "MNIST_FILES", hashes)
    monkeypatch.setattr(example, "MNIST_MIRRORS", (nowhere, f"file://{tmp_path}/mirror/"))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)

    example.prepare_mnist(tmp_path / "data")

    assert len(example.load_mnist(tmp_path / "data", "train")) == 240
    assert not list((tmp_path / "data").rglob("*.part"))


def test_wrong_content_is_refused_and_the_way_out_named(
    example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_mnist(tmp_path / "mirror")
    monkeypatch.setattr(example, "MNIST_MIRRORS", (f"file://{tmp_path}/mirror/", "http://127.0.0.1:9/"))
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(SystemExit) as stopped:
        example.prepare_mnist(tmp_path / "data")

    assert "not that of MNIST" in str(stopped.value)
    assert "--data digits" in str(stopped.value)
    assert not (tmp_path / "data").exists()
