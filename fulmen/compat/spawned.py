"""What a process that `multiprocessing` starts anew runs before its work: the names first, then the program's main module."""

from __future__ import annotations

import os
import runpy

from fulmen.compat.foreign import MAIN, install

if __name__ == "__mp_main__":
    install()
    kind, _, program = os.environ.get(MAIN, "").partition(":")
    if kind == "init_main_from_path":
        globals().update(runpy.run_path(program, run_name="__mp_main__"))
    elif kind == "init_main_from_name":
        globals().update(runpy.run_module(program, run_name="__mp_main__", alter_sys=True))
