"""``python -m fulmen run script.py …``: run a script that imports `lightning`, on fulmen, unchanged."""

from __future__ import annotations

import os
import runpy
import sys

from fulmen.compat.finder import SCRIPT_MODULE, SCRIPT_VARIABLE

USAGE = """\
usage: python -m fulmen run SCRIPT [ARGUMENT ...]

Runs SCRIPT with `lightning`, `pytorch_lightning` and `lightning_fabric` answered by fulmen.
"""


def main(arguments: list[str]) -> int:
    """Run the command line; the script ends the process as it would without us."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(arguments) < 2 or arguments[0] != "run":
        print(USAGE, file=sys.stderr)
        return 2
    script = arguments[1]
    if not os.path.isfile(script):
        print(f"python -m fulmen: there is no script `{script}`.", file=sys.stderr)
        return 2
    os.environ[SCRIPT_VARIABLE] = os.path.abspath(script)
    sys.argv = arguments[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_module(SCRIPT_MODULE, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
