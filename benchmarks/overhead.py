"""Microseconds a Trainer adds to each step of the loop one would write by hand.

    python -m benchmarks.overhead [--package lightning.pytorch]

``Linear(8, 2)``, batches of 4 that are already in memory, SGD, CPU, one thread: nothing to hide behind. Each round
times the hand-written loop and one `fit` over as many batches, in turn, in this process; a row is the median of the
rounds' differences, with the best and the worst beside it. The start of a `fit` is not counted. On a machine that has
other work to do, ``--clock cpu`` counts this process's own time instead of the wall's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

STEPS, WARM_UP = 2000, 250
FURTHER = 10


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_per_step(run: Callable[[harness.Marked], None], steps: int, clock: Callable[[], float]) -> float:
    marks: list[float] = []
    run(harness.Marked(WARM_UP + steps, WARM_UP, lambda: marks.append(clock())))
    # Who counts the batches does not ask for one behind the last, and then the last mark is not made.
    return (marks[-1] - marks[1]) / ((len(marks) - 2) * WARM_UP)


def bare(batches: harness.Marked) -> None:
    net = harness.Net()
    harness.bare_loop(net, torch.optim.SGD(net.parameters(), lr=0.01), batches)


def log_one(module: Any, loss: Tensor) -> None:
    module.log("loss", loss, prog_bar=True)


def log_further(module: Any, loss: Tensor) -> None:
    module.log("loss", loss, prog_bar=True)
    value = loss.detach()
    for name in NAMES:
        module.log(name, value)


def log_further_epoch(module: Any, loss: Tensor) -> None:
    module.log("loss", loss, prog_bar=True)
    value = loss.detach()
    for name in NAMES:
        module.log(name, value, on_step=True, on_epoch=True)


NAMES = [f"value_{index}" for index in range(FURTHER)]


def measure(
    pl: SimpleNamespace, folder: Path, rounds: int, steps: int, clock: Callable[[], float]
) -> dict[str, list[tuple[float, float]]]:
    """Per configuration the rounds' (bare, framework) microseconds per step."""
    nothing = dict(harness.NOTHING_ON)
    defaults = lambda: {"logger": pl.CSVLogger(folder)}  # noqa: E731
    configurations: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
        "nothing on": (None, lambda: nothing),
        "barebones=True": (None, lambda: {"barebones": True}),
        "defaults on, 1 log": (log_one, defaults),
        f"defaults on, {1 + FURTHER} logs": (log_further, defaults),
        f"defaults on, {1 + FURTHER} logs, on_epoch": (log_further_epoch, defaults),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in configurations}
    for index in range(rounds):
        for name, (log, arguments) in configurations.items():

            def framework(batches: harness.Marked, log: Any = log, arguments: Any = arguments) -> None:
                harness.fit(pl, harness.tiny_module(pl, log), batches, folder, **arguments())

            # Whoever runs first may find the machine in another mood: take turns.
            order = (bare, framework) if index % 2 == 0 else (framework, bare)
            times = {run: 1e6 * seconds_per_step(run, steps, clock) for run in order}
            results[name].append((times[bare], times[framework]))
    return results


def main() -> None:
    parser = harness.parser("Time a Trainer adds to each training step.")
    parser.add_argument("--rounds", type=int, default=12, help="how often each row is measured")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="elapsed time, or this process's own")
    args = parser.parse_args()
    rounds, steps = (2, 2 * WARM_UP) if args.quick else (args.rounds, STEPS)
    pl = harness.load(args.package)
    with harness.scratch_folder() as folder:
        results = measure(pl, folder, rounds, steps, CLOCKS[args.clock])

    def overheads(name: str) -> list[float]:
        return [framework - bare for bare, framework in results[name]]

    rows = []
    for name, pairs in results.items():
        middle = sorted(pairs)[len(pairs) // 2][0]
        ratios = [framework / bare for bare, framework in pairs]
        rows.append((name, f"{middle:.1f}", harness.spread(overheads(name)), harness.spread(ratios, 2)))
    one, *more = list(results)[2:]
    for name, label in zip(more, ("each further log", "each further log, on_epoch too")):
        each = [(many - first) / FURTHER for first, many in zip(overheads(one), overheads(name))]
        rows.append((label, "", harness.spread(each), ""))
    harness.print_table("overhead per step", pl, ("", "bare us", "added us (best .. worst)", "ratio"), rows)


if __name__ == "__main__":
    main()
