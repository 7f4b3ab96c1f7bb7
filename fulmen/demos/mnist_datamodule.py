"""Images of handwritten digits: `MNISTDataModule`."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, random_split

from fulmen.datamodule import LightningDataModule
from fulmen.demos.download import fetch_file

Sample = tuple[Tensor, int]

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
# By part: the files of images and labels, and their checksums.
FILES = {
    "train": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    },
    "test": {
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
}


class MNIST(Dataset[Sample]):
    """60,000 images of digits to train with and 10,000 to test with: (1, 28, 28), float32 from 0 to 1, and the digit.

    Args:
        root: the files are in its folder ``MNIST/raw``, as torchvision keeps them, compressed or not.
        train: which of the two parts.
        normalize: mean and standard deviation that images are shifted and divided by.
        download: get the files that are not there.

    Raises:
        FileNotFoundError: without `download`, a file is not there.
        ConnectionError: a file cannot be downloaded.

    Examples:
        >>> digits = MNIST("data", train=False)  # doctest: +SKIP
    """

    def __init__(
        self, root: str | os.PathLike[str], train: bool = True, normalize: tuple[float, float] | None = None,
        download: bool = True,
    ) -> None:  # fmt: skip
        folder = Path(root) / "MNIST" / "raw"
        images, labels = (
            _find_file(folder, name, md5, download) for name, md5 in FILES["train" if train else "test"].items()
        )
        self.data = _read_bytes(images)
        self.targets = _read_bytes(labels)
        self.normalize = normalize

    def __getitem__(self, idx: int) -> Sample:
        image = self.data[idx].unsqueeze(0).float() / 255
        if self.normalize is not None:
            mean, deviation = self.normalize
            image = (image - mean) / deviation
        return image, int(self.targets[idx])

    def __len__(self) -> int:
        return len(self.data)


def _find_file(folder: Path, name: str, md5: str, download: bool) -> Path:
    """The path of a file, compressed or not; gets it, if that is wanted."""
    path = folder / name
    unpacked = path.with_suffix("")
    if unpacked.is_file():
        return unpacked
    if download:
        fetch_file(f"{MNIST_URL}/{name}", path, md5)
    elif not path.is_file():
        raise FileNotFoundError(f"There is neither {path} nor {unpacked}. Put it there, or pass `download=True`.")
    return path


def _read_bytes(path: Path) -> Tensor:
    """The bytes of an IDX file in their shape, uint8: a header says how many dimensions there are, and their sizes."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if content[:3] != b"\x00\x00\x08" or len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is not a complete IDX file of bytes. Remove it, and it is downloaded again.")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


class MNISTDataModule(LightningDataModule):
    """Images of digits: for training, for validation (some that training does not see), and for testing.

    Args:
        data_dir: where the files are, or are put. See `MNIST`.
        val_split: how many of the images to train with are for validation.
        num_workers: processes that load images.
        normalize: shift and scale images from -1 to 1.
        seed: decides which images are for validation.
        batch_size: images of a batch.

    Examples:
        >>> data = MNISTDataModule("data", batch_size=64, num_workers=0)
        >>> data.num_classes
        10
    """

    name = "mnist"

    def __init__(
        self, data_dir: str | os.PathLike[str] = "./data", val_split: int = 5000, num_workers: int = 16,
        normalize: bool = False, seed: int = 42, batch_size: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.data_dir = data_dir
        self.val_split = val_split
        self.num_workers = num_workers
        self.normalize = normalize
        self.seed = seed
        self.batch_size = batch_size
        self.dataset_train: Subset[Sample] | None = None
        self.dataset_val: Subset[Sample] | None = None

    @property
    def num_classes(self) -> int:
        """There are ten digits."""
        return 10

    @property
    def default_transforms(self) -> tuple[float, float] | None:
        """Mean and standard deviation that images are shifted and divided by, if they are normalized."""
        return (0.5, 0.5) if self.normalize else None

    def prepare_data(self) -> None:
        """Gets the files."""
        self._open(train=True, download=True)
        self._open(train=False, download=True)

    def setup(self, stage: str) -> None:
        """Divides the images to train with in two."""
        whole = self._open(train=True)
        sizes = [len(whole) - self.val_split, self.val_split]
        generator = torch.Generator().manual_seed(self.seed)
        self.dataset_train, self.dataset_val = random_split(whole, sizes, generator=generator)

    def train_dataloader(self) -> DataLoader[Sample]:
        """The images that training sees, shuffled."""
        assert self.dataset_train is not None, "call `setup` first"
        return self._load(self.dataset_train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """The images for validation."""
        assert self.dataset_val is not None, "call `setup` first"
        return self._load(self.dataset_val)

    def test_dataloader(self) -> DataLoader[Sample]:
        """The images to test with."""
        return self._load(self._open(train=False))

    def _open(self, train: bool, download: bool = False) -> MNIST:
        return MNIST(self.data_dir, train, self.default_transforms, download)

    def _load(self, dataset: Dataset[Sample], shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers, drop_last=True,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
