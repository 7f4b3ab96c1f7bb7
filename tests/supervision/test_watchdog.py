"""Real scripts on two processes, one of which fails: who is named, what is printed, what is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from ranks import run_ranks
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.supervision.heartbeat import StatusChannel
from fulmen.supervision.messages import FailureKind, ThreadState, Verdict
from fulmen.supervision.stack_sampler import ThreadProbe, strip_library_frames
from fulmen.supervision.watchdog import limit_seconds
from fulmen.utilities.errors import MisconfigurationException

ROOT = Path(__file__).parents[2]
LIMIT = 3  # seconds
SOON = 200  # seconds; the machine that runs this may be busy, and what hangs here would do so for 1,000
SCRIPT = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
import fulmen as pl

strategy, failure, culprit = sys.argv[1], sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it


def fail(what):
    if what == "raises":
        raise ValueError("on purpose")  # the failing line
    if what == "asleep":
        time.sleep(1000)  # the failing line
    if what == "busy":
        end = time.process_time() + 4
        while time.process_time() < end:
            sum(range(1000))
    if what in ("killed", "stopped"):
        os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGSTOP)


class Data(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if failure == "no data" and index > 28 and int(os.environ["LOCAL_RANK"]) == culprit:
            raise ValueError("no such sample")  # the failing line
        return torch.full((4,), index / 100)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if failure == "slow":
            time.sleep(0.1)
        if self.trainer.global_step == 3 and self.global_rank == culprit:
            fail(failure)
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Told(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            open(f"running-{trainer.global_rank}", "w").write(str(os.getpid()))

    def on_exception(self, trainer, module, exception):
        open(f"told-{trainer.global_rank}", "a").write(f"{type(exception).__name__}: {exception}")


if __name__ == "__main__":
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1 if failure == "busy" else 1000,
        callbacks=[Told(), pl.callbacks.ModelCheckpoint(".", filename="last", every_n_train_steps=1)],
        logger=pl.loggers.CSVLogger("logs", flush_logs_every_n_steps=1000), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(Data(80), batch_size=4, num_workers=int(failure == "no data")))
"""


@dataclass
class Run:
    """What is left of one."""

    code: int
    seconds: float  # from the failure, or from the signal, until no process is left
    output: str
    folder: Path

    def told(self, rank: int) -> str:
        return (self.folder / f"told-{rank}").read_text()

    @property
    def report(self) -> list[str]:
        """The output from where the failure is named; a rank that was slow to start may have been reported before."""
        lines = self.output.splitlines()
        failure = re.compile(r"Rank \d (?!keeps others waiting)")
        return lines[next((i for i, line in enumerate(lines) if failure.match(line)), len(lines)) :]


@pytest.fixture
def run(tmp_path):
    """Runs the script to its end; `send` is a signal for the first or for all processes once they train."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(strategy: str, failure: str, culprit: int = 1, send: int = 0, to_all: bool = False, limit: float = LIMIT):
        command = [sys.executable]
        if strategy == "torchrun":
            command += ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["script.py", "ddp" if strategy == "torchrun" else strategy, failure, str(culprit)]
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "MASTER_"))}
        more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        more["FULMEN_WATCHDOG_TIMEOUT_S"] = str(limit)
        with open(tmp_path / "output", "w") as file:
            process = subprocess.Popen(
                command, cwd=tmp_path, env={**keep, **more}, stdout=file, stderr=file, start_new_session=True
            )
            try:
                began = wait_until_running(tmp_path, process)
                family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
                if send:
                    time.sleep(1)
                    began = time.monotonic()
                    os.killpg(process.pid, send) if to_all else process.send_signal(send)
                code = process.wait(timeout=1200)
                while any(map(alive, family)) and time.monotonic() < began + 600:
                    time.sleep(0.05)
                assert not any(map(alive, family)), (tmp_path / "output").read_text()
                seconds = time.monotonic() - began
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
        return Run(code, seconds, (tmp_path / "output").read_text(), tmp_path)

    return start


def wait_until_running(folder: Path, process: subprocess.Popen) -> float:
    deadline = time.monotonic() + 600
    while not all((folder / f"running-{rank}").exists() for rank in range(2)):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.02)
    return time.monotonic()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


IN_BACKWARD = "waits in the backward pass, where gradients are exchanged"


def test_a_rank_that_raises_is_named_first_and_only_its_traceback_is_printed(run) -> None:
    result = run("ddp", "raises")
    assert result.code == 1
    assert result.seconds < SOON
    line = next(i for i, line in enumerate(SCRIPT.splitlines(), 1) if "on purpose" in line)
    first, second, *rest = result.report
    assert first.startswith(
        f"Rank 1 failed at script.py:{line} in fail (train, epoch 0, batch 3): ValueError: on purpose"
    )
    assert second.startswith(f"Rank 0: {IN_BACKWARD}")
    shown = next(i for i, line in enumerate(result.report, 1) if "# the failing line" in line)
    assert shown <= 15, result.output
    assert result.output.count("Traceback (most recent call last)") == 1
    assert "torch/" not in "\n".join(rest)
    assert rest[-1] == "Rank 0 ends because of rank 1."
    # Both heard of it, and nothing that was there is lost.
    assert result.told(1) == "ValueError: on purpose"
    assert result.told(0).startswith("RuntimeError: Rank 1 failed at script.py")
    rows = (result.folder / "logs/lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3
    assert torch.load(result.folder / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_rank_that_sleeps_while_others_wait_is_named_with_its_stack(run) -> None:
    result = run("ddp", "asleep")
    assert result.code == 1
    assert LIMIT * 0.6 < result.seconds < SOON
    first, second = result.report[:2]
    assert re.match(r"Rank 1 stands still \(for \d+ s so far, .*\): script.py:\d+ in fail: `time.sleep\(1000\)", first)
    assert second.startswith(f"Rank 0: {IN_BACKWARD}")
    assert any(line.strip().startswith("time.sleep(1000)") for line in result.report[2:15])
    assert result.told(0).startswith("RuntimeError: Rank 1 stands still")
    assert result.told(1).startswith("RuntimeError: Rank 1 stands still")


def test_a_rank_that_computes_for_longer_is_reported_but_not_ended(run) -> None:
    result = run("ddp", "busy", limit=2)
    assert result.code == 0
    assert re.search(
        r"^Rank 1 keeps others waiting \(0\), for \d+ s so far: script.py:\d+ in fail", result.output, re.M
    )


@pytest.mark.parametrize("strategy, culprit", [("ddp", 0), ("ddp_spawn", 1)])
def test_a_rank_that_is_killed_is_named_by_another(run, strategy, culprit) -> None:
    result = run(strategy, "killed", culprit)
    assert result.code != 0
    assert result.seconds < SOON
    assert re.match(rf"Rank {culprit} is gone: its process", result.report[0]), result.output
    assert f"Rank {1 - culprit}: {IN_BACKWARD}" in "\n".join(result.report[:3])
    assert result.told(1 - culprit).startswith(f"RuntimeError: Rank {culprit} is gone")


def test_a_rank_that_is_stopped_is_named_and_ended(run) -> None:
    result = run("ddp", "stopped")
    assert result.code == 1
    assert result.seconds < SOON
    assert re.match(r"Rank 1 says nothing, for \d+ s so far: its process \d+ is stopped", result.report[0])


def test_a_loader_that_fails_on_one_rank_is_named_by_the_line_of_the_dataset(run) -> None:
    result = run("torchrun", "no data")
    assert result.code == 1
    assert re.match(r"Rank 1 failed at script.py:\d+ in __getitem__ .*: ValueError", result.report[0])
    assert any("# the failing line" in line for line in result.report[:15])
    assert result.told(0).startswith("RuntimeError: Rank 1 failed")


@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_ends_all_processes(run, number, to_all) -> None:
    result = run("ddp", "slow", send=number, to_all=to_all)
    assert result.code == 128 + number
    assert result.seconds < SOON
    assert "Traceback" not in result.output
    assert (result.folder / "told-0").exists()
    assert (result.folder / "told-1").exists()


def test_a_signal_ends_processes_that_hang(run) -> None:
    result = run("ddp", "asleep", send=signal.SIGTERM, limit=100)
    assert result.code == 143
    assert "its step did not end within 7 s, so that no checkpoint is saved now: it is in" in result.output
    assert result.seconds < SOON
    assert (result.folder / "told-0").exists()


def two_trainers() -> list[int]:
    ports = []
    for _ in range(2):
        trainer = make_trainer(devices=2, strategy="ddp", max_steps=1, callbacks=PortSeen(ports))
        if trainer.global_rank == 0:
            time.sleep(0.5)  # the other is first at the second run
        trainer.fit(Regression(), make_loader())
    return ports


class PortSeen(pl.Callback):
    """Notes where this process looks for the watchdog of rank 0."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports

    def on_train_start(self, trainer, pl_module) -> None:
        channel = trainer.strategy.watchdog.channel
        socket = channel.listener or next(iter(channel.peers))
        self.ports.append((socket.getsockname() if channel.listener else socket.getpeername())[1])


def test_a_second_trainer_of_a_script_has_a_watchdog_of_its_own() -> None:
    rank_0, rank_1 = run_ranks(2, two_trainers)
    assert rank_0 == rank_1 and len(set(rank_0)) == 2


def test_the_limit_must_be_a_number(monkeypatch) -> None:
    assert limit_seconds() == 30
    monkeypatch.setenv("FULMEN_WATCHDOG_TIMEOUT_S", "5")
    assert limit_seconds() == 5
    assert limit_seconds(7) == 7
    monkeypatch.setenv("FULMEN_WATCHDOG_TIMEOUT_S", "soon")
    with pytest.raises(MisconfigurationException, match="FULMEN_WATCHDOG_TIMEOUT_S='soon'"):
        limit_seconds()


def test_the_first_verdict_that_is_published_counts_for_all() -> None:
    store = torch.distributed.HashStore()
    channels = [StatusChannel(rank, store, "127.0.0.1") for rank in range(3)]
    verdicts = [Verdict(rank, FailureKind.GONE, "is gone") for rank in range(3)]

    def exchange_all() -> None:
        for _ in range(20):
            for channel in channels:
                channel.poll_connections(0.001)

    exchange_all()
    channels[2].publish_value("verdict", verdicts[2])
    exchange_all()
    channels[1].publish_value("verdict", verdicts[1])
    channels[0].publish_value("verdict", verdicts[0])
    exchange_all()
    assert [channel.verdict for channel in channels] == [verdicts[2]] * 3
    channels[1].close()
    exchange_all()
    assert channels[0].gone == {1}
    for channel in channels:
        channel.close()


def test_what_a_thread_does_is_told_from_its_stack() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    probe = ThreadProbe(thread, patience_s=10)
    probe.sample()
    time.sleep(0.3)
    activity = probe.sample()
    release.set()
    thread.join()
    assert activity.unchanged_s > 0.2
    assert "in wait" in activity.location
    assert activity.state is not ThreadState.WAITING


def test_tracebacks_keep_the_frames_of_the_user(monkeypatch) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        torch.nn.Sequential(Dividing())(1)
    import traceback

    text = "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    assert "torch/nn" in text.replace(os.sep, "/")
    assert "torch/nn" not in strip_library_frames(text).replace(os.sep, "/")
    assert "x / 0" in strip_library_frames(text)
    monkeypatch.setenv("FULMEN_FULL_TRACEBACK", "1")
    assert strip_library_frames(text) == text


class Dividing(torch.nn.Module):
    def forward(self, x):
        return x / 0
