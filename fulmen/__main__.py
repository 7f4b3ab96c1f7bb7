"""``python -m fulmen COMMAND``: what is done to files of checkpoints."""

from __future__ import annotations

import sys

from fulmen.checkpoint import consolidate, upgrade
from fulmen.utilities.errors import suggest_name

COMMANDS = {"upgrade": upgrade.main, "consolidate": consolidate.main}
USAGE = """usage: python -m fulmen COMMAND ...

  upgrade PATH        bring checkpoints of older versions up to date
  consolidate FOLDER  make one file from a sharded checkpoint"""


def main(arguments: list[str]) -> None:
    """Runs a command."""
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        COMMANDS[name](arguments[1:])
    elif name in ("-h", "--help"):
        print(USAGE)
    else:
        print(f"{USAGE}\n\nThere is no command {name!r}.{suggest_name(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
