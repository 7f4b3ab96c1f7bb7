"""``fulmen demo``: an encoder and a decoder learn to give back images of digits, with the four verbs of the Trainer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from fulmen.callbacks.checkpointing import ModelCheckpoint
from fulmen.datamodule import LightningDataModule
from fulmen.loggers.csv_logs import CSVLogger
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.seed import seed_everything

SIDE = 8
HELD_OUT = 180  # images for validation, and as many for the test
DRAWN_COUNT = 1800
SHADES = " .:-=+*#%@"
# Rows of five pixels, from the top.
GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip

Batch = tuple[Tensor, ...]


class AutoEncoder(LightningModule):
    """Images of 8 x 8 pixels in 0..1 through a code of a few numbers, and back."""

    def __init__(self, hidden: int = 64, latent: int = 8, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        pixels = SIDE * SIDE
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, images: Tensor) -> Tensor:
        """Images of the shape (count, 8, 8) as they come back."""
        decoded: Tensor = self.decoder(self.encoder(images.flatten(1)))
        return decoded.view_as(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._log_error("train_loss", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_error("val_loss", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_error("test_loss", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        decoded: Tensor = self(batch[0])
        return decoded

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def _log_error(self, name: str, batch: Batch) -> Tensor:
        (images,) = batch
        loss = nn.functional.mse_loss(self(images), images)
        self.log(name, loss, prog_bar=True)
        return loss


class DigitData(LightningDataModule):
    """Images of digits, cut into training, validation and test images.

    Args:
        source: "digits" are the 1,797 images that come with scikit-learn; "drawn" are made on the spot and need nothing.
    """

    def __init__(self, source: Literal["digits", "drawn"] = "drawn", batch_size: int = 64, seed: int = 7) -> None:
        super().__init__()
        self.batch_size = batch_size
        random = torch.Generator().manual_seed(seed)
        images = load_digits() if source == "digits" else draw_digits(DRAWN_COUNT, random)
        sizes = [len(images) - 2 * HELD_OUT, HELD_OUT, HELD_OUT]
        self.train_set, self.val_set, self.test_set = random_split(TensorDataset(images), sizes, random)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._read_in_order(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._read_in_order(self.test_set)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._read_in_order(self.test_set)

    def _read_in_order(self, dataset: Dataset[Batch]) -> DataLoader[Batch]:
        return DataLoader(dataset, batch_size=HELD_OUT)


def load_digits() -> Tensor:
    """The handwritten digits of scikit-learn: float32 in 0..1, shape (1797, 8, 8)."""
    datasets = import_optional("sklearn.datasets", "for `--data digits`")
    return torch.from_numpy(datasets.load_digits().images).float() / 16


def draw_digits(count: int, random: torch.Generator) -> Tensor:
    """Digits at random places, in random strength and with some noise: float32 in 0..1, shape (count, 8, 8).

    Example:
        >>> draw_digits(3, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 8, 8])
    """
    glyphs = torch.tensor([[[float(pixel) for pixel in row] for row in glyph.split()] for glyph in GLYPHS])
    images = torch.zeros(count, SIDE, SIDE)
    which = torch.randint(len(GLYPHS), (count,), generator=random)
    rows = torch.randint(2, (count,), generator=random).tolist()
    columns = torch.randint(4, (count,), generator=random).tolist()
    for image, glyph, row, column in zip(images, glyphs[which], rows, columns, strict=True):
        image[row : row + 7, column : column + 5] = glyph
    strength = 0.6 + 0.4 * torch.rand(count, 1, 1, generator=random)
    return (images * strength + 0.05 * torch.randn(images.shape, generator=random)).clamp(0, 1)


def format_images(images: Tensor) -> str:
    """Images of the shape (count, height, width) beside each other, as text."""
    levels = (images.clamp(0, 1) * (len(SHADES) - 1)).round().long().tolist()
    return "\n".join("  ".join("".join(SHADES[level] * 2 for level in row) for row in rows) for rows in zip(*levels))


def run_demo(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="fulmen demo", description="Trains, tests and predicts on small images of digits, and shows what came back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    preferred = "digits" if is_installed("sklearn") else "drawn"
    help_data = "handwritten digits of scikit-learn, or digits drawn on the spot, which need no other package"
    parser.add_argument("--data", choices=("digits", "drawn"), default=preferred, help=help_data)
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=7, help="seed of weights, images and shuffling")
    parser.add_argument("--out", default="fulmen-demo", help="folder for metrics and checkpoints")
    options = parser.parse_args(arguments)
    if options.data == "digits" and not is_installed("sklearn"):
        parser.error('`--data digits` needs scikit-learn. Run `pip install "fulmen[examples]"`.')
    train_and_show(options.data, options.epochs, options.seed, options.out)


def train_and_show(source: Literal["digits", "drawn"], epochs: int, seed: int, out: str) -> None:
    """Fits, tests and predicts, and prints the errors and three of the images."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small are multiplied before a second thread has woken up
    seed_everything(seed, workers=True)
    data = DigitData(source, seed=seed)
    model = AutoEncoder()
    best = ModelCheckpoint(monitor="val_loss")
    logger = CSVLogger(out, name="")
    trainer = Trainer(max_epochs=epochs, logger=logger, callbacks=[best], default_root_dir=out, log_every_n_steps=10)
    trainer.fit(model, datamodule=data)
    error = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)[0]["test_loss"]
    predictions = trainer.predict(model, datamodule=data, ckpt_path="best") or []
    print(
        f"\nImages that were not trained on, and below them what came back from {model.hparams['latent']} numbers each:\n"
    )
    originals = torch.stack([data.test_set[index][0] for index in range(3)])
    print(f"{format_images(originals)}\n\n{format_images(torch.cat(predictions)[:3])}\n")
    print(f"data         {source}")
    print(f"test loss    {error:.4f}, the mean squared error of a pixel")
    print(f"time         {time.perf_counter() - started:.1f} s, {trainer.global_step} optimizer steps")
    print(f"metrics      {logger.log_dir}/metrics.csv")
    print(f"checkpoint   {best.best_model_path}")
