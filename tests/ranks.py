"""Runs a function on several real processes: the ranks of one gloo group on this machine."""

from __future__ import annotations

import datetime
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

STARTUP_SECONDS = 120  # importing torch, on a busy machine


@dataclass
class Task:
    """What each rank is told."""

    num_ranks: int
    timeout_seconds: float
    folder: Path  # where ranks and parent leave files for each other
    function: tuple[str, str, str]  # file, module, name
    directory: str = field(default_factory=os.getcwd)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 300) -> list[Any]:
    """What `function(*arguments)` returns on each rank, by rank.

    The function stands at the top level of a file. `torch.distributed` is initialised when it runs, and the environment
    and directory are the caller's, with RANK, LOCAL_RANK and WORLD_SIZE. Arguments and results travel through
    `torch.save`. A rank that raises, dies or takes longer than the timeout ends all: RuntimeError with the traceback of
    each rank that had one, the first to fail first.
    """
    import torch

    # Where there are forks, a server that has imported torch makes the ranks: each starts at once, and clean.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as name:
        origin = (inspect.getfile(function), function.__module__, function.__qualname__)
        task = Task(num_ranks, timeout_seconds, Path(name), origin)
        torch.save(arguments, task.folder / "arguments")
        ranks = [context.Process(target=_rank, args=(rank, task)) for rank in range(num_ranks)]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, time.monotonic() + timeout_seconds + STARTUP_SECONDS)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if codes != [0] * num_ranks:
            raise RuntimeError(_reports(task.folder, codes))
        return [torch.load(task.folder / f"result-{rank}", weights_only=False) for rank in range(num_ranks)]


def _wait(ranks: list[Any], deadline: float) -> None:
    """Until all have ended, or a moment longer than the first that failed."""
    while running := [process.sentinel for process in ranks if process.exitcode is None]:
        remaining = deadline - time.monotonic()
        if remaining < 0 or not wait(running, timeout=remaining):
            return
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 1)


def _reports(folder: Path, codes: list[int | None]) -> str:
    written = [path for path in folder.glob("error-*") if path.stat().st_size]
    written.sort(key=lambda path: path.stat().st_mtime_ns)
    texts = [f"rank {path.name.removeprefix('error-')}:\n{path.read_text()}" for path in written]
    return "\n".join([f"The ranks ended with exit codes {codes} (None: still running, ended here).", *texts])


def _rank(rank: int, task: Task) -> None:
    os.environ.clear()
    os.environ.update(task.environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task.num_ranks))
    os.chdir(task.directory)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    import torch.distributed as dist

    with open(task.folder / f"error-{rank}", "w") as errors:
        # Says where it hangs, and ends the process.
        faulthandler.dump_traceback_later(task.timeout_seconds, exit=True, file=errors)
        try:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            function = _load(*task.function)
            arguments = torch.load(task.folder / "arguments", weights_only=False)
            store = f"file://{task.folder / 'rendezvous'}"
            patience = datetime.timedelta(seconds=task.timeout_seconds)
            dist.init_process_group("gloo", store, rank=rank, world_size=task.num_ranks, timeout=patience)
            torch.save(function(*arguments), task.folder / f"result-{rank}")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            errors.write(traceback.format_exc())
            errors.flush()
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _load(file: str, module_name: str, qualified_name: str) -> Callable[..., Any]:
    """The function, from its file: test modules are no packages that could be imported."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return getattr(sys.modules[module_name], qualified_name)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
