"""What the watchdogs of all ranks say, compared: who is gone, who stands still, and who waits for that."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from fulmen.supervision.heartbeat import Board
from fulmen.supervision.loader_workers import process_state

OUTSIDE = 10  # times as long for what waits in a library, for a disk or a network perhaps
OUT_OF_DATA = "is done with its run while others wait for it: it had fewer batches, or called fewer collectives."
GONE = ("gone", "Z", "X")  # states of a process
host = functools.cache(socket.gethostname)


class Survey:
    """Of the process of one rank, at what the others last said: rank 0 looks at all, they only at rank 0.

    Arguments:
        patience: seconds for which a rank may stand still.
        ending: tells how the process of a rank ended, if that is known here.
    """

    def __init__(self, board: Board, size: int, patience: float, ending: Callable[[int], str]) -> None:
        self.board, self.size, self.patience, self.ending = board, size, patience, ending
        self.began = time.monotonic()
        self.beats: dict[int, dict[str, Any]] = {}
        self.heard: dict[int, float] = {}  # when a rank last said something new
        self.ended: dict[int, float] = {}  # when a rank was first seen to be done
        self.broken_at = 0.0  # when a collective failed somewhere, and nobody had said why
        self.warned: set[str] = set()

    def look(self) -> dict[str, Any] | None:
        """A verdict on the first rank that fails."""
        for rank in range(self.size if self.board.rank == 0 else 1):
            beat = self.board.values.get(f"beat/{rank}")
            if beat is not None and beat != self.beats.get(rank):
                self.beats[rank], self.heard[rank] = beat, time.monotonic()
                if beat["done"]:
                    self.ended.setdefault(rank, time.monotonic())
        found = next(filter(None, (self.missing(rank) for rank in self.beats if rank != self.board.rank)), None)
        if found is None and self.board.rank == 0:
            found = self.held_up() or self.absent()
        return found

    def is_over(self) -> bool:
        """Are the others done, as far as this one has to wait for them? Rank 0 for all, they for rank 0."""
        if self.board.rank != 0 and not self.board.peers:
            return True
        ranks = range(self.size) if self.board.rank == 0 else (0,)
        beats = [self.board.values.get(f"beat/{rank}") for rank in ranks]
        # Who was not heard of yet may only be slow; a rank that could not connect is not waited for any longer.
        if None in beats and time.monotonic() - self.began < self.patience:
            return False
        return all(beat is None or beat["done"] for beat in beats)

    def missing(self, rank: int) -> dict[str, Any] | None:
        """Is that process gone or stopped?"""
        beat = self.beats[rank]
        if beat["done"]:
            return None
        silent = time.monotonic() - self.heard[rank]
        state = process_state(beat["pid"]) if beat["host"] == host() else None
        last = f"Last seen in {beat['moment']}."
        if rank not in self.board.gone and state in GONE:  # what it said last may still be on its way
            self.board.drain(rank)
            if self.board.values[f"beat/{rank}"]["done"]:
                return None
        if rank in self.board.gone or state in GONE:
            how = self.ending(rank)
            how = how or "ended without an exception: it was killed, or called `os._exit`"
            memory = " (out of memory?)" if "kill" in how.lower() else ""
            text = f"is gone: its process {beat['pid']} {how}{memory}. {last}"
        elif silent > self.patience * (1 if state else OUTSIDE) and state in ("T", "t", None):
            how = f"its process {beat['pid']} is stopped" if state else f"its machine {beat['host']} cannot be reached"
            text = f"says nothing, for {silent:.0f} s so far: {how}. {last}"
        else:
            return None
        return {"rank": rank, "kind": "gone", "text": text, "pid": beat["pid"] if state in ("T", "t") else None}

    def held_up(self) -> dict[str, Any] | None:
        """Do some wait for a rank that does nothing?"""
        running = {rank: beat for rank, beat in self.beats.items() if not beat["done"]}
        stuck = {rank: beat for rank, beat in running.items() if beat["frozen"] > self.patience}
        waiting = {rank: beat for rank, beat in stuck.items() if beat["kind"] == "waiting"}
        if not running:
            return None
        for rank, beat in running.items():
            waits = [r for r, its in stuck.items() if r != rank and (r in waiting or its["seq"] > beat["seq"])]
            waits += [r for r, since in self.ended.items() if time.monotonic() - since > self.patience]
            if beat["kind"] == "waiting" or not waits:
                continue
            limit = {"asleep": 1, "outside": OUTSIDE}.get(beat["kind"], float("inf")) * self.patience
            if beat["frozen"] > limit:
                return still(rank, beat)
            if beat["since"] > self.patience and beat["where"] not in self.warned:
                self.warned.add(beat["where"])
                say(
                    f"Rank {rank} keeps others waiting ({numbers(waits)}), for {beat['since']:.0f} s so far: {beat['where']}"
                )
        if not waiting or len(waiting) < len(running):
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


def still(rank: int, beat: dict[str, Any]) -> dict[str, Any]:
    text = f"stands still (for {beat['since']:.0f} s so far, {beat['moment']}): {beat['where']}"
    return {"rank": rank, "kind": "still", "text": text, "stack": beat["stack"]}


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
