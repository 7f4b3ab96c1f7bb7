"""Memory a long run gains per step once it is warm.

    python -m benchmarks.memory [--package lightning.pytorch]

One `fit` of the smallest model over 100,000 steps after 20,000 of warm-up; resident memory is read every 1,000 steps.
"Defaults on" is a progress bar, the CSV logger, a checkpoint callback and one `self.log`. Each row is a process of its
own, the hand-written loop too: what that one gains, torch and the allocator do.

Rich remembers the widths of the last 4,096 texts it has drawn. Its bar gains 0.8 MB until they are full, after several
hundred redraws and however many steps those take; they are filled here before the `fit` starts.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import harness

EVERY = 1000


def resident_kilobytes() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


class Samples:
    def __init__(self) -> None:
        self.kilobytes: list[float] = []

    def take(self) -> None:
        gc.collect()  # garbage waiting for its turn is no leak
        self.kilobytes.append(resident_kilobytes())


def growth(kilobytes: list[float], warm_up: int) -> dict[str, float]:
    """Last over first after warm-up, and the median slope between halves, both in KB per 1,000 steps."""
    warm = kilobytes[warm_up:]
    half = len(warm) // 2
    slopes = [(later - earlier) / half for earlier, later in zip(warm, warm[half:])]
    return {
        "resident": warm[-1],
        "gained": warm[-1] - warm[0],
        "per_thousand": (warm[-1] - warm[0]) / (len(warm) - 1),
        "slope": statistics.median(slopes),
    }


def fill_memory_of_rich() -> None:
    if importlib.util.find_spec("rich") is not None:
        from rich.cells import cell_len

        for number in range(5000):
            cell_len(f"train_loss: {number / 5000:<100}")


def run(package: str, bar: str | None, steps: int, warm_up: int) -> dict[str, float]:
    samples = Samples()
    batches = harness.Marked(warm_up + steps, EVERY, samples.take)
    if package == "bare":
        torch.set_num_threads(1)
        net = harness.Net()
        harness.bare_loop(net, torch.optim.SGD(net.parameters(), lr=0.01), batches)
    else:
        pl = harness.load(package)
        with harness.scratch_folder() as folder:
            if bar is None:
                harness.fit(pl, harness.tiny_module(pl), batches, folder, **harness.NOTHING_ON)
            else:
                module = harness.tiny_module(pl, lambda module, loss: module.log("loss", loss, prog_bar=True))
                fill_memory_of_rich()
                callback = getattr(importlib.import_module(f"{package}.callbacks"), bar)()
                harness.fit(pl, module, batches, folder, logger=pl.CSVLogger(folder), callbacks=[callback])
    return growth(samples.kilobytes, warm_up // EVERY)


def main() -> None:
    parser = harness.parser("Resident memory gained per 1,000 training steps.")
    parser.add_argument("--steps", type=int, default=100_000, help="steps after warm-up")
    parser.add_argument("--warm-up", type=int, default=20_000, help="steps before the first reading counts")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        print("SKIPPED benchmarks.memory: reads /proc, which this system does not have.")
        return
    steps, warm_up = (4 * EVERY, EVERY) if args.quick else (args.steps, args.warm_up)
    if args.only:
        package, bar = (*args.only, None)[:2]
        print(json.dumps(run(package, bar, steps, warm_up)))
        return

    runs = {
        "bare loop": ("bare",),
        "fit, nothing on": (args.package,),
        "fit, defaults on, TQDM bar": (args.package, "TQDMProgressBar"),
    }
    if importlib.util.find_spec("rich") is not None:
        runs["fit, defaults on, Rich bar"] = (args.package, "RichProgressBar")
    rows = []
    for label, what in runs.items():
        sizes = ["--steps", str(steps), "--warm-up", str(warm_up)]
        command = [sys.executable, "-m", "benchmarks.memory", *sizes, "--only", *what]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        megabytes = f"{found['resident'] / 1024:.1f}"
        rows.append((label, megabytes, *(f"{found[key]:+.2f}" for key in ("gained", "per_thousand", "slope"))))
    header = ("", "RSS MB", "gained KB", "KB per 1,000 steps", "median slope")
    harness.print_table(f"memory over {steps:,} steps", harness.load(args.package), header, rows)


if __name__ == "__main__":
    main()
