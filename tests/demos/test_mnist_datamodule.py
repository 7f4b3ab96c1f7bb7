"""Images of digits, from files made here and from the real ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from fulmen.demos import download
from fulmen.demos.mnist_datamodule import FILES, MNIST, MNISTDataModule

REAL = Path("/work/shared/data/MNIST")


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def root(tmp_path):
    """20 images to train with, 8 to test with; the labels of training are not compressed."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for files, count in ((FILES["train"], 20), (FILES["test"], 8)):
        images, labels = files
        generator = torch.Generator().manual_seed(count)
        write_idx(folder / images, torch.randint(256, (count, 28, 28), generator=generator))
        write_idx(folder / (labels if count == 8 else labels.removesuffix(".gz")), torch.arange(count) % 10)
    return tmp_path


def test_images_are_between_zero_and_one_with_their_digits(root):
    digits = MNIST(root)
    image, digit = digits[13]
    assert len(digits) == 20 and image.shape == (1, 28, 28) and image.dtype == torch.float32 and digit == 3
    assert torch.equal(image * 255, digits.data[13].float().unsqueeze(0).div(255) * 255)
    normalized, _ = MNIST(root, normalize=(0.5, 0.5))[13]
    torch.testing.assert_close(normalized, image * 2 - 1)
    assert len(MNIST(root, train=False)) == 8


def test_some_images_are_for_validation_alone(root):
    data = MNISTDataModule(root, val_split=6, num_workers=0, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    assert len(data.dataset_train) == 14 and len(data.dataset_val) == 6
    assert not set(data.dataset_train.indices) & set(data.dataset_val.indices)
    images, digits = next(iter(data.train_dataloader()))
    assert images.shape == (4, 1, 28, 28) and digits.dtype == torch.int64
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == [
        3,
        1,
        2,
    ]
    again = MNISTDataModule(root, val_split=6, num_workers=0)
    again.setup("fit")
    assert again.dataset_val.indices == data.dataset_val.indices
    assert data.num_classes == 10 and data.name == "mnist" and data.default_transforms is None
    assert MNISTDataModule(normalize=True).default_transforms == (0.5, 0.5)


def test_files_that_are_missing_or_damaged_are_named(root, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"neither .*train-images-idx3-ubyte.gz nor"):
        MNIST(tmp_path / "nowhere", download=False)
    monkeypatch.setattr("fulmen.demos.mnist_datamodule.MNIST_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"could not be downloaded: .* Put the file at"):
        MNISTDataModule(tmp_path / "nowhere").prepare_data()
    path = root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete IDX file"):
        MNIST(root)


def test_other_content_than_expected_is_refused(tmp_path):
    (tmp_path / "source").write_text("text")
    with pytest.raises(ConnectionError, match="another content than expected"):
        download.fetch_file((tmp_path / "source").as_uri(), tmp_path / "target", md5="0" * 32)
    assert not (tmp_path / "target").exists()
    download.fetch_file((tmp_path / "source").as_uri(), tmp_path / "target", md5="1cb251ec0d568de6a929b520c4aed8d1")
    assert (tmp_path / "target").read_text() == "text"


@pytest.mark.shared
@pytest.mark.skipif(not REAL.is_dir(), reason="needs MNIST")
def test_the_real_images(tmp_path):
    (tmp_path / "MNIST").symlink_to(REAL)
    data = MNISTDataModule(tmp_path, num_workers=0)
    data.setup("fit")
    assert (len(data.dataset_train), len(data.dataset_val)) == (55_000, 5_000)
    digits = MNIST(tmp_path, train=False, download=False)
    assert len(digits) == 10_000 and digits.targets[:5].tolist() == [7, 2, 1, 0, 4]
