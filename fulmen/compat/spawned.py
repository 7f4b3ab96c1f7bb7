"""Processes that `multiprocessing` starts anew have the names as well: this is their main module until they know the program's."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from fulmen.compat.foreign import install

MAIN = "FULMEN_SPAWN_MAIN"  # the environment variable that names the main module of the program


def serve_new_processes() -> None:
    """From now on, `multiprocessing` has new processes run this module, which goes on to the program's own."""
    spawn: Any = sys.modules["multiprocessing.spawn"]
    prepare = spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = prepare(name)
        kind = next((key for key in ("init_main_from_path", "init_main_from_name") if key in data), "")
        os.environ[MAIN] = f"{kind}:{data.pop(kind, '')}"
        return {**data, "init_main_from_name": __name__}

    spawn.get_preparation_data = get_preparation_data


def run_main_module() -> dict[str, Any]:
    """The names of the program's main module, as a new process needs them; none if it has no such module."""
    install()
    kind, _, program = os.environ.get(MAIN, "").partition(":")
    if kind == "init_main_from_path":
        return runpy.run_path(program, run_name="__mp_main__")
    if kind == "init_main_from_name":
        return runpy.run_module(program, run_name="__mp_main__", alter_sys=True)
    return {}


if __name__ == "__mp_main__":
    globals().update(run_main_module())
