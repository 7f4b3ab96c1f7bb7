"""How long training stands still for a checkpoint that is written in the background.

    python -m benchmarks.async_save [--megabytes 500] [--device cuda] [--quick]

Two figures, each over what the same save costs when training waits for it. *Blocking* is the time inside of the save.
*Total* is all that a run with saves takes longer than one without, the end of the run included, where the last write is
waited for: there the write takes cores and memory from the steps, and what does not fit beside them shows. With
`--clock cpu` both are of the thread that trains: not what it waits for disks or for cores that others use.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks import harness

LAYERS = 32


def state_of(megabytes: int, device: str) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    """A model with Adam's state, so large in all."""
    width = int((megabytes * 2**20 / 4 / 3 / LAYERS) ** 0.5)
    model = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(LAYERS))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    step(model, optimizer, torch.ones(1, width, device=device))
    return model, optimizer


def step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    # Side by side: through all layers, numbers would get so small that arithmetic is slow.
    sum(layer(batch).square().mean() for layer in model).backward()
    optimizer.step()


def finished(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def trial(options: Any, io: Any, folder: Path, saves: int) -> tuple[float, list[float]]:
    """Seconds for all steps, saves and the end of the run; and those inside of each save."""
    torch.manual_seed(0)
    model, optimizer = options.made
    batch = torch.randn(options.batch_size, model[0].in_features, device=options.device)
    blocked = []
    finished(options.device)
    begin = options.now()
    for number in range(options.steps):
        step(model, optimizer, batch)
        if saves and number % (options.steps // saves) == 0:
            finished(options.device)
            before = options.now()
            checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
            io.save_checkpoint(checkpoint, folder / f"{number % 2}.ckpt")
            blocked.append(options.now() - before)
    finished(options.device)
    if hasattr(io, "wait"):
        io.wait()
    return options.now() - begin, blocked


def first_save(options: Any, io: Any, folder: Path) -> float:
    """Seconds inside of the first save, whose memory is new."""
    model, optimizer = options.made
    before = options.now()
    checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    io.save_checkpoint(checkpoint, folder / "first.ckpt")
    return options.now() - before


def measured(options: Any, folder: Path, io: Any) -> tuple[float, float, float]:
    """Seconds of the first save, of later ones, and what each of these added to a run."""
    first = first_save(options, io, folder)
    before, _ = trial(options, None, folder, 0)
    whole, blocked = trial(options, io, folder, options.saves)
    after, _ = trial(options, None, folder, 0)
    io.teardown()
    return first, statistics.mean(blocked), (whole - (before + after) / 2) / options.saves


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--megabytes", type=int, default=500, help="weights and Adam's state together")
    parser.add_argument("--threads", type=int, default=1, help="of the training steps")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: of the training thread, where others use the cores",
    )
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps after each save, about")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.saves, options.rounds, options.seconds = 20, 2, 1, 0.3
    options.now = time.perf_counter if options.clock == "wall" else time.thread_time
    pl = harness.load(options.package)
    torch.set_num_threads(options.threads)
    plugins: Any = __import__(f"{options.package}.plugins", fromlist=["plugins"])
    options.batch_size = 16 if options.device == "cpu" else 512
    options.made = state_of(options.megabytes, options.device)
    with harness.scratch_folder() as scratch:
        folder = options.folder or scratch
        options.steps = 8
        per_step = trial(options, None, folder, 0)[0] / options.steps
        options.steps = max(options.saves, round(options.seconds / per_step)) * options.saves
        at_once, later = [], []
        for _ in range(options.rounds):
            at_once.append(measured(options, folder, plugins.TorchCheckpointIO()))
            later.append(measured(options, folder, plugins.AsyncCheckpointIO()))
            blocking, total = (100 * later[-1][at] / at_once[-1][1] for at in (1, 2))
            print(f"round {len(later)}: blocking {blocking:.1f} %, total {total:.1f} %", flush=True)
    base = statistics.median(row[1] for row in at_once)
    table = []
    for name, rows in (("at once", at_once), ("in the background", later)):
        columns = list(zip(*rows))
        shares = [f"{100 * statistics.median(column) / base:.1f} %" for column in columns]
        table.append((name, *(cell for pair in zip(map(in_ms, columns), shares) for cell in pair)))
    header = ("save", "first ms", "", "blocking ms", "", "total ms", "")
    harness.print_table(title(options, per_step), SimpleNamespace(name=pl.name, version=pl.version), header, table)


def in_ms(seconds: tuple[float, ...]) -> str:
    return harness.spread([1e3 * value for value in seconds], 0)


def title(options: Any, per_step: float) -> str:
    steps = f"{options.steps} steps of {1e3 * per_step:.0f} ms on {options.device}, {options.threads} thread(s)"
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    load += " (time of the training thread)" * (options.clock == "cpu")
    return f"Stall of one save of {options.megabytes} MB, {options.saves} in {steps}{load}"


if __name__ == "__main__":
    main()
