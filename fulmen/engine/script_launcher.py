"""`ScriptLauncher`: the processes of a node as runs of the same command line."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from fulmen.engine import collectives
from fulmen.engine.launch import (
    GRACE_SECONDS,
    PARENT,
    ResultOwner,
    RunningProcess,
    StoppedProcessKiller,
    describe_exit_code,
    divide_cpu_threads,
    exit_now,
    terminate_processes,
    wait_for_exits,
)
from fulmen.supervision.reports import report_mark
from fulmen.supervision.watchdog import limit_seconds
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from fulmen.engine.parallel import ParallelStrategy


class ScriptLauncher:
    """Runs the command line of this process again, once for each further device of this node.

    This process is the first of the node. The others are ended with it; if one of them fails, so does this one.
    """

    is_interactive_compatible = False
    runs_elsewhere = False

    def __init__(self, strategy: ParallelStrategy) -> None:
        self.strategy = strategy
        self.children: list[subprocess.Popen[bytes]] = []
        self.started = False
        self.child_failed = False  # one of the others did, while this process was well
        self.raised = False  # this process did
        self.running = False
        self.signalled = False  # were the others told to end, as this process was?

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "children": []}

    def end_if_asleep(self) -> contextlib.AbstractContextManager[None]:
        """This process is one of those of the run, whose watchdog sees to that."""
        return contextlib.nullcontext()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: ResultOwner | None = None) -> Any:
        """What `function` returns in this process; nothing has to travel to the `trainer`.

        Raises:
            RuntimeError: the other processes of an earlier call have ended.
            MisconfigurationException: there is no script to run.
        """
        if not self.started:
            self.start_children()
        elif any(child.poll() is not None for child in self.children):
            what = "The processes that were started for the other devices have ended, this one cannot continue alone."
            raise RuntimeError(f"{what} Do not catch what ended them, and run the script again.")
        self.running = True
        try:
            return function(*args)
        except BaseException as error:
            self.raised = True
            # What is raised here may come from the connection to one that died a moment ago.
            wait_for_exits([lambda: any(child.poll() for child in self.children) or None], 0.5)
            if report_mark(error) is None:
                self.report_failed_children()
                self.end_children()
            asked_to_end = isinstance(error, (SystemExit, KeyboardInterrupt))
            self.end_children(patience_s=1.0 if asked_to_end else 2 * GRACE_SECONDS)
            raise
        finally:
            self.running = False

    def start_children(self) -> None:
        """Starts the others and watches them."""
        strategy = self.strategy
        command = command_line()
        count = strategy.num_processes
        rendezvous = strategy.open_rendezvous()
        divide_cpu_threads(count)
        for local_rank in range(1, count):
            variables = {**rendezvous, "LOCAL_RANK": str(local_rank), PARENT: str(os.getpid())}
            self.children.append(subprocess.Popen(command, env={**os.environ, **variables}))
        os.environ.update(rendezvous, LOCAL_RANK="0")
        self.started = True
        shown = " ".join(command)[:200]
        rank_zero_info(f"Started {count} processes for {strategy.world_size} devices: {shown}")
        if self.children:
            atexit.register(self.wait_for_children)
            threading.Thread(target=self.watch_children, daemon=True).start()
            self.forward_sigterm()

    def watch_children(self) -> None:
        """One of them fails: the others are ended, and this process too if it cannot get out of a collective."""
        killer = StoppedProcessKiller(limit_seconds(self.strategy.watchdog_timeout_s))
        while not any(child.poll() for child in self.children):
            ended = [child.returncode == 0 for child in self.children]
            if any(ended) and self._waits_for_children:
                break  # with 0, and this process would wait for it to come
            if all(ended):
                return
            first = self.strategy.global_rank + 1
            killer.check({rank: c.pid for rank, c in enumerate(self.children, first) if c.returncode is None})
            time.sleep(0.2)
        if self.raised:
            return
        self.child_failed = True
        if self.strategy.watchdog is None:
            self.report_failed_children()
        else:  # it names whoever was first, and ends all
            self.end_children(patience_s=2 * GRACE_SECONDS)
        self.end_children()
        # The main thread usually gets an error from the broken connection, and closes what is open.
        time.sleep(GRACE_SECONDS)
        exit_now(1)

    @property
    def _waits_for_children(self) -> bool:
        """Have the processes of this run not met yet?"""
        return self.running and self.strategy.store is None

    def report_failed_children(self) -> None:
        """Says which of the others failed, unless all were told to end."""
        for rank, child in enumerate(self.children, self.strategy.global_rank + 1):
            code = child.poll()
            failed = code or (code == 0 and self._waits_for_children)
            if code is not None and failed and not self.signalled:
                print(f"Rank {rank} {describe_exit_code(code)}: all others end too.", file=sys.stderr, flush=True)

    def describe_exit(self, rank: int) -> str:
        """How the process of another rank ended, if it did."""
        local_rank = rank - self.strategy.global_rank
        if not 0 < local_rank <= len(self.children):
            return ""
        child = self.children[local_rank - 1]
        wait_for_exits([child.poll], 1.0)  # its connections end a moment before it does
        return "" if child.returncode is None else describe_exit_code(child.returncode)

    def end_children(self, patience_s: float = 0.0) -> None:
        """Ends the others: asked first, then killed; those that know why get some seconds to end by themselves."""
        wait_for_exits([child.poll for child in self.children], patience_s)
        terminate_processes([RunningProcess(child.pid, child.poll) for child in self.children])

    def wait_for_children(self) -> None:
        """At the end of the script: until the others are at theirs, unless something went wrong."""
        collectives.destroy_group()
        failed_here = self.raised or vars(sys).get("last_value") is not None
        if self.child_failed or failed_here:
            self.end_children()
        codes = [child.wait() for child in self.children]
        if any(codes) and not failed_here:
            exit_now(next(code for code in codes if code) % 256)

    def signal_children(self) -> None:
        """Tells the others to end, as this process was told to."""
        self.signalled = True
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def forward_sigterm(self) -> None:
        """SIGTERM reaches all processes. What else it does is left to who handled it before, or to a handler put above."""
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)

        def handler(number: int, frame: FrameType | None) -> None:
            self.signal_children()
            if callable(before):
                before(number, frame)
            elif signal.getsignal(number) is handler:  # no run is there to end in its own way
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, handler)


def command_line() -> list[str]:
    """How this process was started, with the script's path made absolute: the folder may have changed since.

    Raises:
        MisconfigurationException: it was not started by a script, as in a notebook.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    main = vars(sys.modules["__main__"])
    script = main.get("__file__")
    if (script is None and "-c" not in command) or hasattr(sys, "ps1"):
        what = "`strategy='ddp'` runs the script again for each device, and there is no script."
        raise MisconfigurationException(f"{what} In a notebook or interpreter, use `strategy='ddp_notebook'`.")
    if script is not None and main.get("__spec__") is None:
        name = os.path.basename(script)
        at = next((i for i, word in enumerate(command) if i and os.path.basename(word) == name), None)
        if at is not None:
            command[at] = os.path.abspath(script)
    return command
