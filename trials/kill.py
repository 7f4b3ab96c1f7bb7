"""Processes that write checkpoints are killed at random moments: is every file whole, and is nothing left over?

python -m trials.kill                # 1,000 trials, and 100 of a writer that only calls `torch.save(content, path)`
python -m trials.kill --trial 17     # that one again: the same mix, save, and share of its time or calls
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

import fulmen as pl
from benchmarks.harness import NOTHING_ON, print_table
from fulmen.callbacks import ModelCheckpoint
from fulmen.checkpoint.paths import find_newest_good
from fulmen.plugins import TorchCheckpointIO

WEIGHTS = 150_000  # numbers: a file of 0.6 MB, in whose writing there is time for a kill
STEPS = 300  # more than a process reaches
MIXES: dict[str, dict[str, Any]] = {
    "one file, overwritten": {},
    "save_top_k=2": {"monitor": "score", "save_top_k": 2},
    "save_last=True": {"save_last": True},
    "save_last='link'": {"save_last": "link"},
    "save_top_k=3, save_last=True": {"monitor": "score", "save_top_k": 3, "save_last": True},
    "async_save, save_top_k=2, save_last=True": {
        "async_save": True,
        "monitor": "score",
        "save_top_k": 2,
        "save_last": True,
    },
}
FILE_SYSTEMS = {"temporary folder": tempfile.gettempdir(), "memory": "/dev/shm"}


class NaiveIO(TorchCheckpointIO):
    """A writer that does nothing against kills."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(checkpoint, path)


class Model(pl.LightningModule):
    def __init__(self, scores: random.Random) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(WEIGHTS))
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.005)  # files of different steps have different times
        self.log("score", 3 * self.scores.random() - self.global_step)  # mostly better than before
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Event(NamedTuple):
    what: str  # begin or done
    path: str
    step: int
    time: float


@dataclass
class Findings:
    """What trials have found."""

    trials: int = 0
    inside: int = 0  # kills that came while a file was being written
    half: int = 0  # of which this many left an unfinished temporary file
    unreadable: int = 0
    lost: int = 0
    orphans: int = 0
    complaints: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def bad(self) -> int:
        return self.unreadable + self.lost + self.orphans


def draw_trial(seed: int, number: int) -> tuple[str, str, random.Random]:
    """The mix and file system of a trial, and its random numbers."""
    chance = random.Random(f"{seed}-{number}")
    file_systems = [file_system for file_system, folder in FILE_SYSTEMS.items() if os.path.isdir(folder)]
    return list(MIXES)[number % len(MIXES)], file_systems[number // len(MIXES) % len(file_systems)], chance


def run_trial(seed: int, number: int, io: type[TorchCheckpointIO] = TorchCheckpointIO) -> Findings:
    """One process that saves and is killed; then what its folder holds, and what the next start makes of it."""
    mix, file_system, chance = draw_trial(seed, number)
    with tempfile.TemporaryDirectory(dir=FILE_SYSTEMS[file_system]) as name:
        folder = Path(name) / "checkpoints"
        events = run_until_killed(folder, mix, io, chance)
        found = Findings(trials=1, inside=int(events[-1].what == "begin"))
        found.half = sum(path.name.startswith(".") for path in folder.iterdir())
        try:
            resume_once(folder, mix, io, *check_files(folder, events, found))
        except Exception:
            found.lost += 1
            found.complaints.append(traceback.format_exc())
        left = [path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix != ".ckpt"]
        found.orphans = len(left)
        found.complaints = [f"trial {number} ({mix}, {file_system}): {text}" for text in [*found.complaints, *left]]
    return found


def save_until_killed(folder: Path, mix: str, io: TorchCheckpointIO, seed: int) -> None:
    """What the killed process does."""
    if not MIXES[mix]:
        folder.mkdir()
        for step in range(1, STEPS):
            time.sleep(0.005)
            io.save_checkpoint({"global_step": step, "weight": torch.full((WEIGHTS,), -step)}, f"{folder}/model.ckpt")
        return
    callback = ModelCheckpoint(folder, every_n_train_steps=1, **MIXES[mix])
    make_trainer(callback, io, STEPS).fit(
        Model(random.Random(seed)), DataLoader(torch.zeros(STEPS, 1), batch_size=None)
    )


def make_trainer(callback: ModelCheckpoint, io: TorchCheckpointIO, steps: int) -> pl.Trainer:
    options = {**NOTHING_ON, "enable_checkpointing": True, "log_every_n_steps": 1000}
    return pl.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[callback], plugins=[io], **options)


def run_until_killed(folder: Path, mix: str, io: type[TorchCheckpointIO], chance: random.Random) -> list[Event]:
    """What a process had reported when it was killed around one of its saves.

    Half of them are killed from outside, at a share of the time that a save takes; the other half kill themselves, at
    the same share of the calls of a save: the clock seldom hits the short ones.
    """
    last = chance.randrange(2, 6)
    share = 1.2 * chance.random()
    by_clock = chance.random() < 0.5
    scores = chance.random()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with without_logs():
            os.close(reading)
            report = lambda *said: os.write(writing, f"{json.dumps([*said, time.monotonic()])}\n".encode())  # noqa: E731
            try:
                save_until_killed(
                    folder, mix, reporting_io(io, report, None if by_clock else last, share)(), int(scores * 1e9)
                )
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    os.close(writing)
    events: list[Event] = []
    durations = [0.0]
    with open(reading) as lines:
        for line in lines:
            events.append(Event(*json.loads(line)))
            if events[-1].what == "done":
                durations.append(events[-1].time - events[-2].time)
            elif by_clock and len(durations) > last:
                # Not slept: that takes longer than what is aimed at.
                kill_at = events[-1].time + share * sorted(durations)[len(durations) // 2]
                while time.monotonic() < kill_at:
                    pass
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        raise RuntimeError(f"The process that saves ended by itself: {status}. Its last report was {events[-1:]}.")
    return events


def reporting_io(
    io: type[TorchCheckpointIO], report: Callable[..., Any], last: int | None, share: float
) -> type[TorchCheckpointIO]:
    """A storage that says which file it begins to write, and which one is written.

    Given `last`, it kills its process in or behind the save after so many, at a share of the calls of the one before.
    """

    class ReportingIO(io):  # type: ignore[misc, valid-type]
        saves = calls = 0
        limit: int | None = None

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            report("begin", str(path), checkpoint["global_step"])
            self.saves += 1
            if last is not None and self.limit is None:
                self.limit = int(share * self.calls) if self.saves > last else None
                self.calls = 0
            if last is not None:
                sys.setprofile(self.count)  # of this thread: in the background it may be another one each time
            super().save_checkpoint(checkpoint, path, storage_options)
            if last is not None and self.limit is None:
                sys.setprofile(None)
            report("done", str(path), checkpoint["global_step"])

        def count(self, *_: Any) -> None:
            self.calls += 1
            if self.limit is not None and self.calls > self.limit:
                os.kill(os.getpid(), signal.SIGKILL)

    return ReportingIO


def check_files(folder: Path, events: list[Event], found: Findings) -> tuple[str, int]:
    """Is every file that has a name whole, and the last one that was finished there? Gives the newest and its step."""
    steps = {}
    for path in sorted(folder.glob("*.ckpt")):
        try:
            TorchCheckpointIO().verify_checkpoint(path)
            content = torch.load(path, weights_only=False)  # the slow way is what the next start takes
            weight = content["weight"] if "weight" in content else content["state_dict"]["weight"]
            if not torch.equal(weight, torch.full_like(weight, -content["global_step"])):
                raise ValueError("its weights are those of another step")
            steps[str(path)] = content["global_step"]
        except Exception as error:
            found.unreadable += 1
            found.complaints.append(f"{path.name} is unreadable: {error}")
    done = [event for event in events if event.what == "done"][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = str(find_newest_good(str(path) for path in folder.glob("*.ckpt")))
    if steps.get(done.path, 0) < done.step:
        found.lost += 1
        found.complaints.append(f"{done.path} of step {done.step} was finished, and is lost")
    elif steps.get(newest, 0) < done.step:
        found.lost += 1
        found.complaints.append(f"step {done.step} was finished, and the newest good checkpoint is {newest}")
    return newest, steps[newest]


def resume_once(folder: Path, mix: str, io: type[TorchCheckpointIO], newest: str, step: int) -> None:
    """The next start of the run, from the newest good checkpoint, until it has saved again."""
    resumed = newest if MIXES[mix] else None  # the other holds no run
    step = step if MIXES[mix] else 0
    trainer = make_trainer(ModelCheckpoint(folder, every_n_train_steps=1, **MIXES[mix]), io(), step + 1)
    trainer.fit(Model(random.Random(0)), DataLoader(torch.zeros(STEPS, 1), batch_size=None), ckpt_path=resumed)
    if trainer.global_step != step + 1:
        raise RuntimeError(f"The run did not continue from step {step}, but is at {trainer.global_step}.")


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """The runs inside log and warn of nothing."""
    logging.getLogger("fulmen").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_trials(
    trials: list[int], seed: int = 0, io: type[TorchCheckpointIO] = TorchCheckpointIO
) -> dict[str, Findings]:
    """What these trials have found, by mix and file system, and in all."""
    found: dict[str, Findings] = {}
    with without_logs():
        torch.set_num_threads(1)  # a fork takes no threads along
        for number in trials:
            try:
                one = run_trial(seed, number, io)
            except RuntimeError as error:
                raise RuntimeError(f"Trial {number}: {error}") from error
            for key in (", ".join(draw_trial(seed, number)[:2]), "all"):
                found.setdefault(key, Findings()).add(one)
    return found


def print_findings(title: str, found: dict[str, Findings], seed: int) -> Findings:
    """Prints a table, and gives the sum."""
    columns = ("trials", "inside", "half", "unreadable", "lost", "orphans")
    header = ("mix, file system", "trials", "killed in a save", "half a temporary", "unreadable", "lost", "orphans")
    rows = [(key, *(str(getattr(one, name)) for name in columns)) for key, one in found.items() if key != "all"]
    every = found["all"]
    rows.append(("all", *(str(getattr(every, name)) for name in columns)))
    print_table(title, argparse.Namespace(name="fulmen", version=pl.__version__), header, rows)
    print(
        f"\n{every.trials} trials, seed {seed}: {every.unreadable} unreadable, {every.lost} lost, {every.orphans} orphans"
    )
    return every


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--trial", type=int, help="only this one, again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--naive", type=int, default=100, help="how many of the other writer: shows what trials can see"
    )
    given = parser.parse_args()
    numbers = list(range(given.trials)) if given.trial is None else [given.trial]
    every = print_findings("killed while saving", run_trials(numbers, given.seed), given.seed)
    for complaint in every.complaints:
        print(complaint)
    if every.bad or given.trial is not None or not given.naive:
        return int(every.bad > 0)
    naive = print_findings(
        "the same with torch.save(content, path)", run_trials(list(range(given.naive)), given.seed, NaiveIO), given.seed
    )
    return int(not naive.bad)


if __name__ == "__main__":
    sys.exit(main())
