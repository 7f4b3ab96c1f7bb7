"""What a search for a learning rate adds to its steps, against the same sweep written by hand.

    python -m benchmarks.lr_find [--package lightning.pytorch]

An autoencoder of 784-256-64-256-784 on batches of 128 that already lie in memory, SGD, CPU, one thread. The loop by hand sets
the rate, makes the step and reads the loss, as a search has to. Each round times that loop and a whole `Tuner.lr_find` in turn,
start, state kept and put back included; the ratio is the median of the rounds' ratios, the best and the worst beside it.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness

LIMIT = 1.3
STEPS = 100


class InMemory:
    """Batches that already lie in memory; a list would be one of loaders."""

    def __init__(self, count: int) -> None:
        self.batches = [torch.rand(128, 784) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def autoencoder() -> nn.Sequential:
    sizes = (784, 256, 64, 256, 784)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def sweep_by_hand(batches: InMemory) -> float:
    net = autoencoder()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-8)
    losses = []
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-8 * 1e6 ** (step / STEPS)
        loss = nn.functional.mse_loss(net(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return time.perf_counter() - start


def search(pl: SimpleNamespace, batches: InMemory, folder: Path) -> float:
    class Module(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1
            self.net = autoencoder()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch), batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    tuner: Any = importlib.import_module(f"{pl.name}.tuner").Tuner
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **harness.NOTHING_ON)
    module = Module()
    with harness.silent_terminal():
        start = time.perf_counter()
        curve = tuner(trainer).lr_find(
            module, batches, max_lr=1e-2, num_training=STEPS, early_stop_threshold=None, update_attr=False
        )
        seconds = time.perf_counter() - start
    if len(curve.results["loss"]) != STEPS:
        raise RuntimeError(f"{pl.name} made {len(curve.results['loss'])} steps instead of {STEPS}.")
    return seconds


def main() -> None:
    parser = harness.parser("A search for a learning rate against the sweep written by hand.")
    parser.add_argument("--rounds", type=int, default=9, help="how often it is measured")
    args = parser.parse_args()
    pl = harness.load(args.package)
    batches = InMemory(STEPS)
    pairs = []
    with harness.scratch_folder() as folder:
        search(pl, batches, folder)  # what is imported on first use
        for index in range(2 if args.quick else args.rounds):
            # Whoever runs first may find the machine in another mood: take turns.
            if index % 2:
                mine = search(pl, batches, folder)
                hand = sweep_by_hand(batches)
            else:
                hand = sweep_by_hand(batches)
                mine = search(pl, batches, folder)
            pairs.append((hand, mine))
    hand = 1e3 * statistics.median(hand for hand, _ in pairs)
    mine = 1e3 * statistics.median(mine for _, mine in pairs)
    ratios = [mine / hand for hand, mine in pairs]
    row = (f"lr_find of {STEPS} steps", f"{hand:.1f}", f"{mine:.1f}", harness.spread(ratios, 2))
    header = ("", "by hand, ms", "search, ms", f"ratio, limit {LIMIT}")
    harness.print_table("a search for a learning rate, batches of 128 x 784, CPU", pl, header, [row])


if __name__ == "__main__":
    main()
