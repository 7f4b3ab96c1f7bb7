"""`Watchdog`: detects a process that died, raised or stands still, says which, and ends all that would wait forever.

In each process a thread publishes every second a heartbeat: what the main thread does. Rank 0 compares them. Whoever
sees a failure publishes a verdict; the first counts, and all processes end because of it. The thread hears of signals
too, which the main thread cannot handle while it hangs in a collective.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import torch.distributed as dist

from fulmen.supervision import loader_workers
from fulmen.supervision.failure_detector import OUT_OF_DATA, FailureDetector, host_name
from fulmen.supervision.heartbeat import StatusChannel
from fulmen.supervision.messages import FailureKind, Heartbeat, ThreadState, Verdict
from fulmen.supervision.processes import ENDED, process_state
from fulmen.supervision.reports import FailureReporter, install_excepthook, is_consequence, mark_reported, write_stderr
from fulmen.supervision.signals import SignalMonitor
from fulmen.supervision.stack_sampler import (
    ThreadProbe,
    error_location,
    frames_of,
    is_lost_connection,
    strip_library_frames,
    truncate_middle,
)
from fulmen.utilities.errors import MisconfigurationException, SIGTERMException, with_cause

if TYPE_CHECKING:
    from fulmen.supervision.protocols import ChildProcesses, SupervisedProcess, SupervisedRun

VARIABLE = "FULMEN_WATCHDOG_TIMEOUT_S"
DEFAULT_SECONDS = 30.0
SIGNAL_SECONDS = 7.0  # after a signal, for the main thread to begin to end
PATIENCE = 0.7  # of the limit, after which what stands still has failed


def limit_seconds(given: float | None = None) -> float:
    """How long a failure may go unnoticed: what was given, else the environment variable, else 30 s; 0 for ever."""
    if given is None and (text := os.environ.get(VARIABLE)):
        try:
            given = float(text)
        except ValueError as error:
            fix = "It must be a number of seconds, or 0 for no watchdog."
            raise MisconfigurationException(f"{VARIABLE}={text!r} is not a number. {fix}") from error
    return DEFAULT_SECONDS if given is None else given


def connect_watchdog(
    process: SupervisedProcess,
    run: SupervisedRun,
    children: ChildProcesses | None,
    store: dist.Store,
    address: str,
    limit_s: float,
) -> Watchdog | None:
    """A watchdog that runs; None if rank 0 cannot be reached.

    Arguments:
        children: the processes of other ranks that this one started.
        store: of the process group, in which rank 0 says where it can be reached.
        address: the host of rank 0 as others reach it.
        limit_s: seconds from a failure to the end of all processes.
    """
    try:
        channel = StatusChannel(process.global_rank, dist.PrefixStore("watch", store), address)
    except OSError as error:
        what = f"Rank {process.global_rank} cannot reach the watchdog of rank 0 ({error})"
        write_stderr(f"{what}: if a process hangs, the others do too until the `timeout` of the strategy.")
        return None
    watchdog = Watchdog(process, run, children, channel, limit_s)
    atexit.unregister(_exit_if_others_failed)  # once, and before the group is left
    atexit.register(_exit_if_others_failed)
    watchdog.start()
    return watchdog


@contextlib.contextmanager
def exit_if_asleep(limit_s: float) -> Iterator[None]:
    """Inside, callbacks in the process that made the call hear of a failure; if they fall asleep, it is ended."""
    over = threading.Event()
    probe = ThreadProbe(threading.current_thread(), limit_s * PATIENCE)

    def watch_thread() -> None:
        while not over.wait(limit_s / 12):
            if probe.is_overdue():
                location = probe.last.location
                write_stderr(f"The process that started the ranks does not end: it is in {location}, and is ended.")
                os._exit(1)

    if limit_s > 0:
        threading.Thread(target=watch_thread, daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Phase(Enum):
    """Of the run in this process. It begins as RUNNING; who ends the run changes it once, with the lock held."""

    RUNNING = "running"
    ABORTING = "aborting"  # the main thread leaves the run because of an error
    TERMINATING = "terminating"  # a thread of the watchdog ends the process, whose main thread hangs
    ABORTED = "aborted"  # the main thread has left the run
    DONE = "done"  # the run ended well here; the thread watches until it has everywhere
    CLOSED = "closed"  # it has, or failed elsewhere


class Watchdog:
    """Of one process, for one run.

    Arguments:
        process: this one among those of the run.
        children: the processes of other ranks that this one started.
        run: whose callbacks and loggers are told of a failure if the main thread cannot tell them.
        limit_s: seconds from a failure to the end of all processes.
    """

    def __init__(
        self,
        process: SupervisedProcess,
        run: SupervisedRun,
        children: ChildProcesses | None,
        channel: StatusChannel,
        limit_s: float,
    ) -> None:
        self.process = process
        self.run = run
        self.children = children
        self.channel = channel
        self.limit_s = limit_s
        self.rank = process.global_rank
        self.size = process.world_size
        self.interval_s = min(1.0, limit_s / 12)
        self.lock = threading.RLock()
        self.phase = Phase.RUNNING
        self.unshared_verdict: Verdict | None = None  # one that could not be published
        patience_s = limit_s * PATIENCE
        describe_exit = children.describe_exit if children is not None else lambda rank: ""
        self.detector = FailureDetector(channel, self.size, patience_s, describe_exit)
        self.probe = ThreadProbe(threading.main_thread(), patience_s)
        self.abort_probe = ThreadProbe(threading.main_thread(), patience_s)  # after a failure
        self.reporter = FailureReporter(channel, self.size, run, self.probe)
        self.failure: BaseException | None = None  # with which the main thread leaves the run
        self.own_errors: set[str] = set()
        self.due = 0.0  # when to look around again
        self.signals = SignalMonitor(run, channel)
        self.thread = threading.Thread(target=self.run_thread, daemon=True, name="fulmen-watchdog")

    @property
    def verdict(self) -> Verdict | None:
        """What all end because of."""
        return self.unshared_verdict or self.channel.verdict

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Called by the main thread, when the processes have met."""
        install_excepthook()
        loader_workers.enable_stack_dumps()
        self.signals.install_wakeup()
        _running.append(self)
        _latest[:] = [one for one in _latest if one.thread.is_alive()]
        _latest.append(self)
        self.thread.start()

    def stop(self) -> None:
        """The run is over in this process, which watches on until it is everywhere, unless it failed."""
        with self.lock:  # the thread ends and closes the channel once this is said, and not before
            if self.phase is not Phase.TERMINATING:
                self.channel.publish_value(f"closed/{self.rank}", True)
                self.send_heartbeat(done=True)
                self.phase = Phase.DONE if self.phase is Phase.RUNNING else Phase.ABORTED
        self.block_if_terminating()
        if self in _running:
            _running.remove(self)
        self.signals.restore_wakeup()

    def run_thread(self) -> None:
        """What the thread does. A failure of its own is said, and it continues."""
        while self.phase not in (Phase.ABORTED, Phase.CLOSED):
            try:
                self.run_once()
            except Exception as error:
                if (text := f"{type(error).__name__}: {error}") not in self.own_errors:
                    self.own_errors.add(text)
                    write_stderr(f"The watchdog of rank {self.rank} failed, and continues:\n{traceback.format_exc()}")
                time.sleep(0.2)
        self.channel.close()

    def run_once(self) -> None:
        """Hears what has come, and looks around if it is time to."""
        signalled = self.channel.poll_connections(min(max(self.due - time.monotonic(), 0), 0.2), self.signals.socket)
        numbers = self.signals.read_numbers() if signalled else b""
        if self.is_active():
            self.signals.on_signals(numbers)
            self.signals.on_remote_signal()
        self.enforce_deadline()
        verdict = self.verdict
        if verdict is not None and self.phase is Phase.RUNNING:
            self.act_on_verdict(verdict)
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + self.interval_s
            self.send_heartbeat()
            self.check_ranks()
            self.end_if_abort_hangs()
        with self.lock:
            if self.phase is Phase.DONE and (verdict is not None or self.detector.all_done()):
                self.phase = Phase.CLOSED

    def end_if_abort_hangs(self) -> None:
        """Ends this process if its main thread falls asleep while callbacks hear of a failure."""
        if self.phase is not Phase.ABORTING or not self.abort_probe.is_overdue():
            return
        write_stderr(f"Rank {self.rank} does not end: it is in {self.abort_probe.last.location}, and is ended.")
        # The main thread sleeps in a callback. If it wakes up now it cannot get past `stop`, which needs the lock.
        with self.lock:
            self.run.finalize_loggers()
        verdict = self.verdict
        if self.process.report_to_parent is not None and self.failure is not None:
            stack = "" if verdict is None else verdict.stack
            self.process.report_to_parent(self.failure, stack, is_consequence(self.failure))
        self.terminate_process(1 if verdict is None else verdict.exit_code)

    # ------------------------------------------------------------------ what each says and hears

    def send_heartbeat(self, done: bool = False) -> None:
        """Says what the main thread does."""
        with self.lock:  # what failed stays what is told, and what is done stays done
            aborts = self.phase in (Phase.ABORTING, Phase.ABORTED)
            activity = self.probe.last if aborts else self.probe.sample()
            done = done or self.phase in (Phase.ABORTED, Phase.DONE, Phase.CLOSED)
            position = self.run.describe_position()
            beat = Heartbeat(**vars(activity), pid=os.getpid(), host=host_name(), done=done, position=position)
            self.channel.publish_value(f"heartbeat/{self.rank}", beat)

    def check_ranks(self) -> None:
        """Rank 0 looks at all others, they only at rank 0."""
        if self.verdict is not None:
            return
        found = self.detector.find_failure()
        if found is None and self.rank != 0 and not self.channel.peers:  # rank 0 is done, and one still waits for it
            last = self.probe.last
            if last.unchanged_s > 2 and last.state is ThreadState.WAITING:
                found = Verdict(0, FailureKind.DONE, OUT_OF_DATA)
        if found is not None:
            self.publish_verdict(found)

    # ------------------------------------------------------------------ a failure

    def publish_verdict(self, verdict: Verdict) -> None:
        """Tells all ranks, and prints it if nobody was first."""
        own = replace(verdict, reporter=self.rank)
        self.channel.publish_value("verdict", own)
        if self.channel.wait_for("verdict", time.monotonic() + 2) is None:
            self.unshared_verdict = own
        if self.verdict == own:
            self.reporter.print_report(own)

    def handle_failure(self, error: BaseException) -> BaseException:
        """The main thread is about to leave the run because of an error: the others hear of it.

        Returns:
            The error, or one that says what another rank did if that is the reason.
        """
        with self.lock:
            if self.phase is not Phase.TERMINATING:
                self.phase = Phase.ABORTING
                self.probe.freeze_position(frames_of(error))
        self.block_if_terminating()
        broken = is_lost_connection(error)
        if broken:
            self.await_explanation()
        if self.verdict is None:
            self.publish_verdict(self.local_verdict(error))
        verdict = self.verdict
        more = "" if broken else f" It failed too: {type(error).__name__}: {error}"[:300]
        self.reporter.print_follow_up(verdict, more)
        if self.rank == 0:  # the values are here
            self.reporter.await_acks()
        if broken and verdict is not None and verdict.rank != self.rank:
            error = consequence_of(verdict, error)
        else:
            mark_reported(error)
        self.failure = error
        return error

    def await_explanation(self) -> None:
        """A collective failed here: the watchdogs have some time to find out why."""
        self.channel.publish_value(f"broken/{self.rank}", True)
        deadline = time.monotonic() + 2 + 2 * self.interval_s
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def block_if_terminating(self) -> None:
        """For the main thread: another tells callbacks and loggers, and ends the process."""
        if self.phase is Phase.TERMINATING:
            threading.Event().wait()

    def local_verdict(self, error: BaseException) -> Verdict:
        """On this rank, whose main thread leaves the run because of the error."""
        interrupted = isinstance(error, KeyboardInterrupt)
        signalled = interrupted or (isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM)
        first = (str(error).splitlines() or [""])[0][:300]
        text = f"failed at {error_location(error)} ({self.run.describe_position()}): {type(error).__name__}: {first}"
        loader = loader_workers.find_loader_frame(frames_of(error))
        # The connections of a worker end before it does, on a busy machine long before.
        seconds = 3.0 if isinstance(error, (OSError, EOFError)) else 0.0
        if loader is not None and (worker := loader_workers.describe_exited_worker(loader, seconds)):
            text = f"{text} ({worker})"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return Verdict(
            self.rank,
            FailureKind.EXIT if signalled else FailureKind.RAISED,
            text,
            truncate_middle(strip_library_frames(trace)),
            128 + (signal.SIGINT if interrupted else signal.SIGTERM) if signalled else 1,
            host=host_name(),
            pid=os.getpid(),
        )

    # ------------------------------------------------------------------ the end of a process whose main thread hangs

    def act_on_verdict(self, verdict: Verdict) -> None:
        """The main thread gets some time to find out by itself, then the process is ended."""
        if verdict.rank != self.rank:
            seconds = 1.0 if verdict.kind is FailureKind.EXIT else min(3.0, self.limit_s / 10)
            deadline = time.monotonic() + seconds
            arrived = False  # where it waits; it may still be on its way there
            while time.monotonic() < deadline and self.phase is Phase.RUNNING:
                activity = self.probe.sample()
                rests = activity.collective and activity.unchanged_s > 0.1
                if not arrived and (rests or time.monotonic() > deadline - 0.2):
                    arrived = True
                    self.reporter.publish_location()
                self.channel.wait_polling(0.02)
        self.abort_run(RuntimeError(verdict.reason), self.limit_s / 3, verdict.exit_code)

    def abort_run(self, error: BaseException, seconds: float, exit_code: int = 1) -> None:
        """Tells callbacks and loggers from this thread, then ends the process. Not if the main thread does it."""
        with self.lock:
            if self.phase is not Phase.RUNNING:
                return
            self.phase = Phase.TERMINATING
        deadline = time.monotonic() + seconds
        threading.Thread(target=self.terminate_later, args=(seconds, exit_code), daemon=True).start()
        self.reporter.print_follow_up(self.verdict)
        self.process.abort_collectives()
        # Code of the user runs here, in another thread than elsewhere. That is safe because the main thread hangs; if it
        # wakes up, it cannot get past `handle_failure` or `stop`, which need the lock, so that nothing is told or closed
        # twice. What raises is printed, and what does not return is ended by the other thread.
        with self.lock:
            try:
                self.run.notify_exception(error)
            except BaseException:
                trace = strip_library_frames(traceback.format_exc())
                write_stderr(f"Rank {self.rank}: telling callbacks of the failure failed:\n{trace}")
        mark_reported(error)
        verdict = self.verdict
        if self.process.report_to_parent is not None:
            stack = "" if verdict is None else verdict.stack
            self.process.report_to_parent(error, stack, verdict is not None and verdict.rank != self.rank)
        self.channel.publish_value(f"closed/{self.rank}", True)
        if verdict is not None and verdict.kind is FailureKind.RAISED:
            self.let_end_first(verdict, deadline - 0.5)
        if self.rank == 0:
            self.reporter.await_acks()
        self.terminate_process(exit_code, max(deadline - time.monotonic(), 0.5))

    def let_end_first(self, verdict: Verdict, deadline: float) -> None:
        """Waits for the process that raised: some launchers end all when one ends, and shall see that one."""
        self.channel.wait_for(f"closed/{verdict.rank}", deadline)
        deadline = min(deadline, time.monotonic() + 2)
        here = verdict.host == host_name() and verdict.pid != os.getppid()  # a parent waits for its children
        while here and process_state(verdict.pid) not in ENDED and time.monotonic() < deadline:
            self.channel.wait_polling(0.05)

    def terminate_process(self, exit_code: int, patience: float = 0.5) -> None:
        """Ends the process, its workers and those that it started."""
        for worker in multiprocessing.active_children():
            worker.kill()
        if self.children is not None:
            self.children.end_children(patience)
        write_stderr("")
        os._exit(exit_code)

    def terminate_later(self, seconds: float, exit_code: int) -> None:
        time.sleep(seconds)
        self.terminate_process(exit_code)

    def on_parent_exit(self) -> None:
        """The process that started this one is gone."""
        if self.process.start_method == "popen":
            text = "is gone: its process, which had started the others, was killed, perhaps because memory ran out."
            verdict = Verdict(0, FailureKind.GONE, text, reporter=self.rank)
        else:
            text = "ends: the process that started it is gone."
            verdict = Verdict(self.rank, FailureKind.EXIT, text, reporter=self.rank)
        verdict = self.unshared_verdict or verdict
        self.unshared_verdict = verdict
        if self.process.start_method == "popen":
            self.reporter.print_alone(verdict)
        deadline = time.monotonic() + self.limit_s / 3
        while self.phase is Phase.ABORTING and time.monotonic() < deadline:
            time.sleep(0.05)
        self.abort_run(RuntimeError(verdict.reason), self.limit_s / 3)

    def is_active(self) -> bool:
        """Is the run not over in this process?"""
        return self.phase in (Phase.RUNNING, Phase.ABORTING, Phase.TERMINATING)

    def enforce_deadline(self) -> None:
        """Does the main thread end as it was told to, after a step?"""
        received = self.signals.received
        if received is None or self.phase not in (Phase.RUNNING, Phase.ABORTING):
            return
        number = received.number
        seconds = time.monotonic() - received.at
        text = f"was told to end by {signal.Signals(number).name}"
        ends = self.phase is Phase.ABORTING or self.run.is_saving_last()
        if ends and seconds > SIGNAL_SECONDS + self.limit_s:
            write_stderr(f"Rank {self.rank} {text}, and is not done with that: it {self.reporter.describe_location()}")
            self.terminate_process(128 + number)
        elif not ends and seconds > SIGNAL_SECONDS:
            self.probe.sample()
            what = f"and its step did not end within {SIGNAL_SECONDS:g} s, so that no checkpoint is saved now"
            write_stderr(f"Rank {self.rank} {text}, {what}: it {self.reporter.describe_location()}")
            verdict = Verdict(self.rank, FailureKind.EXIT, text, exit_code=128 + number, reporter=self.rank)
            self.channel.publish_value("verdict", verdict)
            self.abort_run(SystemExit(128 + number), 2.0, 128 + number)


_running: list[Watchdog] = []
_latest: list[Watchdog] = []  # of this process, whose thread may continue after its run


def wait_for_others() -> RuntimeError | None:
    """Before a process ends well: until the others are done with their runs too. Returns what failed there."""
    found: RuntimeError | None = None
    while _latest:
        watchdog = _latest.pop()
        if watchdog.phase in (Phase.DONE, Phase.CLOSED, Phase.TERMINATING):
            watchdog.thread.join()
            if (verdict := watchdog.verdict) is not None and found is None:
                found = RuntimeError(verdict.reason)
                mark_reported(found, is_consequence=True)
    return found


def consequence_of(verdict: Verdict, error: BaseException) -> BaseException:
    """What this process raises, in which the failure of another rank has caused an error."""
    told = verdict.kind is FailureKind.EXIT
    reason = with_cause(SIGTERMException(verdict.exit_code) if told else RuntimeError(verdict.reason), error)
    mark_reported(reason, is_consequence=True)
    return reason


def _exit_if_others_failed() -> None:
    if wait_for_others() is not None:
        write_stderr("")
        os._exit(1)


def on_parent_exit() -> None:
    """Called when the process that started this one is gone."""
    for watchdog in list(_running):
        watchdog.on_parent_exit()


def _forget_after_fork() -> None:
    """In a forked process, such as a loader's worker: signals are its own."""
    _latest.clear()
    if _running:
        _running.clear()
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
