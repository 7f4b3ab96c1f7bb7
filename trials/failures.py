"""One rank of two fails, in every way there is: is it named first, and has everything ended in time?

python -m trials.failures                      # the limit of 30 s that is the default
python -m trials.failures --limit 6 --trials 1
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FAILING = "# the failing line"
SCRIPT = f"""
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
import {{package}} as pl

failure, culprit = sys.argv[1], int(sys.argv[2])


class Data(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        if failure == "no data" and index > 100 and int(os.environ.get("LOCAL_RANK", 0)) == culprit:
            raise ValueError("no such sample")  {FAILING}
        return torch.ones(4)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 5 and self.global_rank == culprit:
            open("failed", "w").close()
            if failure == "raises":
                raise ValueError("on purpose")  {FAILING}
            if failure == "asleep":
                time.sleep(10_000)  {FAILING}
            if failure == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
                         enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(Model(), DataLoader(Data(), batch_size=4, num_workers=int(failure == "no data")))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="fulmen")
    parser.add_argument("--limit", type=float, default=30, help="seconds, from the failure until nothing runs any more")
    parser.add_argument("--trials", type=int, default=5, help="of each kind; the failing rank alternates")
    parser.add_argument("--give-up", type=float, default=600, help="seconds after which a trial is ended from outside")
    arguments = parser.parse_args()
    good = 0
    total = 0
    most_lines = 0
    for failure in ("asleep", "killed", "raises", "no data"):
        for trial in range(arguments.trials):
            culprit = 1 - trial % 2
            total += 1
            ended = run_trial(failure, culprit, arguments)
            lines = ended.output.splitlines()
            start = next((i for i, line in enumerate(lines) if re.search(r"\[?rank: ?\d|Rank \d|Traceback", line)), 0)
            named = bool(re.match(rf"Rank {culprit} (failed|is gone|stands still|says)", (lines[start:] or [""])[0]))
            shown = next((i for i, line in enumerate(lines[start:], 1) if FAILING in line), 0)
            good += ended.code != 0 and named and ended.seconds <= arguments.limit
            most_lines = max(most_lines, shown)
            print(
                f"{failure:8} rank {culprit}: exit code {ended.code}, ended after {ended.seconds:5.1f} s, "
                f"{'named first' if named else 'NOT named first'}, failing line in line {shown or '-'} of the report",
                flush=True,
            )
    print(f"{'rank asleep / killed / raising / out of data':60} {good} of {total}")
    print(f"{'lines to the failing line, at most':60} {most_lines}")
    return int(good < total)


class Ended(NamedTuple):
    """One trial."""

    code: int | None
    seconds: float  # from the failure until no process is left
    output: str


def run_trial(failure: str, culprit: int, arguments: argparse.Namespace) -> Ended:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.py").write_text(SCRIPT.format(package=arguments.package))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        more = {"PYTHONPATH": path, "FULMEN_WATCHDOG_TIMEOUT_S": str(arguments.limit), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "script.py", failure, str(culprit)]
        with open(folder / "output", "w") as file:
            process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **more}, stdout=file, stderr=file, start_new_session=True
            )
            # Where data fails there is no moment that can be seen: it is a few batches after this one.
            while process.poll() is None and not (folder / "failed").exists():
                time.sleep(0.02)
            began = time.monotonic()
            while group_exists(process) and time.monotonic() < began + arguments.give_up:
                time.sleep(0.05)
            seconds = time.monotonic() - began
            code = process.poll()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(code, seconds, (folder / "output").read_text())


def group_exists(process: subprocess.Popen) -> bool:
    """Does any process of the session run?"""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
