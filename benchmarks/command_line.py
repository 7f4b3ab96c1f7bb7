"""What `--help` of a command line costs over jsonargparse alone with the same arguments.

    python -m benchmarks.command_line [--repeat N]

Each measurement is a fresh interpreter that has imported the package; both make a parser with the Trainer's and a
module's arguments for each of the four commands, and print the help of one. Processor time is counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PROBE = """
import contextlib, io, sys, time
import fulmen as pl
from jsonargparse import ArgumentParser
from fulmen.cli import LightningCLI
import fulmen.cli.lightning_cli
from fulmen.cli.parser import prepare_jsonargparse

class Net(pl.LightningModule):
    def __init__(self, width: int = 3, scale: float = 1.0):
        super().__init__()

def alone():
    parser = ArgumentParser()
    commands = parser.add_subcommands()
    for name in LightningCLI.subcommands():
        own = ArgumentParser()
        own.add_class_arguments(pl.Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True)
        own.add_class_arguments(Net, "model", fail_untyped=False, sub_configs=True)
        own.add_subclass_arguments(pl.LightningDataModule, "data", fail_untyped=False, required=False)
        own.add_method_arguments(pl.Trainer, name, skip=LightningCLI.subcommands()[name])
        commands.add_subcommand(name, own)
    parser.parse_args(["fit", "-h"])

prepare_jsonargparse()  # the same classes are known to both
start = time.process_time()
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    alone() if sys.argv[1] == "alone" else LightningCLI(Net, args=["fit", "-h"])
print(time.process_time() - start)
"""


def measure_seconds(kind: str) -> float:
    command = [sys.executable, "-W", "ignore", "-c", PROBE, kind]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of `fit --help`, beside jsonargparse alone.")
    parser.add_argument("--repeat", type=int, default=5, help="interpreters started per row")
    repeat = parser.parse_args().repeat
    seconds = {kind: statistics.median(measure_seconds(kind) for _ in range(repeat)) for kind in ("alone", "cli")}
    print(f"fit --help, jsonargparse alone: {seconds['alone']:.3f} s")
    print(f"fit --help, LightningCLI:       {seconds['cli']:.3f} s")
    print(f"ratio: {seconds['cli'] / seconds['alone']:.2f} (limit 1.5)")


if __name__ == "__main__":
    main()
