"""The autoencoder of the README on MNIST, everything a Trainer does by default turned on, beside the loop by hand.

    python -m benchmarks.autoencoder --data-dir DIR [--package lightning.pytorch]

60,000 real images as tensors in memory behind a shuffling DataLoader, batch 128, Adam, CPU, one thread. Each round
times the hand-written loop and one whole `fit` (set-up, progress bar, CSV logger, checkpoints, summary and all), in
turn, and compares the final weights bit for bit. DIR holds the four IDX files of MNIST as .gz, or MNIST/raw does.
"""

from __future__ import annotations

import gzip
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import harness

SEED = 7


def find_images(folder: Path) -> Path | None:
    name = "train-images-idx3-ubyte.gz"
    return next((path for path in (folder / name, folder / "MNIST" / "raw" / name) if path.is_file()), None)


def read_images(path: Path) -> Tensor:
    """The images of an IDX file as rows of 784 floats in 0..1."""
    pixels = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[16:]), dtype=torch.uint8)
    return pixels.view(-1, 28 * 28).float().div_(255)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))

    def loss(self, images: Tensor) -> Tensor:
        return F.mse_loss(self.decoder(self.encoder(images)), images)


def loader(images: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images), batch_size=128, shuffle=True)


def by_hand(images: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(SEED)
    net = Autoencoder()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    batches = loader(images)
    for _ in range(epochs):
        for (batch,) in batches:
            loss = net.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def by_trainer(pl: SimpleNamespace, images: Tensor, epochs: int, folder: Path) -> nn.Module:
    class LitAutoencoder(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Autoencoder()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = self.net.loss(batch[0])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    torch.manual_seed(SEED)
    module: Any = LitAutoencoder()
    with harness.silent_terminal():
        trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=pl.CSVLogger(folder))
        trainer.fit(module, loader(images))
    if not list(folder.rglob("*.ckpt")):
        raise RuntimeError("No checkpoint was written: this is not a run with everything on.")
    return module.net


def timed(run: Callable[[], nn.Module]) -> tuple[float, nn.Module]:
    start = time.perf_counter()
    net = run()
    return time.perf_counter() - start, net


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    others = right.state_dict()
    return all(torch.equal(weight, others[name]) for name, weight in left.state_dict().items())


def main() -> None:
    parser = harness.parser("Wall time of a real training run over the hand-written loop.")
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_DIR", "../shared/data"), help="where MNIST is")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the images per round")
    parser.add_argument("--rounds", type=int, default=7, help="how often both are run")
    args = parser.parse_args()
    path = find_images(Path(args.data_dir))
    if path is None:
        print(f"SKIPPED benchmarks.autoencoder: no train-images-idx3-ubyte.gz in {args.data_dir} (set --data-dir).")
        sys.exit(0)
    pl = harness.load(args.package)
    images = read_images(path)
    rounds, epochs = (2, 1) if args.quick else (args.rounds, args.epochs)
    if args.quick:
        images = images[:6400]

    hand_times, trainer_times, equal = [], [], []
    for index in range(rounds):
        with harness.scratch_folder() as folder:
            runs = {
                "hand": lambda: by_hand(images, epochs),
                "trainer": lambda folder=folder: by_trainer(pl, images, epochs, folder),
            }
            order = sorted(runs, reverse=index % 2 == 1)
            results = {name: timed(runs[name]) for name in order}
        hand_times.append(results["hand"][0])
        trainer_times.append(results["trainer"][0])
        equal.append(same_bits(results["hand"][1], results["trainer"][1]))

    ratios = [ours / hand for hand, ours in zip(hand_times, trainer_times)]
    rows = [
        ("hand-written loop, seconds", harness.spread(hand_times, 2)),
        ("whole fit, defaults on, seconds", harness.spread(trainer_times, 2)),
        ("ratio of each round", harness.spread(ratios, 3)),
        ("ratio of the best times", f"{min(trainer_times) / min(hand_times):.3f}"),
        ("ratio of the median times", f"{statistics.median(trainer_times) / statistics.median(hand_times):.3f}"),
        ("final weights bitwise equal", f"{sum(equal)} of {len(equal)} rounds"),
    ]
    title = f"autoencoder, {len(images)} images, {epochs} epochs, batch 128"
    harness.print_table(title, pl, ("", "median (best .. worst)"), rows)


if __name__ == "__main__":
    main()
