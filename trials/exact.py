"""Evaluation on several processes against one: every size of the data, number of processes and batch size.

    python -m trials.exact [--package lightning.pytorch]

`validate` on CPU processes over gloo, in float64: what is logged as mean, sum, min, max and as a torchmetrics object.
What counts is the largest difference to one process, relative to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import harness

SIZES, WORLDS, BATCHES = range(1, 51), range(1, 5), range(1, 9)
REDUCTIONS = ("mean", "sum", "min", "max")
LIMIT = 1e-12


def numbers(pl: SimpleNamespace, sizes: range, world: int) -> dict[str, dict[str, float]]:
    """What `validate` returns here, for each size and batch size."""
    import torchmetrics

    class Judge(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.metric = torchmetrics.MeanMetric().set_dtype(torch.float64)

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for name in REDUCTIONS:
                self.log(name, batch.mean(), reduce_fx=name)
            self.metric.update(batch)
            self.log("metric", self.metric)

    found = {}
    options: dict[str, Any] = {"accelerator": "cpu", "devices": world, **harness.NOTHING_ON}
    for size in sizes:
        for batch_size in BATCHES:
            loader = DataLoader((torch.arange(size).double() + 0.1) ** 1.5, batch_size)
            trainer = pl.Trainer(strategy="ddp" if world > 1 else "auto", **options)
            (found[f"{size} {batch_size}"],) = trainer.validate(Judge(), loader, verbose=False)
    return found


def start(package: str, quick: bool, world: int, folder: Path) -> list[dict[str, dict[str, float]]]:
    """The numbers of each process of a group of this size."""
    port, ranks = harness.free_port(), []
    for rank in range(world):
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
        environment = {**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "trials.exact", "--package", package, "--answer", str(folder)]
        command += ["--quick"] * quick
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    while None in (codes := [process.poll() for process in ranks]) and not any(codes):
        time.sleep(0.1)
    if any(codes):
        for process in ranks:
            process.kill()
        sys.exit(f"{package} failed on {world} processes")
    return [json.loads((folder / f"{world}-{rank}").read_text()) for rank in range(world)]


def difference(found: dict[str, float], expected: dict[str, float]) -> float:
    return max(abs(found[name] - value) / max(1.0, abs(value)) for name, value in expected.items())


def main() -> None:
    parser = harness.parser("Evaluation on several processes against one.")
    parser.add_argument("--answer", help="the folder for the numbers of this process, one of several")
    arguments = parser.parse_args()
    sizes = range(20, 23) if arguments.quick else SIZES
    if arguments.answer:
        world, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
        answer = json.dumps(numbers(harness.load(arguments.package), sizes, world))
        Path(arguments.answer, f"{world}-{rank}").write_text(answer)
        return
    with tempfile.TemporaryDirectory() as name:
        expected, *others = [start(arguments.package, arguments.quick, world, Path(name)) for world in WORLDS]
    rows, worst = [], 0.0
    for ranks in others:
        errors = {case: max(difference(rank[case], expected[0][case]) for rank in ranks) for case in expected[0]}
        case = max(errors, key=errors.__getitem__)
        equal = sum(error <= LIMIT for error in errors.values())
        rows.append((f"{len(ranks)} processes", f"{equal}/{len(errors)}", f"{errors[case]:.1e}", *case.split()))
        worst = max(worst, errors[case])
    header = ("", "equal", "largest difference", "samples", "batch size")
    harness.print_table("evaluation against one process", harness.load(arguments.package), header, rows)
    if worst > LIMIT:
        sys.exit(f"differs by {worst:.1e}, which is more than {LIMIT:.0e}")


if __name__ == "__main__":
    main()
