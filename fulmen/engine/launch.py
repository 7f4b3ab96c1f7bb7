"""How the processes of a run come to life, and how all of them end: the script again, or a function in new processes."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import util
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fulmen.engine import collectives
from fulmen.engine.cluster import LightningEnvironment
from fulmen.supervision.processes import process_state
from fulmen.supervision.reports import install_excepthook, is_consequence, mark_reported, report_mark, write_stderr
from fulmen.supervision.stack_sampler import strip_library_frames
from fulmen.supervision.watchdog import limit_seconds, on_parent_exit, wait_for_others
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from fulmen.utilities.seed import seed_everything

GRACE_SECONDS = 5.0  # between asking a process to end and ending it
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C, by convention
# Set for the processes that are started here: whose they are, and where one says that it has no main guard.
PARENT, FOLDER = "FULMEN_PARENT", "FULMEN_LAUNCH_FOLDER"
FINISHED = "finished-"  # a file of this name and the rank says that a process ended well


class ScriptLauncher:
    """Runs the command line of this process again, once for each further device of this node.

    This process is the first of the node. The others are ended with it; if one of them fails, so does this one.
    """

    is_interactive_compatible = False

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.children: list[subprocess.Popen] = []
        self.started = False
        self.failed = False  # one of the others did, while this process was well
        self.over = False  # this process raised
        self.running = False
        self.signalled = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "children": []}

    def launch(self, function: Callable[..., Any], *args: Any, owner: Any = None) -> Any:
        """What `function` returns in this process; `owner` is whose results would have to be carried elsewhere."""
        if not self.started:
            self.start()
        elif any(child.poll() is not None for child in self.children):
            what = "The processes that were started for the other devices have ended, this one cannot continue alone."
            raise RuntimeError(f"{what} Do not catch what ended them, and run the script again.")
        self.running = True
        try:
            return function(*args)
        except BaseException as error:
            self.over = True
            # What is raised here may come from the connection to one that died a moment ago.
            wait_for([lambda: any(child.poll() for child in self.children) or None], 0.5)
            if report_mark(error) is None:
                self.name_failed()
                self.end()
            told = isinstance(error, (SystemExit, KeyboardInterrupt))
            self.end(patience=1.0 if told else 2 * GRACE_SECONDS)
            raise
        finally:
            self.running = False

    def start(self) -> None:
        """Starts the others and watches them."""
        strategy, cluster = self.strategy, self.strategy.cluster_environment
        command, count = command_line(), strategy.num_processes
        places = meeting_point(strategy)
        divide_cpu_threads(count)
        for local_rank in range(1, count):
            place = {**places, "LOCAL_RANK": str(local_rank), PARENT: str(os.getpid())}
            self.children.append(subprocess.Popen(command, env={**os.environ, **place}))
        os.environ.update(places, LOCAL_RANK="0")
        self.started = True
        rank_zero_info(f"Started {count} processes for {cluster.world_size()} devices: {' '.join(command)[:200]}")
        if self.children:
            atexit.register(self.wait)
            threading.Thread(target=self.watch, daemon=True).start()
            self.forward()

    def watch(self) -> None:
        """One of them fails: the others are ended, and this process too if it cannot get out of a collective."""
        stopped = Stopped(self.strategy)
        while not any(child.poll() for child in self.children):
            ended = [child.returncode == 0 for child in self.children]
            if any(ended) and self.running and self.strategy.store is None:
                break  # with 0, and this process would wait for it to come
            if all(ended):
                return
            first = self.strategy.global_rank + 1
            stopped.look({r: child.pid for r, child in enumerate(self.children, first) if child.returncode is None})
            time.sleep(0.2)
        if self.over:
            return
        self.failed = True
        if self.strategy.watchdog is None:
            self.name_failed()
        else:  # it names whoever was first, and ends all
            self.end(patience=2 * GRACE_SECONDS)
        self.end()
        # The main thread usually gets an error from the broken connection, and closes what is open.
        time.sleep(GRACE_SECONDS)
        _exit(1)

    def name_failed(self) -> None:
        """Says which of the others failed, unless all were told to end."""
        for rank, child in enumerate(self.children, self.strategy.global_rank + 1):
            early = child.poll() == 0 and self.running and self.strategy.store is None
            if (child.poll() or early) and not self.signalled:
                print(f"Rank {rank} {how_it_ended(child.returncode)}: all others end too.", file=sys.stderr, flush=True)

    def describe_exit(self, rank: int) -> str:
        """How the process of another rank ended, if it did."""
        local_rank = rank - self.strategy.global_rank
        if not 0 < local_rank <= len(self.children):
            return ""
        child = self.children[local_rank - 1]
        wait_for([child.poll], 1.0)  # its connections end a moment before it does
        return "" if child.returncode is None else how_it_ended(child.returncode)

    def end(self, patience: float = 0.0) -> None:
        """Ends the others: asked first, then forced; those that were told why get some seconds to end by themselves."""
        wait_for([child.poll for child in self.children], patience)
        end_all([(child.pid, child.poll) for child in self.children])

    def wait(self) -> None:
        """At the end of the script: until the others are at theirs, unless something went wrong."""
        collectives.destroy_group()
        raised = getattr(sys, "last_value", None) is not None
        if self.failed or self.over or raised:
            self.end()
        codes = [child.wait() for child in self.children]
        if any(codes) and not self.over and not raised:
            _exit(next(code for code in codes if code) % 256)

    def tell_others(self) -> None:
        """They shall end, as this process was told to."""
        self.signalled = True
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def forward(self) -> None:
        """SIGTERM reaches all processes. What else it does is left to who handled it before, or to a handler put above."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)

        def handler(number: int, frame: Any) -> None:
            self.tell_others()
            if callable(before):
                before(number, frame)
            elif signal.getsignal(number) is handler:  # no run is there to end in its own way
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, handler)


class ProcessLauncher:
    """Runs a function in new processes, one for each device of this node, and carries its results back.

    Arguments:
        start_method: "spawn", "fork" or "forkserver", as of `multiprocessing`.
    """

    def __init__(self, strategy: Any, start_method: str) -> None:
        known = multiprocessing.get_all_start_methods()
        if start_method not in known:
            what = f"`start_method={start_method!r}` does not exist on this platform."
            raise ValueError(f"{what} Use 'popen', or one of {known}.")
        self.strategy, self.start_method = strategy, start_method

    @property
    def is_interactive_compatible(self) -> bool:
        return self.start_method == "fork"

    def launch(self, function: Callable[..., Any], *args: Any, owner: Any) -> Any:
        """What `function` returned on rank 0, after `owner.unpack_results` took what `owner.pack_results` gave there.

        Raises:
            RuntimeError: CUDA is in use already and processes are forked, the script has no main guard, something
                cannot be pickled, or a process died. What a process raised is raised here, as an instance of its own type
                and of `torch.multiprocessing.ProcessRaisedException`.
        """
        self.check()
        folder = Path(tempfile.mkdtemp(prefix="fulmen-"))
        context = multiprocessing.get_context(self.start_method)
        forked = self.start_method == "fork"
        work: Any = (function, args, owner) if forked else pickled((function, args, owner), folder / "work")
        places = meeting_point(self.strategy)
        listener, self.strategy.listener = self.strategy.listener, None
        children: list[Any] = []
        told = contextlib.ExitStack()
        try:
            with environment({**places, FOLDER: str(folder)}):
                for rank in range(self.strategy.num_processes):
                    own = listener if rank == 0 or forked else None
                    arguments = (rank, self.strategy.num_processes, places, folder, work, own, str(os.getpid()), forked)
                    children.append(context.Process(target=_child, args=arguments))  # type: ignore[attr-defined]
                    children[-1].start()
            if listener is not None:
                listener.close()
            # Until all have ended: those that hear of a signal tell it here.
            self.supervise(children, folder, told.enter_context(passing_on(signal.SIGTERM, children)))
            answer = torch.load(folder / "result", weights_only=False)
        finally:
            end_all([(child.pid, _poll(child)) for child in children if child.pid is not None])
            told.close()
            shutil.rmtree(folder, ignore_errors=True)
        owner.unpack_results(answer["packed"])
        return answer["result"]

    def check(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            if (folder := os.environ.get(FOLDER)) is not None:
                Path(folder, "no-main-guard").touch()
            raise SystemExit(1)
        if self.start_method == "fork" and torch.cuda.is_initialized():
            what = "CUDA is in use in this process already, and forked processes cannot use it then."
            fix = "Do not touch the GPU before `fit` (`.cuda()`, `torch.cuda.current_device()`), or restart the kernel."
            raise RuntimeError(f"{what} {fix}")
        if self.start_method == "fork" and others_compute():
            what = (
                "Another thread of this process computes while processes are forked, which may hang on a lock it holds."
            )
            rank_zero_warn(f"{what} Let it finish first, or use `strategy='ddp'` or 'ddp_spawn'.")

    def supervise(self, children: list[Any], folder: Path, signalled: list[int]) -> None:
        """Until all have ended. If one fails, the others are ended and its error is raised."""
        stopped = Stopped(self.strategy)
        try:
            while any(child.exitcode is None for child in children):
                wait([child.sentinel for child in children if child.exitcode is None], timeout=1)
                if _broken(children, folder):
                    break
                stopped.look({rank: child.pid for rank, child in enumerate(children) if child.exitcode is None})
        except KeyboardInterrupt:
            _signal(children, signal.SIGTERM)  # a terminal has sent them the other already
            wait_for([_poll(child) for child in children], 2 * GRACE_SECONDS)
            if is_interactive():
                raise
            raise SystemExit(INTERRUPTED) from None  # as where the run is in this process
        if all(child.exitcode == 0 for child in children) and not _broken(children, folder):
            return
        wait_for([_poll(child) for child in children], 2 * GRACE_SECONDS if signalled else GRACE_SECONDS)
        raise _failure(children, folder)


def others_compute(looks: int = 5) -> bool:
    """Does another thread of this process run, or would it if a processor were free, as often as one looks?"""
    own = threading.get_native_id()
    seen: set[str] | None = None
    for _ in range(looks):
        running = set()
        for task in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "R" and int(task) != own:
                    running.add(task)
        seen = running if seen is None else seen & running
        time.sleep(0.01)
    return bool(seen)


def _broken(children: list[Any], folder: Path) -> list[int]:
    """The ranks whose processes have ended, but not well: also those that exit with 0 from within the run."""
    ended = [rank for rank, child in enumerate(children) if child.exitcode is not None]
    return [rank for rank in ended if children[rank].exitcode or not (folder / f"{FINISHED}{rank}").exists()]


def _failure(children: list[Any], folder: Path) -> BaseException:
    """What the first process that failed said; or what is known about it."""
    if (folder / "no-main-guard").exists():
        what = "The script starts processes when it is imported, and each process imports it: it has no main guard."
        return RuntimeError(f"{what} Put what it runs under `if __name__ == '__main__':`, or use `strategy='ddp'`.")
    paths = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    reports = {path.name[6:]: torch.load(path, weights_only=False) for path in paths}
    error: BaseException = RuntimeError("The processes ended without a result.")
    silent = [rank for rank in _broken(children, folder) if str(rank) not in reports]
    if silent:
        child = children[silent[0]]
        what = f"The process of local rank {silent[0]} {how_it_ended(child.exitcode)} without an exception."
        text = f"{what} The others were ended."
        error = also(RuntimeError(text), ProcessExitedException, text, silent[0], child.pid, child.exitcode)
    elif reports:
        origin, told = min(reports.items(), key=lambda report: report[1]["echo"])
        error = told["error"] or RuntimeError(f"Rank {origin} raised {told['text']}")
        error = also(error, ProcessRaisedException, told["traceback"], int(origin), children[int(origin)].pid)
        error.__cause__ = RemoteTraceback(f"\n\nof rank {origin}:\n{told['traceback']}")
    if any(told["reported"] for told in reports.values()):
        mark_reported(error, by_this_process=False)
        install_excepthook()
    return error


def also(error: BaseException, kind: type[Exception], *arguments: Any) -> BaseException:
    """The same error, which is an instance of `kind`, one of those that `torch.multiprocessing` raises, too.

    Returns:
        The error itself if its type cannot have a second base: those of the interpreter that hold fields in C.
    """
    own = type(error)

    def reduce(_: Any) -> Any:
        return error.__reduce__()

    try:
        if not isinstance(error, Exception):
            return error
        both = type(own.__name__, (own, kind), {"__module__": own.__module__, "__reduce__": reduce, "__doc__": None})
        made: Any = both.__new__(both, *error.args)
        kind.__init__(made, *arguments)
        made.args = error.args
        made.__dict__.update(error.__dict__)
    except Exception:
        return error
    return made


def how_it_ended(code: int) -> str:
    """An exit code of `subprocess` or `multiprocessing` in words."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class RemoteTraceback(Exception):
    """The traceback of another process, shown as the cause of what is raised here."""


def _child(
    rank: int, count: int, places: dict[str, str], folder: Path, work: Any, listener: Any, parent: str, forked: bool
) -> None:
    """One process of a `ProcessLauncher`."""
    os.environ.update(places, LOCAL_RANK=str(rank))
    os.environ.pop(FOLDER, None)
    os.environ[PARENT] = parent
    adopted()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    if listener is not None and rank != 0:  # inherited
        listener = listener.close()
    if forked:
        # What is garbage here has its threads in the other process, and hangs or crashes this one when it is collected.
        gc.freeze()
        # The pool of OpenMP threads does not survive a fork, and whoever uses it afterwards hangs.
        torch.set_num_threads(1)
    else:
        divide_cpu_threads(count)
    code = 0
    try:
        if not forked:
            work = _unpickled(work)
        function, args, owner = work
        strategy = owner.strategy
        strategy.launcher, strategy.listener = None, listener
        strategy.set_world_ranks()
        strategy.report_to_parent = partial(_tell, folder, rank)
        if "PL_GLOBAL_SEED" in os.environ:
            seed_everything(workers=os.environ.get("PL_SEED_WORKERS") == "1", verbose=False)
        result = function(*args)
        if rank == 0:
            torch.save({"packed": owner.pack_results(), "result": result}, folder / "result")
        strategy.stop_watchdog()
        if (failed := wait_for_others()) is not None:
            raise failed
        collectives.destroy_group()
        (folder / f"{FINISHED}{rank}").touch()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        _tell(folder, rank, error, strip_library_frames(traceback.format_exc()), is_consequence(error))
    # Of semaphores, such as those of progress bars: the interpreter would warn of what is left.
    with contextlib.suppress(Exception):
        util._run_finalizers(0)  # type: ignore[attr-defined]
    # Threads of a broken process group would keep the process.
    _exit(code)


def _tell(folder: Path, rank: int, error: BaseException, trace: str, echo: bool) -> None:
    """Why a process ends; an echo if that is what another did."""
    told = {"error": error, "text": f"{type(error).__name__}: {error}", "traceback": trace, "echo": echo}
    told["reported"] = report_mark(error) is not None
    error.__traceback__ = error.__context__ = error.__cause__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told["error"] = None
    torch.save(told, folder / f"writing-{rank}")
    os.replace(folder / f"writing-{rank}", folder / f"error-{rank}")


# ---------------------------------------------------------------------- pickling


def pickled(work: Any, path: Path) -> Path:
    """Writes it to a file, for processes that inherit nothing. Plain pickling: each gets tensors of its own.

    Raises:
        MisconfigurationException: names what cannot be pickled.
    """
    try:
        with open(path, "wb") as file:
            pickle.dump(work, file)
    except Exception as error:
        function, args, owner = work
        parts = {type(owner).__name__: owner, **{f"argument {type(arg).__name__}": arg for arg in args}}
        name = next((found for name, part in parts.items() if (found := unpicklable(part, name))), str(function))
        what = f"`{name}` cannot be pickled, which starting new processes needs: {type(error).__name__}: {error}."
        fix = "Make it a function or class of a module, or use `strategy='ddp'` or 'ddp_fork'."
        raise MisconfigurationException(f"{what} {fix}") from error
    return path


def unpicklable(value: Any, name: str, depth: int = 8) -> str | None:
    """Where in an object the innermost part sits that cannot be pickled."""
    try:
        pickle.dumps(value)
        return None
    except Exception:
        pass
    if isinstance(value, dict):
        children = [(f"{name}[{key!r}]", child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(f"{name}[{index}]", child) for index, child in enumerate(value)]
    else:
        state = value.__getstate__() if isinstance(value, torch.nn.Module) else getattr(value, "__dict__", {})
        children = [(f"{name}.{key}", child) for key, child in (state or {}).items()]
    found = (unpicklable(child, where, depth - 1) for where, child in children if depth)
    return next((where for where in found if where), name)


def picklable_attributes(obj: Any, beside: tuple[Any, ...]) -> dict[str, Any]:
    """The attributes of an object that can be pickled and lead to none of the objects `beside` it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> None:
            if any(part is other for other in beside):
                raise pickle.PicklingError("stays where it is")

    found = {}
    for name, value in vars(obj).items():
        with contextlib.suppress(Exception):
            Pickler(io.BytesIO()).dump(value)
            found[name] = value
    return found


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except AttributeError as error:
        what = f"A new process does not find what was defined in a notebook or interpreter: {error}."
        raise RuntimeError(f"{what} Move it into a file that is imported, or use 'ddp_notebook'.") from error


# ---------------------------------------------------------------------- places and commands


def meeting_point(strategy: Any) -> dict[str, str]:
    """The variables by which started processes find each other.

    Unless the user or an environment of theirs chose it, the port is one that this process holds until rank 0 listens there.
    """
    cluster = strategy.cluster_environment
    free = getattr(type(cluster), "main_port", None) is LightningEnvironment.main_port
    if cluster.node_rank() == 0 and free and "MASTER_PORT" not in os.environ:
        # Processes that are earlier than rank 0 wait in its queue.
        strategy.listener = socket.create_server(("" if "MASTER_ADDR" in os.environ else cluster.main_address, 0))
        port = strategy.listener.getsockname()[1]
    else:
        port = cluster.main_port
    return {
        "MASTER_ADDR": cluster.main_address,
        "MASTER_PORT": str(port),
        "NODE_RANK": str(cluster.node_rank()),
        "WORLD_SIZE": str(strategy.world_size),
    }


def command_line() -> list[str]:
    """How this process was started, with the script's path made absolute: the folder may have changed since."""
    command = [sys.executable, *sys.orig_argv[1:]]
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if (script is None and "-c" not in command) or hasattr(sys, "ps1"):
        what = "`strategy='ddp'` runs the script again for each device, and there is no script."
        raise MisconfigurationException(f"{what} In a notebook or interpreter, use `strategy='ddp_notebook'`.")
    if script is not None and getattr(main, "__spec__", None) is None:
        name = os.path.basename(script)
        at = next((i for i, word in enumerate(command) if i and os.path.basename(word) == name), None)
        if at is not None:
            command[at] = os.path.abspath(script)
    return command


def is_interactive() -> bool:
    """Does a person type into this interpreter, who wants to go on after an interrupt?"""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def divide_cpu_threads(count: int) -> None:
    """Each process of this node gets its part of the processors, unless the user said how many threads to use."""
    if "OMP_NUM_THREADS" not in os.environ and count > 1:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, available // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Inside, these variables are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def passing_on(number: int, children: list[Any]) -> Iterator[list[int]]:
    """Inside, the signal goes to the children, and into the list that is given; only the main thread can do that."""
    signalled: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signalled
        return

    def handler(number: int, frame: Any) -> None:
        signalled.append(number)
        _signal(children, number)

    before = signal.signal(number, handler)
    try:
        yield signalled
    finally:
        signal.signal(number, before)


# ---------------------------------------------------------------------- ending


def adopted() -> None:
    """In a process that was started here: it ends with the one that started it."""
    if (told := os.environ.pop(PARENT, None)) is None:
        return
    parent = int(told)
    os.environ[_KNOWN_PARENT] = str(parent)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


_KNOWN_PARENT = "FULMEN_KNOWN_PARENT"


def tell_launcher() -> None:
    """SIGTERM came to this process: whoever started it passes it on to all."""
    parent = os.environ.get(_KNOWN_PARENT)
    if parent is not None and os.getppid() == int(parent):
        os.kill(int(parent), signal.SIGTERM)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    on_parent_exit()  # says so, and closes what is open
    os._exit(1)


class Stopped:
    """Ends processes that are stopped for longer than a run may stand still: nobody else may be there to see it."""

    def __init__(self, strategy: Any) -> None:
        self.limit = limit_seconds(strategy.watchdog_timeout_s)
        self.since: dict[int, float] = {}
        self.looked = 0.0

    def look(self, processes: dict[int, int]) -> None:
        """At the processes that run, by rank."""
        now = time.monotonic()
        if now - self.looked > 5:  # this one was stopped too, as by Ctrl-Z
            self.since.clear()
        self.looked = now
        for rank, pid in processes.items():
            if process_state(pid) != "T":
                self.since.pop(rank, None)
            elif now - self.since.setdefault(rank, now) > self.limit > 0:
                write_stderr(
                    f"Rank {rank} has done nothing for {self.limit:g} s: its process {pid} is stopped, and is ended now."
                )
                os.kill(pid, signal.SIGKILL)


def end_all(processes: list[tuple[int, Callable[[], Any]]]) -> None:
    """Asks each process, given with what tells its exit code, to end; those that do not are forced after a moment."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        running = [(pid, poll) for pid, poll in processes if poll() is None]
        if not running:
            return
        for pid, _ in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        wait_for([poll for _, poll in running], patience)


def wait_for(polls: list[Callable[[], Any]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(poll() is None for poll in polls) and time.monotonic() < deadline:
        time.sleep(0.05)


def _poll(child: Any) -> Callable[[], Any]:
    return lambda: child.exitcode


def _signal(children: list[Any], number: int) -> None:
    for child in children:
        if child.exitcode is None:
            os.kill(child.pid, number)


def _exit(code: int) -> None:
    """Ends this process now, with what was written flushed."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
