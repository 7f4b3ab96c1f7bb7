"""`Watchdog`: sees a process that died, raised or stands still, says which, and ends all that would wait forever.

In each process a thread says every second on a `Board` what the main thread is doing; rank 0 compares. Whoever sees a
failure puts a verdict on the board; the first counts, and everybody ends because of it. The thread hears of signals
too, which the main thread cannot take while it hangs in a collective.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from fulmen.engine.board import Board
from fulmen.engine.stacks import Sample, because_of_others, doing, frames_of, origin, readable
from fulmen.utilities.errors import MisconfigurationException, SIGTERMException

VARIABLE, DEFAULT_SECONDS = "FULMEN_WATCHDOG_TIMEOUT_S", 30.0
OUTSIDE = 10  # times as long for what waits in a library, for a disk or a network perhaps
SIGNAL_SECONDS = 7.0  # after a signal, for the main thread to begin to end
LOST = "is gone: it was killed, or its machine cannot be reached."
OUT_OF_DATA = "is done with its run while others wait for it: it had fewer batches, or called fewer collectives."
GONE = ("gone", "Z", "X")  # states of a process
_host = functools.cache(socket.gethostname)


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
    found.start()
    return found


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
        self.beats: dict[int, dict[str, Any]] = {}
        self.heard: dict[int, float] = {}  # when a rank last said something new
        self.broken_at = 0.0  # when a collective failed somewhere, and nobody had said why
        self.warned: set[str] = set()
        self.sample = Sample()
        self.signals: socket.socket | None = None
        self.signalled: tuple[int, float] | None = None  # which signal came, and when

    @property
    def verdict(self) -> dict[str, Any] | None:
        """What all end because of."""
        return self.alone or self.board.values.get("verdict")

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Called by the main thread, when the processes have met."""
        quiet_excepthook()
        if threading.current_thread() is self.main:
            self.signals, self.wakeup = socket.socketpair()
            self.wakeup.setblocking(False)
            self.wakeup_before = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        _running.append(self)
        self.thread = threading.Thread(target=self.run, daemon=True, name="fulmen-watchdog")
        self.thread.start()

    def stop(self) -> None:
        """The run is over in this process; rank 0 watches on, for those that are not so far."""
        self.done = True
        if self in _running:
            _running.remove(self)
        if self.signals is not None:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.set_wakeup_fd(self.wakeup_before)
        self.board.set(f"closed/{self.rank}", True)
        self.beat()
        everybody = all(beat["done"] for beat in self.beats.values())
        self.stopped = self.rank != 0 or self.closing or everybody

    def run(self) -> None:
        """What the thread does."""
        due = 0.0
        while not self.stopped:
            signalled = self.board.pump(min(max(due - time.monotonic(), 0), 0.2), self.signals)
            if signalled and self.signals is not None:
                self.hear(self.signals.recv(64))
            self.hear_of_others()
            self.obey()
            if (verdict := self.verdict) is not None and not self.reacted:
                self.reacted = True
                self.react(verdict)
            if time.monotonic() >= due:
                self.beat()
                self.look()
                due = time.monotonic() + self.interval
                if self.rank == 0 and self.done and all(beat["done"] for beat in self.beats.values()):
                    break  # it has said so itself: the beat was later
        self.board.close()

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
            told.update(pid=os.getpid(), host=_host(), done=self.done, moment=moment(self.trainer))
            self.board.set(f"beat/{self.rank}", told)

    def look(self) -> None:
        """Rank 0 looks at all others, they only at rank 0."""
        if self.verdict is not None:
            return
        for rank in range(self.size if self.rank == 0 else 1):
            beat = self.board.values.get(f"beat/{rank}")
            if beat is not None and beat != self.beats.get(rank):
                self.beats[rank], self.heard[rank] = beat, time.monotonic()
        found = next(filter(None, (self.missing(rank) for rank in self.beats if rank != self.rank)), None)
        if found is None and self.rank == 0:
            found = self.held_up() or self.absent()
        if found is None and self.rank != 0 and not self.board.peers:  # rank 0 is done, and one still waits for it
            last = self.sample.last
            if last["frozen"] > 2 and last["kind"] == "waiting":
                found = {"rank": 0, "kind": "done", "text": OUT_OF_DATA}
        if found is not None:
            self.accuse(found)

    def missing(self, rank: int) -> dict[str, Any] | None:
        """Is that process gone or stopped?"""
        beat = self.beats[rank]
        if beat["done"]:
            return None
        silent = time.monotonic() - self.heard[rank]
        state = process_state(beat["pid"]) if beat["host"] == _host() else None
        last = f"Last seen in {beat['moment']}."
        if rank not in self.board.gone and state in GONE:  # what it said last may still be on its way
            self.board.drain(rank)
            if self.board.values[f"beat/{rank}"]["done"]:
                return None
        if rank in self.board.gone or state in GONE:
            how = self.strategy.launcher.ending(rank) if self.strategy.launcher is not None else ""
            text = f"is gone: its process {beat['pid']} {how or 'was killed'} (by want of memory?). {last}"
            text = text if not how or "SIGKILL" in how else text.replace(" (by want of memory?)", "")
        elif silent > self.patience * (1 if state else OUTSIDE) and state in ("T", "t", None):
            how = f"its process {beat['pid']} is stopped" if state else f"its machine {beat['host']} cannot be reached"
            text = f"says nothing since {silent:.0f} s: {how}. {last}"
        else:
            return None
        return {"rank": rank, "kind": "gone", "text": text, "pid": beat["pid"] if state in ("T", "t") else None}

    def held_up(self) -> dict[str, Any] | None:
        """Do some wait for a rank that does nothing?"""
        running = {rank: beat for rank, beat in self.beats.items() if not beat["done"]}
        stuck = {rank: beat for rank, beat in running.items() if beat["frozen"] > self.patience}
        waiting = {rank: beat for rank, beat in stuck.items() if beat["kind"] == "waiting"}
        if not stuck:
            return None
        for rank, beat in running.items():
            waits = [r for r, its in stuck.items() if r != rank and (r in waiting or its["seq"] > beat["seq"])]
            if beat["kind"] == "waiting" or not waits:
                continue
            limit = {"asleep": 1, "outside": OUTSIDE}.get(beat["kind"], float("inf")) * self.patience
            if beat["frozen"] > limit:
                return still(rank, beat)
            if beat["since"] > self.patience and beat["where"] not in self.warned:
                self.warned.add(beat["where"])
                say(f"Rank {rank} lets others wait ({numbers(waits)}), since {beat['since']:.0f} s: {beat['where']}")
        if len(waiting) < len(running):
            return None
        if len(running) < len(self.beats):
            return {"rank": min(self.beats.keys() - running), "kind": "done", "text": OUT_OF_DATA}
        ordered = sorted(waiting.items())
        odd, its = next(((r, beat) for r, beat in ordered if beat["what"] != ordered[0][1]["what"]), ordered[0])
        # Equal ones may also wait for a network that comes back.
        if len(running) < self.size or (odd == 0 and its["frozen"] < OUTSIDE * self.patience):
            return None
        text = f"waits in another collective than others ({its['moment']}): {its['where']}"
        return {"rank": odd, "kind": "deadlock", "text": text, "stack": its["stack"]}

    def absent(self) -> dict[str, Any] | None:
        """A collective failed, and nobody said why: who did not come?"""
        broken = [rank for rank in range(self.size) if f"broken/{rank}" in self.board.values]
        if not broken:
            return None
        self.broken_at = self.broken_at or time.monotonic()
        if time.monotonic() - self.broken_at < 1:  # the end of a process may show a moment later
            return None
        for rank, beat in self.beats.items():
            if beat["done"]:
                return {"rank": rank, "kind": "done", "text": OUT_OF_DATA}
        others = {r: beat for r, beat in self.beats.items() if r not in broken and beat["kind"] != "waiting"}
        late = min(others, key=lambda rank: others[rank]["seq"], default=None)
        return None if late is None or others[late]["since"] < 1 else still(late, others[late])

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
        self.strategy.leaving = True
        with contextlib.suppress(Exception):
            self.trainer._tell(error)
        verdict = self.verdict
        error._fulmen_told = "here"  # type: ignore[attr-defined]
        if (tell := self.strategy.tell_parent) is not None:
            tell(error, (verdict or {}).get("stack", ""), verdict is not None and verdict["rank"] != self.rank)
        self.board.set(f"closed/{self.rank}", True)
        if verdict is not None and verdict["kind"] == "raised":
            # Whoever failed shall end first: some launchers end all when one does.
            self.until(f"closed/{verdict['rank']}", deadline - 0.5)
            (host, pid), latest = verdict["process"], min(deadline - 0.5, time.monotonic() + 2)
            here = host == _host() and pid != os.getppid()  # a parent waits for its children
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
            text = "is gone: its process, which had started the others, was killed, for want of memory perhaps."
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


def orphaned() -> None:
    """Called when the process that started this one is gone."""
    for watchdog in list(_running):
        watchdog.orphaned()


def _forget() -> None:
    """In a forked process, such as a loader's worker: signals are its own."""
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
    return {
        "rank": watchdog.rank,
        "kind": "exit" if signalled else "raised",
        "text": f"failed at {origin(error)} ({moment(watchdog.trainer)}): {type(error).__name__}: {first}",
        "stack": readable("".join(traceback.format_exception(type(error), error, error.__traceback__))),
        "code": 128 + (signal.SIGINT if interrupted else signal.SIGTERM) if signalled else 1,
        "process": [_host(), os.getpid()],
    }


def still(rank: int, beat: dict[str, Any]) -> dict[str, Any]:
    text = f"stands still since {beat['since']:.0f} s ({beat['moment']}): {beat['where']}"
    return {"rank": rank, "kind": "still", "text": text, "stack": beat["stack"]}


def moment(trainer: Any) -> str:
    """Where in its story a trainer is."""
    progress, stage = trainer.fit_loop.progress, trainer.state.stage
    return f"{getattr(stage, 'value', stage) or 'done'}, epoch {progress.epochs}, batch {progress.batch}"


def process_state(pid: int) -> str:
    """The state of a process of this machine as one letter, of which T is stopped and Z dead; or "gone"."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return "gone"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    return "S"


def reason(verdict: dict[str, Any]) -> str:
    return f"Rank {verdict['rank']} {verdict['text']}"


def numbers(ranks: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def say(text: str) -> None:
    """To stderr in one piece, whatever happens to be there."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"{text}\n" if text else "")
        sys.stderr.flush()


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
