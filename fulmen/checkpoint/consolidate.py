"""One file from a sharded checkpoint: ``python -m fulmen consolidate FOLDER [--output_file FILE]``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.sharded import META, is_dcp_folder, is_sharded, read_dcp_folder


def consolidate(
    folder: str | os.PathLike[str], output_file: str | os.PathLike[str] | None = None, weights_only: bool | None = None
) -> str:
    """Writes a checkpoint that is a folder as one file, which every strategy loads. Returns its path.

    A folder that `torch.distributed.checkpoint` wrote without a trainer becomes a file for `torch.load`.

    Arguments:
        output_file: by default the folder's name with ``.consolidated`` behind it.
        weights_only: False also reads objects whose code runs then; only for folders you trust.

    Raises:
        FileNotFoundError: the folder is not such a checkpoint.
        FileExistsError: the file is there already.
    """
    source = os.fspath(folder).rstrip("/\\")
    if not is_sharded(source) and not is_dcp_folder(source):
        what = f"{source!r} is not a sharded checkpoint: it has no `{META}`."
        raise FileNotFoundError(f"{what} Pass the folder that a run with `state_dict_type='sharded'` wrote.")
    target = f"{source}.consolidated" if output_file is None else os.fspath(output_file)
    if os.path.exists(target):
        raise FileExistsError(f"{target!r} exists already. Remove it, or give another `--output_file`.")
    io = TorchCheckpointIO()
    read = read_dcp_folder if is_dcp_folder(source) else io.load_checkpoint
    io.save_checkpoint(read(source, weights_only=weights_only), target)
    return target


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="fulmen consolidate", description="Turns a sharded checkpoint, which is a folder, into one file."
    )
    parser.add_argument("folder")
    parser.add_argument("--output_file", help="by default, the folder's name with .consolidated behind it")
    parser.add_argument("--trust", action="store_true", help="read objects of any class, whose code then runs")
    arguments = parser.parse_args(given)
    try:
        print(consolidate(arguments.folder, arguments.output_file, False if arguments.trust else None))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
