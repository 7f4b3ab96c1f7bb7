"""SIGTERM at a random moment: does the run end as told, with everything saved, and does the next one end in the same bits?

python -m trials.preempt                # 100 trials, on one process and on two
python -m trials.preempt --trial 17     # that one again
python -m trials.preempt --data same    # without what depends on the order of samples
"""

from __future__ import annotations

import argparse
import atexit
import collections
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.callbacks import ModelCheckpoint
from fulmen.engine.cluster import free_port

DATA = "shuffled"  # what trials use: different samples that are shuffled, or the "same" ones
GIVE_UP_SECONDS = 60
LAUNCHER_SECONDS = 5  # after one has ended, launchers end the others; no run is there to do it before they have met


@dataclass(frozen=True)
class Run:
    """A command line."""

    ranks: int
    accumulate: int
    data: str
    epochs: int = 3


class Model(pl.LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        # With one seed for all processes, what they draw would have to be stored for each.
        drop = nn.Dropout(0.2) if run.ranks == 1 or run.data != "same" else nn.Identity()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), drop, nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(0.002)
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        time.sleep(0.002)
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)]


class Tells(pl.Callback):
    """Leaves behind where the run was when it ended, and what came out of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        (self.folder / f"met-{trainer.global_rank}").touch()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"trains-{trainer.global_rank}").touch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if trainer.is_global_zero:
            stage = getattr(trainer.state.stage, "value", None)
            (self.folder / "stopped").write_text(json.dumps([trainer.global_step, stage, trainer.signals.saved]))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            (self.folder / "sha").write_text(sha256([pl_module.state_dict(), trainer.optimizers[0].state_dict()]))


def sha256(value: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def fit(run: Run, folder: Path) -> None:
    """What the script of a user does."""
    pl.seed_everything(1)
    # Validation in the middle of epochs; batches of 4 for each process.
    count = 40 * run.ranks
    x = torch.ones(count, 8) if run.data == "same" else torch.randn(count, 8)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    trainer = pl.Trainer(
        accelerator="cpu", devices=run.ranks, strategy="ddp" if run.ranks > 1 else "auto", max_epochs=run.epochs,
        accumulate_grad_batches=run.accumulate, val_check_interval=5, limit_val_batches=5, num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Tells(folder), ModelCheckpoint(folder / "checkpoints", every_n_train_steps=4)],
    )  # fmt: skip
    loaders = [DataLoader(data, 4, shuffle=run.data != "same" and train) for train in (True, False)]
    trainer.fit(Model(run), *loaders, ckpt_path="auto")


# ---------------------------------------------------------------------- processes


def start(run: Run, folder: Path) -> list[int]:
    """Forks the processes of a run: torch is imported already."""
    port = free_port() if run.ranks > 1 else 0
    sys.stdout.flush()
    children = []
    for rank in range(run.ranks):
        if not (child := os.fork()):
            if run.ranks > 1:
                places = {"LOCAL_RANK": rank, "WORLD_SIZE": run.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in places.items()})
            output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                fit(run, folder)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int]) -> list[int]:
    """The exit codes as a shell shows them; 137 for what had to be killed."""
    codes: dict[int, int] = {}
    deadline, told = time.monotonic() + GIVE_UP_SECONDS, float("inf")
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(found[1])
                codes[child] = code if code >= 0 else 128 - code
                told = min(told, time.monotonic() + LAUNCHER_SECONDS)
            elif child not in codes and time.monotonic() > min(told, deadline):
                os.kill(child, signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM)
                told = float("inf")
        time.sleep(0.001)
    return [codes[child] for child in children]


@cache
def unstopped(run: Run) -> tuple[str, float, float]:
    """What comes out of a run that nobody stops, and how long it sets up and trains."""
    folder = Path(tempfile.mkdtemp())
    begun = time.time()
    codes = ended(start(run, folder))
    if any(codes):
        raise RuntimeError(outputs(folder))
    sha, times = (folder / "sha").read_text(), [(folder / name).stat().st_mtime for name in ("trains-0", "sha")]
    shutil.rmtree(folder)
    return sha, times[0] - begun, times[1] - times[0]


def outputs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("output-*")))


# ---------------------------------------------------------------------- a trial


def trial(number: int, data: str) -> tuple[str, str, float]:
    """(where the run was, what went wrong, seconds from the signal to the end)"""
    draw = random.Random(number)
    run = Run(ranks=1 + number % 2, accumulate=1 + number // 2 % 2, data=data)
    sha, setup, training = unstopped(run)
    folder, begun = Path(tempfile.mkdtemp()), time.monotonic()
    children = start(run, folder)
    early, fraction = draw.random() < 0.15, draw.random()
    # A scheduler tells all processes, or those of one machine; before they have met, nobody could hear of it from another.
    told = children if draw.random() < 0.6 else draw.sample(children, 1)
    first = [f"met-{rank}" for rank in range(run.ranks)] if early and told != children else ["trains-0"] * (not early)
    while not all((folder / name).exists() for name in first) and time.monotonic() < begun + GIVE_UP_SECONDS:
        time.sleep(0.001)
    time.sleep(fraction * ((setup if told == children else 0.05) if early else 1.1 * training))
    sent = time.monotonic()
    for child in told:
        os.kill(child, signal.SIGTERM)
    codes = ended(children)
    took = time.monotonic() - sent
    where, problem = judge(run, folder, codes)
    if not problem and (codes := ended(start(run, folder))) != [0] * run.ranks:
        problem = f"the run that goes on ended with {codes}"
    if not problem and (found := (folder / "sha").read_text()) != sha:
        problem = f"other bits: {found[:12]} instead of {sha[:12]}"
    if problem:
        print(f"\ntrial {number}: {run}\n{outputs(folder)}", file=sys.stderr)
    shutil.rmtree(folder)
    return f"{where}, {run.ranks} rank{'s' * (run.ranks > 1)}", problem, took


def judge(run: Run, folder: Path, codes: list[int]) -> tuple[str, str]:
    """Where it was, and what is wrong with how it ended."""
    stopped, last = folder / "stopped", folder / "checkpoints" / "preempted.ckpt"
    if (folder / "sha").exists():
        (folder / "sha").unlink()
        return "over", "" if set(codes) <= {0, 143} else f"ended with {codes}"
    if set(codes) != {143}:
        return "?", f"ended with {codes}"
    if not stopped.exists():
        return "before the run", "a checkpoint without a run" if last.exists() else ""
    steps, stage, saved = json.loads(stopped.read_text())
    if stage == "sanity_check" or not steps:
        return "before the first step", "a checkpoint without a step" if last.exists() else ""
    if not last.exists() or saved != str(last):
        return stage, f"nothing was saved after {steps} steps"
    content = torch.load(last, weights_only=True)
    progress = content["fulmen"]["progress"]
    whole = progress["batch"] % run.accumulate == 0 or progress["is_last_batch"]
    if content["global_step"] != steps or not whole or progress["position"] == "IN_BATCH":
        return stage, f"saved {content['global_step']} of {steps} steps, at {progress}"
    return stage, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--trial", type=int, help="only this one")
    parser.add_argument("--data", choices=("same", "shuffled"), default=DATA)
    parser.add_argument("--quick", action="store_true", help="10 trials")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("numpy.random", "torch._dynamo", "fulmen.trainer", "fulmen.engine.ddp"):  # what each run would import
        importlib.import_module(name)
    numbers = range(10 if arguments.quick else arguments.trials) if arguments.trial is None else [arguments.trial]
    places: collections.Counter[str] = collections.Counter()
    failed, slowest, begun = [], 0.0, time.monotonic()
    for number in numbers:
        where, problem, took = trial(number, arguments.data)
        places[where] += 1
        slowest = max(slowest, took)
        if problem:
            failed.append(number)
            print(f"trial {number} ({where}): {problem}", flush=True)
    for where, count in sorted(places.items()):
        print(f"{'SIGTERM ' + where:60} {count}")
    print(f"{'slowest end, s':60} {slowest:.2f}")
    print(f"{'a trial, s':60} {(time.monotonic() - begun) / len(numbers):.2f}")
    total = len(numbers)
    print(f"{f'ended with 143, saved at a step, same bits ({arguments.data})':60} {total - len(failed)} of {total}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
