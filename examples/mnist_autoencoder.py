"""An autoencoder for handwritten digits: fit, test, predict, and a picture of what it learned.

    python examples/mnist_autoencoder.py                                    # 1,797 digits that come with scikit-learn
    python examples/mnist_autoencoder.py --data mnist --data-dir data       # the 70,000 of MNIST, fetched if absent

Needs ``pip install "fulmen[examples]"``; with ``fulmen[tensorboard]`` the curves go to TensorBoard too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.util
import os
import time
import urllib.request
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import fulmen as pl
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger, Logger, TensorBoardLogger


class Encoder(nn.Module):
    """An image as a flat row of pixels -> a handful of numbers."""

    def __init__(self, in_features: int = 28 * 28, hidden: int = 64, latent: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, latent))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class Decoder(nn.Module):
    """A handful of numbers -> the row of pixels they stand for."""

    def __init__(self, out_features: int = 28 * 28, hidden: int = 64, latent: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, out_features))

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code)


class LitAutoEncoder(pl.LightningModule):
    """Learns to give back the image it was shown through the bottleneck between encoder and decoder."""

    def __init__(self, in_features: int = 28 * 28, hidden: int = 64, latent: int = 3, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = Encoder(in_features, hidden, latent)
        self.decoder = Decoder(in_features, hidden, latent)
        self.example_input_array = torch.zeros(1, in_features)  # the summary shows sizes and FLOPs with it

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images.flatten(1))).view_as(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        loss = F.mse_loss(self(images), images)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, _ = batch
        self.log("val_loss", F.mse_loss(self(images), images), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, _ = batch
        self.log("test_loss", F.mse_loss(self(images), images))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class MNISTDataModule(pl.LightningDataModule):
    """Handwritten digits with their labels, cut into training, validation and test images.

    ``data="digits"`` are scikit-learn's images of 8 x 8 pixels, ``data="mnist"`` the real ones of 28 x 28, read from
    ``data_dir`` or fetched into it. Images are float32 in 0..1, shape (1, height, width).
    """

    def __init__(self, data: str = "digits", data_dir: str = "data", batch_size: int = 64, seed: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.data, self.data_dir, self.batch_size, self.seed = data, Path(data_dir), batch_size, seed

    @property
    def side(self) -> int:
        return 8 if self.data == "digits" else 28

    def prepare_data(self) -> None:
        if self.data == "mnist":
            prepare_mnist(self.data_dir)

    def setup(self, stage: str) -> None:
        if self.data == "digits":
            everything = load_digits()
            train, self.test_set = split_off(everything, 360)
        else:
            train, self.test_set = load_mnist(self.data_dir, "train"), load_mnist(self.data_dir, "t10k")
        # Seeded of its own: the split is the same in every stage and every run.
        held_out = len(train) // 12
        self.train_set, self.val_set = random_split(
            train, [len(train) - held_out, held_out], generator=torch.Generator().manual_seed(self.seed)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._in_order(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._in_order(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        return self._in_order(self.test_set)

    def _in_order(self, dataset: Dataset) -> DataLoader:
        return DataLoader(dataset, batch_size=4 * self.batch_size)


def load_digits() -> TensorDataset:
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
    return TensorDataset(images, torch.from_numpy(digits.target).long())


def split_off(dataset: TensorDataset, count: int) -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(*dataset[:-count]), TensorDataset(*dataset[-count:])


# The IDX files of MNIST: SHA-256 of what is inside the .gz, so that files compressed anew are recognised as well.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def find_mnist(folder: Path, name: str) -> Path | None:
    """The file in ``folder`` itself, or where torchvision keeps it."""
    places = (folder / f"{name}.gz", folder / "MNIST" / "raw" / f"{name}.gz")
    return next((place for place in places if place.is_file()), None)


def prepare_mnist(folder: Path) -> None:
    """Makes sure that all of MNIST is in ``folder``, fetching what is missing."""
    missing = [name for name in MNIST_FILES if find_mnist(folder, name) is None]
    if not missing:
        return
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision.datasets import MNIST

        MNIST(str(folder), download=True)
        return
    for name in missing:
        download(name, folder / "MNIST" / "raw")


def download(name: str, folder: Path) -> None:
    failures = []
    for mirror in MNIST_MIRRORS:
        url = f"{mirror}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            digest = hashlib.sha256(gzip.decompress(content)).hexdigest()
        except (OSError, EOFError) as error:
            failures.append(f"{url}: {error}")
            continue
        if digest != MNIST_FILES[name]:
            failures.append(f"{url}: the content is not that of MNIST (SHA-256 {digest})")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.gz.part"
        partial.write_bytes(content)
        os.replace(partial, folder / f"{name}.gz")
        return
    raise SystemExit(
        f"MNIST is not in `--data-dir` and could not be fetched: `{name}.gz` is missing.\n"
        + "".join(f"  {failure}\n" for failure in failures)
        + "Put the four .gz files of MNIST into that folder, or use `--data digits`, which needs no network."
    )


def load_mnist(folder: Path, split: str) -> TensorDataset:
    images, labels = (read_idx(folder, f"{split}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return TensorDataset(images.float().div_(255).unsqueeze(1), labels.long())


def read_idx(folder: Path, name: str) -> Tensor:
    """An IDX file of bytes: two zero bytes, type 8, number of dimensions, each size as big-endian int32, the data."""
    path = find_mnist(folder, name)
    if path is None:
        raise FileNotFoundError(f"`{name}.gz` is neither in {folder} nor in {folder / 'MNIST' / 'raw'}.")
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + torch.Size(shape).numel()
    if not dimensions or len(content) != expected:
        raise ValueError(
            f"{path} is not an IDX file of bytes, or was cut: {len(content)} bytes where {expected} belong."
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


def read_curve(metrics_csv: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every row that has one."""
    with metrics_csv.open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def smooth(curve: list[tuple[int, float]], reach: int = 5) -> list[float]:
    """Each value averaged with its neighbours, up to ``reach`` of them on either side."""
    values = [value for _, value in curve]
    windows = (values[at - min(reach, at) : at + min(reach, at) + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(path: Path, originals: Tensor, decoded: Tensor, train: list, val: list, title: str) -> None:
    """Originals above what came back, and below them how the losses fell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    ink, quiet, blue, orange = "#1f2328", "#6e7781", "#2f6fde", "#e36209"
    figure = plt.figure(figsize=(10, 6), dpi=110, facecolor="white")
    figure.text(0.1, 0.94, title, fontsize=13, fontweight="bold", color=ink)
    grid = figure.add_gridspec(2, len(originals), left=0.1, right=0.98, top=0.9, bottom=0.59, wspace=0.08, hspace=0.08)
    for row, (name, images) in enumerate((("original", originals), ("decoded", decoded))):
        for column, image in enumerate(images.clamp(0, 1)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(image.squeeze(), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#d0d7de")
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, color=ink, fontsize=11)

    axes = figure.add_axes((0.1, 0.1, 0.88, 0.42), yscale="log")
    axes.plot(*zip(*train), color=blue, alpha=0.25, linewidth=1)
    axes.plot([step for step, _ in train], smooth(train), color=blue, linewidth=2, label="training")
    axes.plot(*zip(*val), color=orange, linewidth=2, label="validation")
    axes.set_xlim(0, max(train[-1][0], val[-1][0]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer step", color=ink, fontsize=10)
    axes.set_ylabel("mean squared error", color=ink, fontsize=10)
    axes.grid(axis="y", color="#eaeef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d0d7de")
    axes.tick_params(color="#d0d7de", labelcolor=quiet, labelsize=9)
    axes.legend(frameon=False, loc="upper right", labelcolor=ink)
    figure.savefig(path)
    plt.close(figure)


def one_of_each(labels: Tensor) -> list[int]:
    return [int((labels == digit).nonzero()[0]) for digit in labels.unique()]


def shown(path: str | Path) -> str:
    """The path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an autoencoder on handwritten digits, test it, and draw what it gives back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_out = Path(__file__).resolve().parent.parent / "runs" / "demo"
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="which images to learn")
    parser.add_argument("--data-dir", default="data", help="where MNIST is, or is put")
    parser.add_argument(
        "--epochs", type=int, default=0, help="passes over the training images; 0 is 60 for digits, 5 for mnist"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per optimizer step")
    parser.add_argument("--hidden", type=int, default=64, help="width of the layer between image and code")
    parser.add_argument("--latent", type=int, default=8, help="numbers an image is squeezed into")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=7, help="seed of weights and shuffling")
    parser.add_argument("--out", default=shown(default_out), help="folder for logs, checkpoints and the picture")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small are multiplied before a second thread has woken up
    pl.seed_everything(args.seed, workers=True)

    data = MNISTDataModule(args.data, args.data_dir, args.batch_size, args.seed)
    model = LitAutoEncoder(data.side**2, args.hidden, args.latent, args.lr)
    loggers: list[Logger] = [CSVLogger(out, name="")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(out, name="", version=loggers[0].version))
    best = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.4f}")
    trainer = pl.Trainer(
        max_epochs=args.epochs or {"digits": 60, "mnist": 5}[args.data],
        logger=loggers,
        callbacks=[best],
        default_root_dir=out,
        log_every_n_steps=10,
    )

    trainer.fit(model, datamodule=data)
    test_result = trainer.test(model, datamodule=data, ckpt_path="best")[0]
    decoded = torch.cat(trainer.predict(model, datamodule=data, ckpt_path="best"))

    originals, labels = data.test_set.tensors
    metrics = Path(loggers[0].log_dir, "metrics.csv")
    train, val = read_curve(metrics, "train_loss"), read_curve(metrics, "val_loss")
    chosen = one_of_each(labels)
    picture = out / "demo.png"
    title = f"{originals[0].numel()} pixels through {args.latent} numbers and back · test error {test_result['test_loss']:.4f}"
    draw(picture, originals[chosen], decoded[chosen], train, val, title)

    print(f"\ntrain loss   {train[0][1]:.4f} -> {smooth(train)[-1]:.4f}")
    print(f"val loss     {val[0][1]:.4f} -> {min(value for _, value in val):.4f}")
    print(f"test loss    {test_result['test_loss']:.4f}")
    print(f"time         {time.perf_counter() - started:.1f} s, {trainer.global_step} optimizer steps")
    print(f"metrics      {shown(metrics)}")
    if len(loggers) > 1:
        print(f"curves       tensorboard --logdir {shown(out)}")
    print(f"checkpoint   {shown(best.best_model_path)}")
    print(f"picture      {shown(picture)}")


if __name__ == "__main__":
    main()
