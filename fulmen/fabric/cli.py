"""The command line of Fabric: ``python -m fulmen fabric run SCRIPT`` on torchrun, and ``consolidate FOLDER``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from fulmen.checkpoint.consolidate import consolidate
from fulmen.engine.accelerators import AcceleratorRegistry
from fulmen.engine.resolve import ALIASES, PRECISIONS, gpu_kind
from fulmen.fabric.strategy import STRATEGY_REGISTRY

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
# What starts processes by itself, or needs arguments of its own.
_NOT_OFFERED = re.compile("spawn|fork|notebook|xla|tpu|offload")


def offered_strategies() -> list[str]:
    """Names of strategies whose processes can be started by a command line."""
    return [name for name in STRATEGY_REGISTRY.available_strategies() if not _NOT_OFFERED.search(name)]


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="fulmen fabric", description="Runs programs that use `fulmen.Fabric`.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="start a script on several processes", allow_abbrev=False,
        description="Starts a script on several processes, with torchrun. Other options are the script's own; so is"
        " all that stands behind `--`.",
    )  # fmt: skip
    run.add_argument("script", metavar="SCRIPT", help="a Python file that makes a `Fabric`")
    run.add_argument("--accelerator", choices=ACCELERATORS, help="the kind of device")
    run.add_argument("--strategy", choices=offered_strategies(), help="how work is split over devices")
    run.add_argument("--devices", default="1", help="how many devices on each machine, which ones, or 'auto'")
    run.add_argument("--num-nodes", "--num_nodes", type=int, default=1, help="the number of machines")
    run.add_argument("--node-rank", "--node_rank", type=int, default=0, help="the index of this machine, from 0")
    run.add_argument("--main-address", "--main_address", default="127.0.0.1", help="the host of machine 0")
    run.add_argument("--main-port", "--main_port", type=int, default=29400, help="a free port there")
    run.add_argument("--precision", choices=(*PRECISIONS, *ALIASES), help="the numbers to compute in")
    join = commands.add_parser(
        "consolidate", help="make one file from a sharded checkpoint",
        description="Turns a sharded checkpoint, which is a folder, into one file for `torch.load`.",
    )  # fmt: skip
    join.add_argument("folder", metavar="FOLDER")
    join.add_argument(
        "--output_file", "--output-file", help="by default the folder's name with .consolidated behind it"
    )
    join.add_argument("--trust", action="store_true", help="read objects of any class, whose code then runs")
    return parser


def count_processes(accelerator: str | None, devices: str) -> int:
    """How many processes run on each machine.

    >>> count_processes("cpu", "2")
    2

    Raises:
        ValueError: for TPUs, which are not supported.
    """
    kind = gpu_kind() if accelerator in (None, "auto", "gpu") else accelerator
    if kind == "tpu":
        raise ValueError("`--accelerator tpu`: fulmen does not support it. Use 'cpu' or 'gpu'.")
    if not kind and accelerator == "gpu":
        raise ValueError("`--accelerator gpu`: torch finds no GPU on this machine. Use 'cpu' or 'auto'.")
    parsed = AcceleratorRegistry.get(kind or "cpu").parse_devices("1" if devices == "auto" else devices)
    return parsed if isinstance(parsed, int) else len(parsed or ())


def set_variables(options: argparse.Namespace) -> None:
    """Tells the `Fabric` of the script what was chosen, by environment variables."""
    chosen = {
        "LT_CLI_USED": 1,
        "LT_ACCELERATOR": options.accelerator,
        "LT_STRATEGY": options.strategy,
        "LT_DEVICES": options.devices,
        "LT_NUM_NODES": options.num_nodes,
        "LT_PRECISION": options.precision,
    }
    os.environ.update({name: str(value) for name, value in chosen.items() if value is not None})


def run_script(options: argparse.Namespace, script_arguments: Sequence[str] = ()) -> None:
    """Starts the script with torchrun, and returns when all processes have ended well."""
    from torch.distributed import run as torchrun

    count = 1 if options.strategy == "dp" else count_processes(options.accelerator, options.devices)
    set_variables(options)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    torchrun.main([
        f"--nproc_per_node={count}",
        f"--nnodes={options.num_nodes}",
        f"--node_rank={options.node_rank}",
        f"--master_addr={options.main_address}",
        f"--master_port={options.main_port}",
        options.script,
        *script_arguments,
    ])  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    words = list(sys.argv[1:] if given is None else given)
    own, dashes, others = split_at_dashes(words)
    parser = make_parser()
    options, unknown = parser.parse_known_args(own)
    if options.command == "consolidate":
        if unknown or dashes:
            parser.error(f"unknown arguments: {' '.join(unknown + others)}")
        print(consolidate(options.folder, options.output_file, False if options.trust else None))
        return
    if not os.path.isfile(options.script):
        parser.error(f"there is no script {options.script!r}")
    try:
        run_script(options, [*unknown, *others])
    except ValueError as error:
        parser.error(str(error))


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The words before ``--``, itself, and those behind it.

    >>> split_at_dashes(["run", "--", "--devices"])
    (['run'], ['--'], ['--devices'])
    """
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place : place + 1], words[place + 1 :]


if __name__ == "__main__":
    main()
