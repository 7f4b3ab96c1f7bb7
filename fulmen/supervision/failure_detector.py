"""`FailureDetector`: compares the heartbeats of all ranks. Who is gone, who stands still, and who only waits for that?"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable

from fulmen.supervision.heartbeat import StatusChannel
from fulmen.supervision.messages import FailureKind, Heartbeat, ThreadState, Verdict
from fulmen.supervision.processes import ENDED, STOPPED, process_state
from fulmen.supervision.reports import format_ranks, write_stderr

OUTSIDE_FACTOR = 10  # times as long for what waits in a library, for a disk or a network perhaps
OUT_OF_DATA = "is done with its run while others wait for it: it had fewer batches, or called fewer collectives."
host_name = functools.cache(socket.gethostname)


class FailureDetector:
    """Suspects ranks by their last heartbeats: rank 0 looks at all, the others only at rank 0.

    Arguments:
        patience_s: for which a rank may stand still.
        describe_exit: tells how the process of a rank ended, or "" if that is not known here.
    """

    def __init__(
        self, channel: StatusChannel, size: int, patience_s: float, describe_exit: Callable[[int], str]
    ) -> None:
        self.channel = channel
        self.size = size
        self.patience_s = patience_s
        self.describe_exit = describe_exit
        self.began = time.monotonic()
        self.heartbeats: dict[int, Heartbeat] = {}
        self.heard: dict[int, float] = {}  # when a rank last said something new
        self.ended: dict[int, float] = {}  # when a rank was first seen to be done
        self.broken_at = 0.0  # when a collective failed somewhere, and nobody had said why
        self.warned: set[str] = set()

    def find_failure(self) -> Verdict | None:
        """On the first rank that fails."""
        for rank in range(self.size if self.channel.rank == 0 else 1):
            beat = self.channel.last_heartbeat(rank)
            if beat is not None and beat != self.heartbeats.get(rank):
                self.heartbeats[rank] = beat
                self.heard[rank] = time.monotonic()
                if beat.done:
                    self.ended.setdefault(rank, time.monotonic())
        others = (rank for rank in self.heartbeats if rank != self.channel.rank)
        found = next(filter(None, map(self.check_process, others)), None)
        if found is None and self.channel.rank == 0:
            found = self.find_straggler() or self.find_absent_rank()
        return found

    def all_done(self) -> bool:
        """Are the others done, as far as this one has to wait for them? Rank 0 for all, they for rank 0."""
        if self.channel.rank != 0 and not self.channel.peers:
            return True
        ranks = range(self.size) if self.channel.rank == 0 else (0,)
        beats = [self.channel.last_heartbeat(rank) for rank in ranks]
        # Who was not heard of yet may only be slow; a rank that could not connect is not waited for any longer.
        if None in beats and time.monotonic() - self.began < self.patience_s:
            return False
        return all(beat is None or beat.done for beat in beats)

    def check_process(self, rank: int) -> Verdict | None:
        """Is the process of that rank gone or stopped?"""
        beat = self.heartbeats[rank]
        if beat.done:
            return None
        state = process_state(beat.pid) if beat.host == host_name() else ""  # of another machine it is not known
        if rank not in self.channel.gone and state in ENDED:  # what it said last may still be on its way
            self.channel.read_remaining(rank)
            latest = self.channel.last_heartbeat(rank)
            if latest is not None and latest.done:
                return None
        ended = rank in self.channel.gone or state in ENDED
        text = self.describe_exited(rank) if ended else self.describe_silence(rank, state)
        if not text:
            return None
        stopped_pid = beat.pid if state in STOPPED else 0
        return Verdict(rank, FailureKind.GONE, f"{text} Last seen in {beat.position}.", stopped_pid=stopped_pid)

    def describe_exited(self, rank: int) -> str:
        """The process of that rank has ended: how?"""
        how = self.describe_exit(rank) or "ended without an exception: it was killed, or called `os._exit`"
        memory = " (out of memory?)" if "kill" in how.lower() else ""
        return f"is gone: its process {self.heartbeats[rank].pid} {how}{memory}."

    def describe_silence(self, rank: int, state: str) -> str:
        """Why that rank has said nothing for too long; "" if that is not so."""
        beat = self.heartbeats[rank]
        silent = time.monotonic() - self.heard[rank]
        if silent > self.patience_s and state in STOPPED:
            return f"says nothing, for {silent:.0f} s so far: its process {beat.pid} is stopped."
        if silent > self.patience_s * OUTSIDE_FACTOR and not state:
            return f"says nothing, for {silent:.0f} s so far: its machine {beat.host} cannot be reached."
        return ""

    def find_straggler(self) -> Verdict | None:
        """Do some wait for a rank that does nothing?"""
        running = {rank: beat for rank, beat in self.heartbeats.items() if not beat.done}
        for rank, beat in running.items():
            waiting = [] if beat.state is ThreadState.WAITING else self.ranks_waiting_for(rank, running)
            if not waiting:
                continue
            if beat.unchanged_s > self.allowed_seconds(beat.state):
                return stalled_verdict(rank, beat)
            if beat.since_collective_s > self.patience_s and beat.location not in self.warned:
                self.warned.add(beat.location)
                delay = f"for {beat.since_collective_s:.0f} s so far"
                write_stderr(f"Rank {rank} keeps others waiting ({format_ranks(waiting)}), {delay}: {beat.location}")
        stuck = all(b.state is ThreadState.WAITING and b.unchanged_s > self.patience_s for b in running.values())
        return self.find_deadlock(running) if running and stuck else None

    def ranks_waiting_for(self, rank: int, running: dict[int, Heartbeat]) -> list[int]:
        """Those that stand still in a collective or have begun more of them than that rank, and those that are done."""
        found = [
            other
            for other, beat in running.items()
            if other != rank and beat.unchanged_s > self.patience_s
            if beat.state is ThreadState.WAITING or beat.sequence > running[rank].sequence
        ]
        return found + [other for other, at in self.ended.items() if time.monotonic() - at > self.patience_s]

    def allowed_seconds(self, state: ThreadState) -> float:
        """How long a rank for which others wait may be in one place."""
        factors = {ThreadState.ASLEEP: 1.0, ThreadState.OUTSIDE: OUTSIDE_FACTOR}
        return factors.get(state, float("inf")) * self.patience_s

    def find_deadlock(self, waiting: dict[int, Heartbeat]) -> Verdict | None:
        """All that run wait: for one that is done, or in different collectives?"""
        if len(waiting) < len(self.heartbeats):
            return Verdict(min(self.heartbeats.keys() - waiting), FailureKind.DONE, OUT_OF_DATA)
        first = min(waiting)
        odd = next((r for r in sorted(waiting) if waiting[r].collective != waiting[first].collective), first)
        beat = waiting[odd]
        # Equal ones may also wait for a network that comes back.
        if len(waiting) < self.size or (odd == 0 and beat.unchanged_s < OUTSIDE_FACTOR * self.patience_s):
            return None
        text = f"waits in another collective than others ({beat.position}): {beat.location}"
        return Verdict(odd, FailureKind.DEADLOCK, text, beat.stack)

    def find_absent_rank(self) -> Verdict | None:
        """A collective failed, and nobody said why: who did not come?"""
        broken = [rank for rank in range(self.size) if f"broken/{rank}" in self.channel.values]
        if not broken:
            return None
        self.broken_at = self.broken_at or time.monotonic()
        if time.monotonic() - self.broken_at < 1:  # the end of a process may show a moment later
            return None
        for rank, beat in self.heartbeats.items():
            if beat.done:
                return Verdict(rank, FailureKind.DONE, OUT_OF_DATA)
        others = {
            rank: beat
            for rank, beat in self.heartbeats.items()
            if rank not in broken and beat.state is not ThreadState.WAITING
        }
        late = min(others, key=lambda rank: others[rank].sequence, default=None)
        if late is None or others[late].since_collective_s < 1:
            return None
        return stalled_verdict(late, others[late])


def stalled_verdict(rank: int, beat: Heartbeat) -> Verdict:
    text = f"stands still (for {beat.since_collective_s:.0f} s so far, {beat.position}): {beat.location}"
    return Verdict(rank, FailureKind.STALLED, text, beat.stack)
