"""Files of older versions, brought up to date on the disk: ``python -m fulmen upgrade PATH``."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fulmen.checkpoint.lightning_format import API_VERSION, VERSION_KEY, migrate_checkpoint
from fulmen.checkpoint.load import keep_available_device
from fulmen.storage.checkpoint_io import TorchCheckpointIO


def upgrade(path: str | os.PathLike[str], map_to_cpu: bool = False, weights_only: bool | None = None) -> str | None:
    """Rewrites a file in today's layout and returns the version it was of; None if there is nothing to do.

    The file as it was is kept beside it, with ``.bak`` behind its name.

    Arguments:
        weights_only: False also reads files with pickled classes, whose code runs: only for files you trust.
    """
    io = TorchCheckpointIO()
    location = "cpu" if map_to_cpu else keep_available_device
    checkpoint = io.load_checkpoint(path, location, weights_only)
    version = checkpoint.get(VERSION_KEY) if isinstance(checkpoint, dict) else None
    if version == API_VERSION:
        return None
    checkpoint = migrate_checkpoint(checkpoint, path)
    shutil.copy2(path, f"{os.fspath(path)}.bak")
    io.save_checkpoint(checkpoint, path)
    return version


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="fulmen upgrade", description="Brings checkpoints of older versions up to date, keeping a .bak."
    )
    parser.add_argument("path", type=Path, help="a file, or a folder whose files are all looked at")
    parser.add_argument("--extension", "-e", default=".ckpt", help="what names of files in a folder end with")
    parser.add_argument("--map-to-cpu", "-m", action="store_true", help="tensors come to the CPU")
    parser.add_argument("--trust", action="store_true", help="read pickled classes, too, whose code runs")
    options = parser.parse_args(arguments)
    files = [options.path]
    if options.path.is_dir():
        files = sorted(file for file in options.path.rglob(f"*{options.extension}") if file.is_file())
    if not files:
        parser.error(f"{options.path} has no files that end with {options.extension}. Pass `--extension`.")
    failed = 0
    for file in files:
        try:
            version = upgrade(file, options.map_to_cpu, False if options.trust else None)
            print(f"{file}: {'up to date' if version is None else f'was of version {version}'}")
        except Exception as error:  # the next file may be fine
            failed += 1
            print(f"{file}: left as it is. {error}")
    if failed:
        parser.exit(1, f"{failed} of {len(files)} files could not be upgraded.\n")


if __name__ == "__main__":
    main()
