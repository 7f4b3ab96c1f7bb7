"""Microseconds that Fabric adds to each step of the loop one would write by hand, on one device.

    python -m benchmarks.fabric [--package lightning.pytorch] [--clock cpu]

The same loop runs bare and with wrapped objects, in turn, in this process: ``Linear(8, 2)``, batches of 4 that are
already in memory, SGD, CPU, one thread. `accelerate` is measured in the same way where it is installed. Two processes
are measured by ``benchmarks.ddp``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import harness
from benchmarks.ddp import Tiny
from benchmarks.overhead import CLOCKS, STEPS, WARM_UP, seconds_per_step

Backward = Callable[[torch.Tensor], None]


def loop(model: Any, optimizer: Any, backward: Backward, batches: harness.Marked) -> None:
    for batch in batches:
        loss = model(batch)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()


def new_objects() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = Tiny()
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def run_bare(batches: harness.Marked) -> None:
    loop(*new_objects(), torch.Tensor.backward, batches)


def fabric_runner(pl: SimpleNamespace, precision: str) -> Callable[[harness.Marked], None]:
    def run_fabric(batches: harness.Marked) -> None:
        fabric = pl.Fabric(accelerator="cpu", devices=1, precision=precision)
        loop(*fabric.setup(*new_objects()), fabric.backward, batches)

    return run_fabric


def run_accelerate(batches: harness.Marked) -> None:
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    loop(*accelerator.prepare(*new_objects()), accelerator.backward, batches)


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="how often each row is measured")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="elapsed time, or this process's own")
    args = parser.parse_args()
    rounds, steps = (2, 2 * WARM_UP) if args.quick else (args.rounds, STEPS)
    pl = harness.load(args.package)
    clock = CLOCKS[args.clock]
    runners = {"Fabric": fabric_runner(pl, "32-true"), "Fabric, bf16-mixed": fabric_runner(pl, "bf16-mixed")}
    if importlib.util.find_spec("accelerate") is not None:
        runners["accelerate"] = run_accelerate
    rows = []
    for name, framework in runners.items():
        pairs = []
        for index in range(rounds):
            order = (run_bare, framework) if index % 2 == 0 else (framework, run_bare)
            times = {run: 1e6 * seconds_per_step(run, steps, clock) for run in order}
            pairs.append((times[run_bare], times[framework]))
        added = [framed - bare for bare, framed in pairs]
        ratios = [framed / bare for bare, framed in pairs]
        middle = sorted(pairs)[len(pairs) // 2][0]
        rows.append((name, f"{middle:.1f}", harness.spread(added), harness.spread(ratios, 2)))
    harness.print_table(
        "overhead per step of a loop of one's own", pl, ("", "bare us", "added us (best .. worst)", "ratio"), rows
    )


if __name__ == "__main__":
    main()
