"""Time per training step on two processes: the trainer, Fabric, and a loop over torch's `DistributedDataParallel`.

    python -m benchmarks.ddp

All run in the same two processes, in turn, over gloo on the CPU with one thread each. The larger model is the
autoencoder of the README, on batches that already lie in memory.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness

RANKS = 2
Figure = tuple[float, float]


class Autoencoder(nn.Module):
    """784-64-3-64-784, with the mean square error of its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 3), nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 784)
        )

    def forward(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch).square().mean()


class Tiny(harness.Net):
    forward = harness.Net.loss


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-64-3-64-784, batch 128": (Autoencoder, (128, 784)),
    "8-2, batch 4": (Tiny, (4, 8)),
}


def by_hand(model: nn.Module, batches: Any) -> None:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    for batch in batches:
        loss = wrapped(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def by_fabric(pl: SimpleNamespace, model: nn.Module, batches: Any) -> None:
    fabric = pl.Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
    with harness.silent_terminal():
        fabric.launch()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for batch in batches:
        loss = wrapped(batch)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()


def by_trainer(pl: SimpleNamespace, model: nn.Module, batches: Any, folder: Path) -> None:
    class Module(pl.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    harness.fit(pl, Module(), batches, folder, devices=RANKS, strategy="ddp", **harness.NOTHING_ON)


def measure(rank: int, port: int, arguments: Any, folder: str, answers: Any) -> None:
    """One of the processes; the first one answers: per model the rounds' (by hand, trainer, Fabric) microseconds per step.

    Each figure is a pair: elapsed time, and the time this process was at work.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": RANKS, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    pl = harness.load(arguments.package)
    dist.init_process_group("gloo")
    steps, rounds = (100, 2) if arguments.quick else (arguments.steps, arguments.rounds)
    results: dict[str, list[tuple[Figure, Figure, Figure]]] = {}
    for name, (make, shape) in MODELS.items():
        results[name] = []
        for index in range(rounds):

            def timed(run: Callable[[Any], None], shape: tuple[int, ...] = shape) -> Figure:
                marks: list[Figure] = []
                mark = lambda: marks.append((time.perf_counter(), time.process_time()))  # noqa: E731
                batches = harness.Marked(steps, steps // 10, mark)
                batches.batch = torch.randn(*shape)
                dist.barrier()
                run(batches)
                # The median tenth, without the first: other work of the machine disturbs some of them.
                tenths = [[b - a for a, b in itertools.pairwise(clock)][1:] for clock in zip(*marks)]
                wall, cpu = (1e6 * statistics.median(tenth) / (steps // 10) for tenth in tenths)
                return wall, cpu

            hand = lambda batches, make=make: by_hand(make(), batches)  # noqa: E731
            trainer = lambda batches, make=make: by_trainer(pl, make(), batches, Path(folder))  # noqa: E731
            fabric = lambda batches, make=make: by_fabric(pl, make(), batches)  # noqa: E731
            runs = [hand, trainer, fabric]
            times = {run: timed(run) for run in runs[index % 3 :] + runs[: index % 3]}
            results[name].append((times[hand], times[trainer], times[fabric]))
    if rank == 0:
        answers.put((pl.version, results))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    port = harness.free_port()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=measure, args=(rank, port, arguments, folder, answers), daemon=True)
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        while answers.empty():
            time.sleep(0.1)
            if ended := [rank for rank, process in enumerate(ranks) if process.exitcode]:
                raise SystemExit(f"Rank {ended[0]} ended without an answer: see above.")
        version, results = answers.get()
        for process in ranks:
            process.join()
    rows = []
    for name, pairs in results.items():
        for index, clock in enumerate(("elapsed", "at work")):
            hand, *others = ([figure[index] for figure in side] for side in zip(*pairs))
            row = [f"{name}: {clock}", harness.spread(hand)]
            for other in others:
                row += [harness.spread(other), f"{statistics.median(other) / statistics.median(hand):.3f}"]
            rows.append(tuple(row))
    title = f"microseconds per step on {RANKS} processes"
    pl = SimpleNamespace(name=arguments.package, version=version)
    header = ("model", "by hand: median (best .. worst)", "trainer", "ratio", "Fabric", "ratio")
    harness.print_table(title, pl, header, rows)


if __name__ == "__main__":
    main()
