"""A run whose checkpoints lie in a bucket is killed again and again, and the same command started: is anything lost?

The store is a server that speaks S3 (moto); it needs `pip install 'moto[server]' s3fs`.

python -m trials.bucket_kills              # 100 kills
python -m trials.bucket_kills --kills 5
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from benchmarks.harness import NOTHING_ON
from fulmen.callbacks import ModelCheckpoint
from fulmen.plugins import TorchCheckpointIO
from trials.kill import without_logs

WEIGHTS = 300_000  # numbers: files of 2.4 MB, with the momentum
BATCHES = 10  # of an epoch
EPOCHS = 10_000  # more than are reached
PATIENCE_S = 120.0


class Model(pl.LightningModule):
    """Takes a random step in a direction that depends on its weights, its batch and its random numbers."""

    def __init__(self, reports: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(WEIGHTS))
        self.reports = reports  # where to write how far it is

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        noise = torch.rand(8)
        time.sleep(0.002)
        return ((self.weight[:8] - batch[0].mean() * noise) ** 2).sum() + self.weight[8:].mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        say(self.reports, "step", self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ReportingIO(TorchCheckpointIO):
    """Says when a file is stored."""

    def __init__(self, reports: int | None) -> None:
        self.reports = reports

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        say(self.reports, "begin", checkpoint["global_step"])
        super().save_checkpoint(checkpoint, path, storage_options)
        say(self.reports, "done", checkpoint["global_step"])


def say(reports: int | None, what: str, step: int) -> None:
    if reports is not None:
        os.write(reports, f"{json.dumps([what, step])}\n".encode())


def train(folder: str, reports: int | None = None, epochs: int = EPOCHS) -> Model:
    """The command that a scheduler starts again and again."""
    pl.seed_everything(1)
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(BATCHES * 4, 3, generator=generator))
    saver = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=1, save_last=True)
    options = {**NOTHING_ON, "enable_checkpointing": True, "log_every_n_steps": 1000}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[saver], plugins=[ReportingIO(reports)], **options
    )
    model = Model(reports)
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True), ckpt_path="auto")
    return model


@contextlib.contextmanager
def bucket_server() -> Iterator[str]:
    """A server that speaks S3, with an empty bucket; gives the URL of a folder there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        run_apart("import fsspec; fsspec.filesystem('s3').mkdir('runs')")
        yield "s3://runs/trial"
    finally:
        server.terminate()
        server.wait()


def run_apart(code: str) -> str:
    """What a program prints; fsspec's thread for S3 does not survive a fork, so this process never starts it."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def start_and_kill(folder: str, chance: random.Random) -> list[tuple[str, int]]:
    """What one start of the command reported until it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            with without_logs():
                train(folder, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    kill_after = chance.randrange(1, 12)  # reports, of which about half are of saves
    delay_s = chance.random() * 0.03
    events: list[tuple[str, int]] = []
    with open(reading) as lines:
        for line in lines:
            what, step = json.loads(line)
            events.append((what, step))
            if len(events) == kill_after:
                time.sleep(delay_s)
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        raise RuntimeError(f"The command ended by itself: {status}. Its last report was {events[-1:]}.")
    return events


CHECK = """
import sys
import fsspec
from fulmen.plugins import TorchCheckpointIO
for path in fsspec.filesystem("s3").ls(sys.argv[1], detail=False) if fsspec.filesystem("s3").exists(sys.argv[1]) else []:
    TorchCheckpointIO().verify_checkpoint("s3://" + path)
    print(path)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork takes no threads along
    importlib.import_module("s3fs")  # once, for all forks
    chance = random.Random(given.seed)
    inside = lost = 0
    stored = 0  # the newest step that is known to be in the bucket
    with bucket_server() as folder, tempfile.TemporaryDirectory() as local:
        for number in range(given.kills):
            events = start_and_kill(folder, chance)
            first = next(step for what, step in events if what == "step")
            if first < stored:
                lost += 1
                print(f"start {number} began at step {first}, and step {stored} was stored", flush=True)
            inside += events[-1][0] == "begin"
            stored = max([stored, *(step for what, step in events if what == "done")])
        checked = subprocess.run([sys.executable, "-c", CHECK, folder], capture_output=True, text=True)
        epochs = stored // BATCHES + 2
        with without_logs():
            resumed = train(folder, epochs=epochs)
            straight = train(local, epochs=epochs)
    equal = torch.equal(resumed.weight, straight.weight)
    print(f"{given.kills} kills, {inside} of them in a save, up to step {stored}: {lost} lost something", flush=True)
    print(f"files in the bucket: {'all whole' if checked.returncode == 0 else checked.stderr[-500:]}", flush=True)
    print(
        f"final weights: {'those' if equal else 'NOT those'} of a run that was never stopped, bit for bit", flush=True
    )
    return int(lost > 0 or not equal or checked.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
