"""One rank of two ends wrongly, in every hook and in workers of the loader: is it named, and has all ended in time?

python -m trials.endings                        # all of them, four at a time
python -m trials.endings --jobs 1 --only on_fit_end
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 6.0  # seconds, of the watchdog
FAULTS = ("raises", "killed", "stopped", "asleep", "os._exit(0)", "sys.exit(0)")
HOOKS = (
    "setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start",
    "on_train_batch_start", "training_step", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end", "on_validation_start", "validation_step", "on_validation_epoch_end", "on_save_checkpoint",
    "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown",
)  # fmt: skip
STRATEGIES = ("ddp_fork", "ddp", "fsdp", "ddp_spawn")
SCRIPT = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
import fulmen as pl
from fulmen.strategies import FSDPStrategy

strategy, hook, fault, culprit, descriptors = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])


def fail():
    with open("failed.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename("failed.new", "failed")
    if fault == "raises":
        raise ValueError("on purpose")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "asleep":
        time.sleep(10_000)
    if fault == "os._exit(0)":
        os._exit(0)
    if fault == "sys.exit(0)":
        sys.exit(0)


class Data(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 12 + culprit and get_worker_info() is not None:
            fail()
        return torch.full((4,), index / 40)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.calls = torch.nn.Linear(4, 2), 0

    def passes(self, name):
        if name == hook and self.trainer.global_rank == culprit:
            self.calls += 1
            if self.calls == (3 if "batch" in name or name == "training_step" else 1):
                fail()

    def training_step(self, batch, batch_idx):
        self.passes("training_step")
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.passes("validation_step")
        self.log("val", self.net(batch).mean())

    def configure_optimizers(self):
        self.passes("configure_optimizers")
        return torch.optim.Adam(self.parameters(), 0.01)


def passing(name):
    return lambda self, *args, **kwargs: self.passes(name) or []


if hook not in (*vars(Model), "worker", "state_dict"):
    setattr(Model, hook, passing(hook))


class Keeps(pl.Callback):
    def state_dict(self):
        if hook == "state_dict":
            self.model.passes("state_dict")
        return {"a": 1}

    def setup(self, trainer, pl_module, stage):
        self.model = pl_module


if __name__ == "__main__":
    if descriptors:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(descriptors)]
    torch.set_num_threads(1)
    chosen = FSDPStrategy(start_method="fork", state_dict_type="sharded") if strategy == "fsdp" else strategy
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=chosen, logger=False, max_epochs=2, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[Keeps(), pl.callbacks.ModelCheckpoint("checkpoints", every_n_train_steps=2, save_top_k=-1)],
    )
    trainer.fit(Model(), DataLoader(Data(), 4, num_workers=int(hook == "worker")), DataLoader(torch.ones(8, 4), 4))
"""


@dataclass(frozen=True)
class Case:
    """What goes wrong where."""

    strategy: str
    hook: str
    fault: str
    culprit: int
    descriptors: int = 0

    def __str__(self) -> str:
        many = f", {self.descriptors} descriptors" if self.descriptors else ""
        return f"{self.strategy:9} rank {self.culprit} {self.fault} in {self.hook}{many}"


def all_cases() -> Iterator[Case]:
    """Every fault in every hook, the strategies and ranks in turn; in workers, and with many descriptors, each of them."""
    for number, hook in enumerate(HOOKS):
        for other, fault in enumerate(FAULTS):
            strategy = STRATEGIES[(number + other) % 4]
            yield Case(strategy, hook, fault, choose_culprit(strategy, fault, (number + other // 2) % 2))
    for strategy in STRATEGIES:
        for number, fault in enumerate(FAULTS):
            yield Case(strategy, "worker", fault, number % 2)
        for number, fault in enumerate(FAULTS):
            yield Case(strategy, "training_step", fault, choose_culprit(strategy, fault, number % 2), 1100)
    for strategy in STRATEGIES:  # before the processes have met
        for fault in ("killed", "os._exit(0)", "sys.exit(0)"):
            yield Case(strategy, "configure_callbacks", fault, 1)
    yield Case("ddp_fork", "prepare_data", "asleep", 0)
    yield Case("ddp_fork", "state_dict", "asleep", 1)


def choose_culprit(strategy: str, fault: str, rank: int) -> int:
    """The first process of a script is the one whose exit code counts: nobody can change what it passes to `os._exit`."""
    return 1 if strategy == "ddp" and fault == "os._exit(0)" else rank


class Outcome(NamedTuple):
    """Of one case."""

    problems: list[str]  # what was not as it must be
    output: str


def run_case(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        (folder / "script.py").write_text(SCRIPT)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        more = {"PYTHONPATH": path, "FULMEN_WATCHDOG_TIMEOUT_S": str(LIMIT), "TMPDIR": str(folder / "tmp")}
        more |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        arguments = [case.strategy, case.hook, case.fault, str(case.culprit), str(case.descriptors)]
        with open(folder / "output", "w") as file:
            process = subprocess.Popen(
                [sys.executable, "script.py", *arguments], cwd=folder, env={**os.environ, **more},
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
            try:
                problems = list(find_problems(case, process, folder))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Outcome(problems, (folder / "output").read_text())


def find_problems(case: Case, process: subprocess.Popen, folder: Path) -> Iterator[str]:
    """Waits until all has ended, and says what was not as it must be."""
    latest = time.monotonic() + 180
    while process.poll() is None and not (folder / "failed").exists() and time.monotonic() < latest:
        time.sleep(0.02)
    if not (folder / "failed").exists():
        yield "nothing failed"
    # What the watchdog is given, twice, and what a launcher waits for processes that were told to end.
    allowed = 2 * LIMIT + 14
    began = time.monotonic()
    while (left := running_in_session(process.pid)) and time.monotonic() < began + allowed + 20:
        process.poll()
        time.sleep(0.05)
    seconds = time.monotonic() - began
    if left:
        yield f"left running: {left}"
    elif seconds > allowed:
        yield f"late, after {seconds:.0f} s"
    if process.poll() == 0:
        yield "exit code 0"
    output = (folder / "output").read_text()
    if not re.search(rf"[Rr]ank {case.culprit}\b", output):
        yield "rank not named"
    if case.hook == "worker" and case.fault != "raises" and (folder / "failed").read_text() not in output:
        yield "worker's process not named"
    if files := glob.glob(f"{folder}/tmp/fulmen-*") + glob.glob(f"{folder}/checkpoints/.*"):
        yield f"left files: {files}"


def running_in_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            fields = file.read().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(path.split("/")[2]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="trials at a time; they wait for most of theirs")
    parser.add_argument("--only", default="", help="those whose line contains this text")
    arguments = parser.parse_args()
    chosen = [case for case in all_cases() if arguments.only in str(case)]
    good = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for case, outcome in zip(chosen, pool.map(run_case, chosen)):
            good += not outcome.problems
            if outcome.problems:
                print(
                    f"{case}: {'; '.join(outcome.problems)}\n    {outcome.output[-1500:]}".replace("\n", "\n    "),
                    flush=True,
                )
    print(f"{'a rank ends wrongly: named, all ended in time, not with 0':60} {good} of {len(chosen)}")
    return int(good < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
