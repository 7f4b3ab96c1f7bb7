"""`Watchdog`: sees a process that died, raised or stands still, says which, and ends all that would wait forever.

In each process a thread says every second on a `Board` what the main thread is doing; rank 0 compares. Whoever sees a
failure puts a verdict on the board; the first counts, and everybody ends because of it. The thread hears of signals
too, which the main thread cannot take while it hangs in a collective.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from fulmen.supervision import loader_workers
from fulmen.supervision.failure_detector import GONE, OUT_OF_DATA, Survey, host, numbers, say
from fulmen.supervision.heartbeat import Board
from fulmen.supervision.loader_workers import process_state
from fulmen.supervision.stack_sampler import Sample, because_of_others, bounded, doing, frames_of, origin, readable
from fulmen.utilities.errors import MisconfigurationException, SIGTERMException

VARIABLE, DEFAULT_SECONDS = "FULMEN_WATCHDOG_TIMEOUT_S", 30.0
SIGNAL_SECONDS = 7.0  # after a signal, for the main thread to begin to end


def limit_seconds(given: float | None = None) -> float:
    """How long a failure may go unnoticed: what was given, else the environment variable, else 30 s; 0 for ever."""
    if given is None and (text := os.environ.get(VARIABLE)):
        try:
            given = float(text)
        except ValueError as error:
            raise MisconfigurationException(f"{VARIABLE}={text!r} is no number of seconds. Set one, or 0.") from error
    return DEFAULT_SECONDS if given is None else given


def watch(strategy: Any, trainer: Any, limit: float) -> Watchdog | None:
    """A watchdog that runs, if there are others."""
    if strategy.world_size == 1 or strategy.store is None or limit <= 0:
        return None
    store = dist.PrefixStore("watch", strategy.store)
    try:
        board = Board(strategy.global_rank, store, strategy.cluster_environment.main_address)
    except OSError as error:
        what = f"Rank {strategy.global_rank} cannot reach the watchdog of rank 0 ({error})"
        say(f"{what}: if a process hangs, the others do too until the `timeout` of the strategy.")
        return None
    found = Watchdog(strategy, trainer, board, limit)
    atexit.unregister(_at_exit)  # once, and before the group is left
    atexit.register(_at_exit)
    found.start()
    return found


@contextlib.contextmanager
def ended_if_asleep(limit: float) -> Iterator[None]:
    """Inside, callbacks in the process that made the call hear of a failure; if they fall asleep, it is ended."""
    over, thread, sample = threading.Event(), threading.current_thread(), Sample()

    def look() -> None:
        while not over.wait(limit / 12):
            if sample.overslept(thread, limit * 0.7):
                say(f"The process that started the ranks does not end: it is in {sample.last['where']}, and is ended.")
                os._exit(1)

    if limit > 0:
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Watchdog:
    """Of one process, for one run.

    Arguments:
        trainer: whose callbacks and loggers hear of a failure if the main thread cannot tell them.
        limit: seconds from a failure to the end of all processes.
    """

    def __init__(self, strategy: Any, trainer: Any, board: Board, limit: float) -> None:
        self.strategy, self.trainer, self.board, self.limit = strategy, trainer, board, limit
        self.rank, self.size = strategy.global_rank, strategy.world_size
        self.patience, self.interval = limit * 0.7, min(1.0, limit / 12)
        self.main, self.lock = threading.main_thread(), threading.RLock()
        self.closing = self.forced = self.told = self.done = self.stopped = self.reacted = False
        self.printed = threading.Event()  # what was to be told is out
        self.alone: dict[str, Any] | None = None  # a verdict that could not be shared
        ending = getattr(strategy.launcher, "ending", lambda rank: "")
        self.survey = Survey(board, self.size, self.patience, ending)
        self.failure: BaseException | None = None  # with which the main thread leaves the run
        self.end = Sample()  # of the main thread after a failure
        self.failures: set[str] = set()  # of its own thread
        self.sample = Sample()
        self.signals: socket.socket | None = None
        self.due = 0.0  # when to look around again
        self.signalled: tuple[int, float] | None = None  # which signal came, and when

    thread: threading.Thread

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What all end because of."""
        return self.alone or self.board.values.get("verdict")

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Called by the main thread, when the processes have met."""
        quiet_excepthook()
        loader_workers.prepare()
        if threading.current_thread() is self.main:
            self.signals, self.wakeup = socket.socketpair()
            self.wakeup.setblocking(False)
            self.wakeup_before = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        _running.append(self)
        _latest[:] = [one for one in _latest if one.thread.is_alive()]
        _latest.append(self)
        self.thread = threading.Thread(target=self.run, daemon=True, name="fulmen-watchdog")
        self.thread.start()

    def stop(self) -> None:
        """The run is over in this process, which watches on until it is everywhere, unless it failed."""
        with self.lock:  # the thread ends and closes the board once this is said, and not before
            self.done = True
            self.board.set(f"closed/{self.rank}", True)
            self.beat()
        if self in _running:
            _running.remove(self)
        if self.signals is not None:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.set_wakeup_fd(self.wakeup_before)
        self.stopped = self.closing

    def run(self) -> None:
        """What the thread does. A failure of its own is said, and it watches on."""
        while not self.stopped:
            try:
                self.once()
            except Exception as error:
                if (text := f"{type(error).__name__}: {error}") not in self.failures:
                    self.failures.add(text)
                    say(f"The watchdog of rank {self.rank} failed, and watches on:\n{traceback.format_exc()}")
                time.sleep(0.2)
        self.board.close()

    def once(self) -> None:
        """Hears what has come, and looks around if it is time to."""
        signalled = self.board.pump(min(max(self.due - time.monotonic(), 0), 0.2), self.signals)
        if signalled and self.signals is not None:
            self.hear(self.signals.recv(64))
        self.hear_of_others()
        self.obey()
        if (verdict := self.verdict) is not None and not self.reacted:
            self.reacted = True
            self.react(verdict)
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + self.interval
            self.beat()
            self.look()
            self.close_in_time()
        with self.lock:
            self.stopped = self.stopped or (self.done and (verdict is not None or self.survey.is_over()))

    def close_in_time(self) -> None:
        """After a failure: ends this process if its main thread falls asleep while callbacks hear of it."""
        if not self.closing or self.done:
            return
        if self.end.overslept(self.main, self.patience):
            say(f"Rank {self.rank} does not end: it is in {self.end.last['where']}, and is ended.")
            for logger in self.trainer.loggers:
                with contextlib.suppress(Exception):
                    logger.finalize("failed")
            if (tell := self.strategy.report_to_parent) is not None and self.failure is not None:
                tell(self.failure, (self.verdict or {}).get("stack", ""), hasattr(self.failure, "_fulmen_echo"))
            self.leave((self.verdict or {}).get("code", 1))

    def until(self, key: str, deadline: float) -> Any:
        """Waits for a value; None if it does not come."""
        while (found := self.board.values.get(key)) is None and time.monotonic() < deadline:
            if self.rank != 0 and not self.board.peers:
                break
            self.pause(0.02)
        return found

    def pause(self, seconds: float) -> None:
        if threading.current_thread() is self.thread:
            self.board.pump(seconds)
        else:
            time.sleep(seconds)

    # ------------------------------------------------------------------ what each says and hears

    def beat(self) -> None:
        """Says what the main thread does."""
        with self.lock:  # what failed stays what is told, and what is done stays done
            told = dict(self.sample.last) if self.closing else self.sample.take(self.main, self.patience)
            told.update(pid=os.getpid(), host=host(), done=self.done, moment=moment(self.trainer))
            self.board.set(f"beat/{self.rank}", told)

    def look(self) -> None:
        """Rank 0 looks at all others, they only at rank 0."""
        if self.verdict is not None:
            return
        found = self.survey.look()
        if found is None and self.rank != 0 and not self.board.peers:  # rank 0 is done, and one still waits for it
            last = self.sample.last
            if last["frozen"] > 2 and last["kind"] == "waiting":
                found = {"rank": 0, "kind": "done", "text": OUT_OF_DATA}
        if found is not None:
            self.accuse(found)

    # ------------------------------------------------------------------ a failure

    def accuse(self, verdict: dict[str, Any]) -> None:
        """Puts a verdict on the board, and prints it if nobody was first."""
        mine = {**verdict, "by": self.rank}
        self.board.set("verdict", mine)
        if self.until("verdict", time.monotonic() + 2) is None:
            self.alone = mine
        if self.verdict == mine and not self.told:
            self.report(mine)

    def report(self, verdict: dict[str, Any]) -> None:
        """Says who failed and how, where the others wait, and the stack."""
        self.told = True
        if verdict["kind"] == "exit":
            self.printed.set()
            return
        waits: dict[str, list[int]] = {}
        deadline = time.monotonic() + 3
        for rank in range(self.size):
            if rank == self.rank and rank != verdict["rank"]:
                waits.setdefault(self.place(), []).append(rank)
            elif rank != verdict["rank"] and (where := self.until(f"at/{rank}", deadline)):
                waits.setdefault(where, []).append(rank)
        lines = [reason(verdict)]
        lines += [f"{'Ranks' if len(who) > 1 else 'Rank'} {numbers(who)}: {where}" for where, who in waits.items()]
        if stack := verdict.get("stack"):
            lines.append(stack.rstrip())
        say("\n".join(lines))
        self.printed.set()
        self.board.set("reported", True)
        if verdict.get("pid") is not None:  # a stopped process does not hear of it
            with contextlib.suppress(OSError):
                os.kill(verdict["pid"], signal.SIGKILL)

    def place(self) -> str:
        """Where this rank is."""
        last = self.sample.last
        return f"{'waits' if last['what'] else 'is'} in {last['where']} ({moment(self.trainer)})"

    def failed(self, error: BaseException) -> BaseException:
        """The main thread is about to leave the run because of an error: the others hear of it.

        Returns:
            The error, or one that says what another rank did if that is the reason.
        """
        with self.lock:
            if self.forced:  # the other thread does all that, and ends the process
                threading.Event().wait()
            self.closing = True
            self.sample.last.update(zip(("what", "where"), doing(frames_of(error))))
        broken, deadline = because_of_others(error), time.monotonic() + 2 + 2 * self.interval
        if broken:
            self.board.set(f"broken/{self.rank}", True)
        while broken and self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.verdict is None:
            self.accuse(own(self, error))
        self.echo("" if broken else f" It failed too: {type(error).__name__}: {error}"[:300])
        if self.rank == 0:  # the board is here
            self.all_know()
        verdict = self.verdict
        if broken and verdict is not None and verdict["rank"] != self.rank:
            left = verdict["kind"] == "exit"
            told: BaseException = SIGTERMException(verdict["code"]) if left else RuntimeError(reason(verdict))
            error, error.__cause__ = told, error
            error._fulmen_echo = True  # type: ignore[attr-defined]
        with contextlib.suppress(AttributeError):
            error._fulmen_told = "here"  # type: ignore[attr-defined]
        self.failure = error
        return error

    def echo(self, more: str = "") -> None:
        """One line from each rank that ends because of another, after the report."""
        verdict = self.verdict
        self.board.set(f"at/{self.rank}", self.place())
        if verdict is None or self.told or verdict["rank"] == self.rank or verdict["kind"] == "exit":
            return
        self.told = True
        self.until("reported", time.monotonic() + 3)
        say(f"Rank {self.rank} ends because of rank {verdict['rank']}.{more}")
        self.printed.set()

    def all_know(self) -> None:
        deadline = time.monotonic() + 3
        for rank in range(1, self.size):
            if rank not in self.board.gone:
                self.until(f"at/{rank}", deadline)

    # ------------------------------------------------------------------ the end of a process whose main thread hangs

    def react(self, verdict: dict[str, Any]) -> None:
        """The main thread gets a moment to find out by itself, then the process is ended."""
        if verdict["rank"] != self.rank:
            deadline = time.monotonic() + (1.0 if verdict["kind"] == "exit" else min(3.0, self.limit / 10))
            arrived = False  # where it waits; it may still be on its way there
            while time.monotonic() < deadline and not self.closing and not self.done:
                told = self.sample.take(self.main, self.patience)
                if not arrived and ((told["what"] and told["frozen"] > 0.1) or time.monotonic() > deadline - 0.2):
                    arrived = True
                    self.board.set(f"at/{self.rank}", self.place())
                self.pause(0.02)
        self.force(RuntimeError(reason(verdict)), self.limit / 3, verdict.get("code", 1))

    def force(self, error: BaseException, seconds: float, code: int = 1) -> None:
        """Tells callbacks and loggers from this thread, then ends the process. Not if the main thread does it."""
        with self.lock:
            if self.closing or self.forced or self.done:
                return
            self.forced = True
        deadline = time.monotonic() + seconds
        timer = threading.Timer(seconds, self.leave, (code,))
        timer.daemon = True
        timer.start()
        self.echo()
        self.strategy.aborting = True
        try:  # code of the user, which may raise anything; the timer ends it if it does not return
            self.trainer._tell(error)
        except BaseException:
            say(f"Rank {self.rank}: telling callbacks of the failure failed:\n{readable(traceback.format_exc())}")
        verdict = self.verdict
        error._fulmen_told = "here"  # type: ignore[attr-defined]
        if (tell := self.strategy.report_to_parent) is not None:
            tell(error, (verdict or {}).get("stack", ""), verdict is not None and verdict["rank"] != self.rank)
        self.board.set(f"closed/{self.rank}", True)
        if verdict is not None and verdict["kind"] == "raised":
            # Whoever failed shall end first: some launchers end all when one does.
            self.until(f"closed/{verdict['rank']}", deadline - 0.5)
            (machine, pid), latest = verdict["process"], min(deadline - 0.5, time.monotonic() + 2)
            here = machine == host() and pid != os.getppid()  # a parent waits for its children
            while here and process_state(pid) not in GONE and time.monotonic() < latest:
                self.pause(0.05)
        if self.rank == 0:
            self.all_know()
        self.leave(code, max(deadline - time.monotonic(), 0.5))

    def leave(self, code: int, patience: float = 0.5) -> None:
        """Ends the process, its workers and those that it started."""
        for worker in multiprocessing.active_children():
            worker.kill()
        if (launcher := self.strategy.launcher) is not None:
            launcher.end(patience)
        say("")
        os._exit(code)

    def orphaned(self) -> None:
        """The process that started this one is gone."""
        if self.strategy.start_method == "popen":
            text = "is gone: its process, which had started the others, was killed, perhaps because memory ran out."
            self.alone = self.alone or {"rank": 0, "kind": "gone", "text": text, "by": self.rank}
            with self.lock:
                told, self.told = self.told, True
            if told:
                self.printed.wait(4.0)
            else:
                say(f"{reason(self.alone)}\nRank {self.rank}: {self.place()}")
        else:
            text = "ends: the process that started it is gone."
            self.alone = self.alone or {"rank": self.rank, "kind": "exit", "text": text, "by": self.rank}
        deadline = time.monotonic() + self.limit / 3
        while self.closing and not self.done and time.monotonic() < deadline:
            time.sleep(0.05)
        self.force(RuntimeError(reason(self.alone)), self.limit / 3)

    def hear(self, heard: bytes) -> None:
        """A signal has come to this process, whatever its main thread is doing: all processes hear of it."""
        for number in heard:
            ours = number == signal.SIGTERM or self.trainer.signals.ours(number)
            if ours and self.signalled is None and not self.done:
                self.board.set("signal", number)
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.signalled = (number, time.monotonic())

    def hear_of_others(self) -> None:
        """A signal has come to another process: it ends there only if all end."""
        number = self.board.values.get("signal")
        if number is None or self.trainer.signals.pending is not None or self.done:
            return
        self.trainer.signals.pending = number
        if self.signalled is None and number in (signal.SIGTERM, signal.SIGINT):
            self.signalled = (number, time.monotonic())

    def obey(self) -> None:
        """Does the main thread end as it was told to, after a step?"""
        if self.signalled is None or self.done or self.forced:
            return
        number, since = self.signalled[0], time.monotonic() - self.signalled[1]
        text = f"was told to end by {signal.Signals(number).name}"
        ends = self.closing or self.trainer.signals.saving
        if ends and since > SIGNAL_SECONDS + self.limit:
            say(f"Rank {self.rank} {text}, and is not done with that: it {self.place()}")
            self.leave(128 + number)
        elif not ends and since > SIGNAL_SECONDS:
            self.sample.take(self.main, self.patience)
            what = f"and its step did not end within {SIGNAL_SECONDS:g} s, so that no checkpoint is saved now"
            say(f"Rank {self.rank} {text}, {what}: it {self.place()}")
            verdict = {"rank": self.rank, "kind": "exit", "text": text, "code": 128 + number, "by": self.rank}
            self.board.set("verdict", verdict)
            self.force(SystemExit(128 + number), 2.0, 128 + number)


_running: list[Watchdog] = []
_latest: list[Watchdog] = []  # of this process, whose thread may go on after its run


def wait_for_others() -> RuntimeError | None:
    """Before a process ends well: until the others are done with their runs too. Returns what failed there."""
    found: Any = None
    while _latest:
        watchdog = _latest.pop()
        if watchdog.done and not watchdog.closing:
            watchdog.thread.join()
            if (verdict := watchdog.verdict) is not None and found is None:
                found = RuntimeError(reason(verdict))
                found._fulmen_told, found._fulmen_echo = "here", True
    return found


def _at_exit() -> None:
    if wait_for_others() is not None:
        say("")
        os._exit(1)


def orphaned() -> None:
    """Called when the process that started this one is gone."""
    for watchdog in list(_running):
        watchdog.orphaned()


def _forget() -> None:
    """In a forked process, such as a loader's worker: signals are its own."""
    _latest.clear()
    if _running:
        _running.clear()
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------------- words


def own(watchdog: Watchdog, error: BaseException) -> dict[str, Any]:
    """A verdict on this rank."""
    interrupted = isinstance(error, KeyboardInterrupt)
    signalled = interrupted or (isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM)
    first = (str(error).splitlines() or [""])[0][:300]
    loader = loader_workers.waiting_for(frames_of(error))
    # Its connections end before it does, on a busy machine long before.
    worker = (
        ""
        if loader is None
        else loader_workers.ended_early(loader, 3.0 if isinstance(error, (OSError, EOFError)) else 0)
    )
    return {
        "rank": watchdog.rank,
        "kind": "exit" if signalled else "raised",
        "text": f"failed at {origin(error)} ({moment(watchdog.trainer)}): {type(error).__name__}: {first}{f' ({worker})' if worker else ''}",
        "stack": bounded(readable("".join(traceback.format_exception(type(error), error, error.__traceback__)))),
        "code": 128 + (signal.SIGINT if interrupted else signal.SIGTERM) if signalled else 1,
        "process": [host(), os.getpid()],
    }


def moment(trainer: Any) -> str:
    """Where in its story a trainer is."""
    progress, stage = trainer.fit_loop.progress, trainer.state.stage
    return f"{getattr(stage, 'value', stage) or 'done'}, epoch {progress.epochs}, batch {progress.batch}"


def reason(verdict: dict[str, Any]) -> str:
    return f"Rank {verdict['rank']} {verdict['text']}"


def reported(error: BaseException) -> bool:
    """Has it been printed, by this process or another?"""
    return hasattr(error, "_fulmen_told")


def quiet(error: BaseException) -> None:
    """What a rank has printed is raised here too: then only the place here is new."""
    error._fulmen_told = "elsewhere"  # type: ignore[attr-defined]
    quiet_excepthook()


def quiet_excepthook() -> None:
    """An error that was reported is not printed again when it ends the script."""
    before = sys.excepthook
    if getattr(before, "of_fulmen", False):
        return

    def hook(kind: Any, error: BaseException, trace: Any) -> None:
        told = getattr(error, "_fulmen_told", None)
        if told is None:
            before(kind, error, trace)
        elif told == "elsewhere":
            say(readable("".join(traceback.format_exception(kind, error, trace, chain=False))))

    hook.of_fulmen = True  # type: ignore[attr-defined]
    sys.excepthook = hook
