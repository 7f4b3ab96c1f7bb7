"""`ProcessLauncher`: a function in new processes of `multiprocessing`, whose results and errors come back."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import util
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fulmen.engine import collectives
from fulmen.engine.launch import (
    GRACE_SECONDS,
    PARENT,
    ResultOwner,
    RunningProcess,
    StoppedProcessKiller,
    describe_exit_code,
    divide_cpu_threads,
    end_with_parent,
    exit_now,
    set_environment,
    terminate_processes,
    wait_for_exits,
)
from fulmen.supervision.reports import install_excepthook, is_consequence, mark_reported, report_mark
from fulmen.supervision.stack_sampler import strip_library_frames
from fulmen.supervision.watchdog import exit_if_asleep, limit_seconds, wait_for_others
from fulmen.utilities.console import is_interactive
from fulmen.utilities.errors import INTERRUPTED, MisconfigurationException, with_cause
from fulmen.utilities.rank_zero import rank_zero_warn, set_rank
from fulmen.utilities.seed import seed_everything

if TYPE_CHECKING:
    from fulmen.engine.parallel import ParallelStrategy

FOLDER = "FULMEN_LAUNCH_FOLDER"  # the environment variable with the folder where processes leave files for each other
FINISHED = "finished-"  # a file of this name and the rank says that a process ended well
NO_MAIN_GUARD = "no-main-guard"  # a file of this name says that the script starts processes when it is imported

Work = tuple[Callable[..., Any], tuple[Any, ...], ResultOwner]  # a function, its arguments, and whose run it is


@dataclass
class ChildSetup:
    """What a new process has to know.

    Arguments:
        work: what it does, or the file with that, pickled.
        listener: the bound socket behind the main port.
    """

    local_rank: int
    num_processes: int
    variables: dict[str, str]
    folder: Path
    work: Work | Path
    listener: socket.socket | None
    parent: int
    forked: bool

    def close_inherited_listener(self) -> None:
        """Only the first process listens."""
        if self.listener is not None and self.local_rank != 0:
            self.listener.close()
            self.listener = None


class ProcessLauncher:
    """Runs a function in new processes, one for each device of this node, and carries its results back.

    Arguments:
        start_method: "spawn", "fork" or "forkserver", as of `multiprocessing`.

    Raises:
        ValueError: the platform has no such start method.
    """

    runs_elsewhere = True

    def __init__(self, strategy: ParallelStrategy, start_method: str) -> None:
        known = multiprocessing.get_all_start_methods()
        if start_method not in known:
            what = f"`start_method={start_method!r}` does not exist on this platform."
            raise ValueError(f"{what} Use 'popen', or one of {known}.")
        self.strategy = strategy
        self.start_method = start_method

    def end_if_asleep(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this process is ended if what is told of a failed run falls asleep."""
        return exit_if_asleep(limit_seconds(self.strategy.watchdog_timeout_s))

    @property
    def is_interactive_compatible(self) -> bool:
        return self.start_method == "fork"

    def launch(self, function: Callable[..., Any], *args: Any, trainer: ResultOwner) -> Any:
        """What `function` returned on rank 0; `trainer.unpack_results` has taken what `trainer.pack_results` gave there.

        Raises:
            RuntimeError: CUDA is in use already and processes are forked, the script has no main guard, something
                cannot be pickled, or a process died. What a process raised is raised here, as an instance of its own type
                and of `torch.multiprocessing.ProcessRaisedException`.
        """
        self.check_startable()
        folder = Path(tempfile.mkdtemp(prefix="fulmen-"))
        children: list[BaseProcess] = []
        forwarding = contextlib.ExitStack()
        try:
            self.start_children(children, folder, (function, args, trainer))
            # Until all have ended: those that hear of a signal report it here.
            signalled = forwarding.enter_context(_forward_signal(signal.SIGTERM, children))
            self.supervise_children(children, folder, signalled)
            answer = torch.load(folder / "result", weights_only=False)
        finally:
            terminate_processes([RunningProcess(c.pid, _poll_of(c)) for c in children if c.pid is not None])
            forwarding.close()
            shutil.rmtree(folder, ignore_errors=True)
        trainer.unpack_results(answer["packed"])
        return answer["result"]

    def check_startable(self) -> None:
        """Refuses where new processes would not work, and warns where they may hang."""
        if vars(multiprocessing.current_process()).get("_inheriting", False):
            if (folder := os.environ.get(FOLDER)) is not None:
                Path(folder, NO_MAIN_GUARD).touch()
            raise SystemExit(1)
        if self.start_method == "fork" and torch.cuda.is_initialized():
            what = "CUDA is in use in this process already, and forked processes cannot use it then."
            fix = "Do not touch the GPU before `fit` (`.cuda()`, `torch.cuda.current_device()`), or restart the kernel."
            raise RuntimeError(f"{what} {fix}")
        if self.start_method == "fork" and _other_threads_compute():
            what = (
                "Another thread of this process computes while processes are forked, which may hang on a lock it holds."
            )
            rank_zero_warn(f"{what} Let it finish first, or use `strategy='ddp'` or 'ddp_spawn'.")

    def start_children(self, children: list[BaseProcess], folder: Path, work: Work) -> None:
        """Starts one process per device, and adds each to the list as soon as it exists."""
        forked = self.start_method == "fork"
        given = work if forked else _pickle_to_file(work, folder / "work")
        variables = self.strategy.open_rendezvous()
        listener = self.strategy.take_listener()
        context = multiprocessing.get_context(self.start_method)
        with set_environment({**variables, FOLDER: str(folder)}):
            for rank in range(self.strategy.num_processes):
                setup = ChildSetup(
                    local_rank=rank,
                    num_processes=self.strategy.num_processes,
                    variables=variables,
                    folder=folder,
                    work=given,
                    listener=listener if rank == 0 or forked else None,
                    parent=os.getpid(),
                    forked=forked,
                )
                children.append(context.Process(target=_run_child, args=(setup,)))  # type: ignore[attr-defined]
                children[-1].start()
        if listener is not None:
            listener.close()

    def supervise_children(self, children: list[BaseProcess], folder: Path, signalled: list[int]) -> None:
        """Until all have ended. If one fails, the others are ended and its error is raised."""
        try:
            self._wait_for_end_or_failure(children, folder)
        except KeyboardInterrupt:
            _signal_all(children, signal.SIGTERM)  # a terminal has sent them the other already
            wait_for_exits([_poll_of(child) for child in children], 2 * GRACE_SECONDS)
            if is_interactive():
                raise
            raise SystemExit(INTERRUPTED) from None  # as where the run is in this process
        if all(child.exitcode == 0 for child in children) and not _failed_ranks(children, folder):
            return
        wait_for_exits([_poll_of(child) for child in children], 2 * GRACE_SECONDS if signalled else GRACE_SECONDS)
        raise _first_failure(children, folder)

    def _wait_for_end_or_failure(self, children: list[BaseProcess], folder: Path) -> None:
        killer = StoppedProcessKiller(limit_seconds(self.strategy.watchdog_timeout_s))
        while any(child.exitcode is None for child in children):
            wait([child.sentinel for child in children if child.exitcode is None], timeout=1)
            if _failed_ranks(children, folder):
                break
            running = {rank: child.pid for rank, child in enumerate(children) if child.exitcode is None}
            killer.check({rank: pid for rank, pid in running.items() if pid is not None})


def _other_threads_compute(num_looks: int = 5) -> bool:
    """Does another thread of this process run, or would it if a processor were free, each time one looks?"""
    own = threading.get_native_id()
    always_running: set[str] | None = None
    for _ in range(num_looks):
        running = set()
        for task in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "R" and int(task) != own:
                    running.add(task)
        always_running = running if always_running is None else always_running & running
        time.sleep(0.01)
    return bool(always_running)


# ---------------------------------------------------------------------- failures


class RemoteTraceback(Exception):
    """The traceback of another process, shown as the cause of what is raised here."""


def _failed_ranks(children: list[BaseProcess], folder: Path) -> list[int]:
    """The local ranks whose processes have ended, but not well: also those that exit with 0 from within the run."""
    ended = [rank for rank, child in enumerate(children) if child.exitcode is not None]
    return [rank for rank in ended if children[rank].exitcode or not (folder / f"{FINISHED}{rank}").exists()]


def _first_failure(children: list[BaseProcess], folder: Path) -> BaseException:
    """What the first process that failed said; or what is known about it."""
    if (folder / NO_MAIN_GUARD).exists():
        what = "The script starts processes when it is imported, and each process imports it: it has no main guard."
        return RuntimeError(f"{what} Put what it runs under `if __name__ == '__main__':`, or use `strategy='ddp'`.")
    paths = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    reports = {int(path.name[6:]): torch.load(path, weights_only=False) for path in paths}
    error: BaseException = RuntimeError("The processes ended without a result.")
    silent = [rank for rank in _failed_ranks(children, folder) if rank not in reports]
    if silent:
        code = children[silent[0]].exitcode or 0
        what = f"The process of local rank {silent[0]} {describe_exit_code(code)} without an exception."
        text = f"{what} The others were ended."
        error = add_base_class(
            RuntimeError(text), ProcessExitedException, text, silent[0], children[silent[0]].pid, code
        )
    elif reports:
        origin, report = min(reports.items(), key=lambda item: item[1]["echo"])
        error = report["error"] or RuntimeError(f"Rank {origin} raised {report['text']}")
        error = add_base_class(error, ProcessRaisedException, report["traceback"], origin, children[origin].pid)
        error = with_cause(error, RemoteTraceback(f"\n\nof rank {origin}:\n{report['traceback']}"))
    if any(report["reported"] for report in reports.values()):
        mark_reported(error, by_this_process=False)
        install_excepthook()
    return error


def add_base_class(error: BaseException, base: type[Exception], *arguments: Any) -> BaseException:
    """The same error, which is an instance of `base`, one of those that `torch.multiprocessing` raises, too.

    Arguments:
        arguments: of the constructor of `base`.

    Returns:
        The error itself if its type cannot have a second base: those of the interpreter that hold fields in C.
    """
    own = type(error)

    def reduce(_: Any) -> Any:
        return error.__reduce__()

    try:
        if not isinstance(error, Exception):
            return error
        both = type(own.__name__, (own, base), {"__module__": own.__module__, "__reduce__": reduce, "__doc__": None})
        made: BaseException = both.__new__(both, *error.args)
        base.__init__(made, *arguments)
        made.args = error.args
        vars(made).update(vars(error))
    except Exception:
        return error
    return made


# ---------------------------------------------------------------------- in a new process


def _run_child(setup: ChildSetup) -> None:
    """The main function of one process of a `ProcessLauncher`."""
    _prepare_child(setup)
    rank = setup.local_rank
    code = 0
    try:
        function, args, trainer = _unpickle_file(setup.work) if isinstance(setup.work, Path) else setup.work
        strategy: Any = trainer.strategy
        strategy.enter_child(setup.listener, partial(_report_error, setup.folder, rank))
        if "PL_GLOBAL_SEED" in os.environ:
            seed_everything(workers=os.environ.get("PL_SEED_WORKERS") == "1", verbose=False)
        result = function(*args)
        if rank == 0:
            torch.save({"packed": trainer.pack_results(), "result": result}, setup.folder / "result")
        strategy.stop_watchdog()
        if (failed := wait_for_others()) is not None:
            raise failed
        collectives.destroy_group()
        (setup.folder / f"{FINISHED}{rank}").touch()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        trace = strip_library_frames(traceback.format_exc())
        _report_error(setup.folder, rank, error, trace, is_consequence(error))
    # Of semaphores, such as those of progress bars: the interpreter would warn of what is left.
    with contextlib.suppress(Exception):
        util._run_finalizers(0)  # type: ignore[attr-defined]
    # Threads of a broken process group would keep the process.
    exit_now(code)


def _prepare_child(setup: ChildSetup) -> None:
    """Environment, signals and threads of a new process."""
    os.environ.update(setup.variables, LOCAL_RANK=str(setup.local_rank))
    os.environ.pop(FOLDER, None)
    os.environ[PARENT] = str(setup.parent)
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_rank(setup.local_rank)
    setup.close_inherited_listener()
    if setup.forked:
        # What is garbage here has its threads in the other process, and hangs or crashes this one when it is collected.
        gc.freeze()
        # The pool of OpenMP threads does not survive a fork, and whoever uses it afterwards hangs.
        torch.set_num_threads(1)
    else:
        divide_cpu_threads(setup.num_processes)


def _report_error(folder: Path, rank: int, error: BaseException, trace: str, echo: bool) -> None:
    """Writes for the launcher why a process ends; an echo if that is what another did."""
    report = {"error": error, "text": f"{type(error).__name__}: {error}", "traceback": trace, "echo": echo}
    report["reported"] = report_mark(error) is not None
    with_cause(error.with_traceback(None), None).__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        report["error"] = None
    torch.save(report, folder / f"writing-{rank}")
    os.replace(folder / f"writing-{rank}", folder / f"error-{rank}")


# ---------------------------------------------------------------------- pickling


def _pickle_to_file(work: Work, path: Path) -> Path:
    """For processes that inherit nothing. Plain pickling: each gets tensors of its own.

    Raises:
        MisconfigurationException: names what cannot be pickled.
    """
    try:
        with open(path, "wb") as file:
            pickle.dump(work, file)
    except Exception as error:
        function, args, trainer = work
        parts = {type(trainer).__name__: trainer, **{f"argument {type(arg).__name__}": arg for arg in args}}
        name = next((found for name, part in parts.items() if (found := find_unpicklable(part, name))), str(function))
        what = f"`{name}` cannot be pickled, which starting new processes needs: {type(error).__name__}: {error}."
        fix = "Make it a function or class of a module, or use `strategy='ddp'` or 'ddp_fork'."
        raise MisconfigurationException(f"{what} {fix}") from error
    return path


def find_unpicklable(value: object, name: str, depth: int = 8) -> str | None:
    """Where in an object the innermost part is that cannot be pickled; None if all can.

    >>> find_unpicklable({"a": [1, lambda: 2]}, "config")
    "config['a'][1]"
    """
    try:
        pickle.dumps(value)
        return None
    except Exception:
        pass
    children: list[tuple[str, object]]
    if isinstance(value, dict):
        children = [(f"{name}[{key!r}]", child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(f"{name}[{index}]", child) for index, child in enumerate(value)]
    else:
        state: Any = {}
        if isinstance(value, torch.nn.Module):
            state = value.__getstate__()
        elif hasattr(value, "__dict__"):
            state = vars(value)
        children = [(f"{name}.{key}", child) for key, child in (state or {}).items()]
    found = (find_unpicklable(child, where, depth - 1) for where, child in children if depth)
    return next((where for where in found if where), name)


def _unpickle_file(path: Path) -> Work:
    try:
        with open(path, "rb") as file:
            work: Work = pickle.load(file)
            return work
    except AttributeError as error:
        what = f"A new process does not find what was defined in a notebook or interpreter: {error}."
        raise RuntimeError(f"{what} Move it into a file that is imported, or use 'ddp_notebook'.") from error


# ---------------------------------------------------------------------- signals


@contextlib.contextmanager
def _forward_signal(number: int, children: list[BaseProcess]) -> Iterator[list[int]]:
    """Inside, the signal goes to the children, and into the list that is given; only the main thread can do that."""
    signalled: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signalled
        return

    def handler(number: int, frame: FrameType | None) -> None:
        signalled.append(number)
        _signal_all(children, number)

    before = signal.signal(number, handler)
    try:
        yield signalled
    finally:
        signal.signal(number, before)


def _signal_all(children: list[BaseProcess], number: int) -> None:
    for child in children:
        if child.exitcode is None and child.pid is not None:
            os.kill(child.pid, number)


def _poll_of(child: BaseProcess) -> Callable[[], int | None]:
    return lambda: child.exitcode
