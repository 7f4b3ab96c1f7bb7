"""Runs in forked processes of which one ends wrongly where nobody waits for it: each is named, and all of them end."""

import os
import re
import signal
import socket
import sys
import threading
import time

import psutil
import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fulmen as pl
from fulmen.supervision.watchdog import Watchdog

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """Seconds; what hangs here would do so for 1,000."""
    monkeypatch.setenv("FULMEN_WATCHDOG_TIMEOUT_S", "3")


def fail(how):
    if how == "asleep":
        time.sleep(1000)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "os._exit(0)":
        os._exit(0)
    if how == "sys.exit(0)":
        sys.exit(0)


class Fails(pl.Callback):
    """On one rank, in one hook."""

    def __init__(self, hook, how, rank):
        def failing(trainer, *_):
            if trainer.global_rank == rank:
                fail(how)

        setattr(self, hook, failing)


def run(*callbacks, **data):
    trainer = make_trainer(devices=2, strategy="ddp_fork", max_epochs=1, callbacks=list(callbacks))
    trainer.fit(Regression(), data.get("train", make_loader()))


@pytest.mark.parametrize(("hook", "rank"), [("teardown", 0), ("on_train_end", 1), ("setup", 1)])
def test_a_rank_that_sleeps_outside_of_the_batches_is_named_and_ended(hook, rank):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"Rank {rank} stands still .*test_supervision.py:\d+ in fail: `time.sleep"):
        run(Fails(hook, "asleep", rank))
    assert time.monotonic() - began < 500


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_at_the_end_is_named_by_the_other_and_ended(rank, capfd):
    with pytest.raises(RuntimeError, match=f"local rank {rank} was ended by SIGKILL"):
        run(Fails("on_fit_end", "stopped", rank))
    # Whoever looks first: the other rank, or the process that made the call.
    said = rf"Rank {rank} (says nothing, for \d+ s so far|has done nothing for \d+ s): its process \d+ is stopped"
    assert re.search(said, capfd.readouterr().err)


@pytest.mark.parametrize(("hook", "rank"), [("teardown", 1), ("on_train_batch_end", 0)])
def test_a_rank_that_exits_with_0_from_within_the_run_has_failed(hook, rank):
    with pytest.raises(RuntimeError, match=f"local rank {rank} ended with exit code 0 without an exception"):
        run(Fails(hook, "os._exit(0)", rank))


@pytest.mark.parametrize(("hook", "rank"), [("on_train_batch_end", 1), ("teardown", 0)])
def test_sys_exit_with_0_on_one_rank_is_a_failure_of_the_run(hook, rank, capfd):
    with pytest.raises(SystemExit) as ended:
        run(Fails(hook, "sys.exit(0)", rank))
    assert ended.value.code == 1
    assert re.search(
        rf"Rank {rank} failed at test_supervision.py:\d+ in fail .*: SystemExit: 0", capfd.readouterr().err
    )


class Sleepy(Dataset):
    """Its worker on rank 1 ends wrongly at sample 5, and leaves its process id."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 5 and get_worker_info() is not None:
            with open("worker", "w") as file:
                file.write(str(os.getpid()))
            fail(self.how)
        return torch.full((4,), float(index)), torch.ones(1)


@pytest.mark.parametrize(
    ("how", "what"), [("asleep", r"is in test_supervision.py:\d+ in fail"), ("stopped", "is stopped")]
)
def test_a_worker_of_a_loader_that_hangs_is_named_with_its_process_and_what_it_runs(how, what, tmp_path):
    with pytest.raises(RuntimeError) as raised:
        run(train=DataLoader(Sleepy(how), 2, num_workers=1))
    pid = (tmp_path / "worker").read_text()
    said = (
        rf"Rank 1 stands still .*worker 0 of the DataLoader, process {pid}, which reads `Sleepy` \(.*:\d+\) and {what}"
    )
    assert re.search(said, str(raised.value))
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_worker_of_a_loader_that_leaves_is_named_with_its_process(tmp_path, capfd):
    with pytest.raises((RuntimeError, OSError, EOFError)):  # what a queue says whose other end is gone
        run(train=DataLoader(Sleepy("sys.exit(0)"), 2, num_workers=1))
    pid = (tmp_path / "worker").read_text()
    said = rf"Rank 1 failed at .* \(worker 0 of the DataLoader, process {pid}, ended with exit code 0\)"
    assert re.search(said, capfd.readouterr().err)


def test_a_rank_that_sleeps_in_prepare_data_is_named_and_ended():
    class Prepares(Regression):
        def prepare_data(self):
            fail("asleep")

    with pytest.raises(RuntimeError, match="Rank 0 stands still .* in fail"):
        make_trainer(devices=2, strategy="ddp_fork").fit(Prepares(), make_loader())


class SleepsWhenTold(pl.Callback):
    """Where the ranks are, not where the call was made."""

    def __init__(self):
        self.home = os.getpid()

    def on_exception(self, *_):
        if os.getpid() != self.home:
            time.sleep(1000)


def test_ranks_that_sleep_in_on_exception_are_ended(capfd):
    class Breaks(Regression):
        def training_step(self, batch, batch_idx):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=SleepsWhenTold())
        trainer.fit(Breaks(), make_loader())
    said = capfd.readouterr().err
    assert "does not end: it is in test_supervision.py" in said


class Disturbs(pl.Callback):
    """The watchdog of rank 0, as a stranger could and as nobody should be able to."""

    def on_train_start(self, trainer, *_):
        if trainer.global_rank == 0:
            channel = trainer.strategy.watchdog.channel
            with socket.create_connection(channel.listener.getsockname()) as stranger:
                stranger.sendall(b"[" * 200 + b"\n")
                stranger.sendall(b"[" * 100_000)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                channel.values["heartbeat/1"] = "not what a rank says"
                time.sleep(0.001)


def test_a_watchdog_that_fails_says_so_and_continues(capfd):
    with pytest.raises(RuntimeError, match="Rank 1 stands still"):
        run(Disturbs(), Fails("on_train_epoch_end", "asleep", 1))
    said = capfd.readouterr().err
    assert "The watchdog of rank 0 failed, and continues:" in said and "AttributeError" in said


def test_a_program_that_a_hook_waits_for_is_not_sleep():
    """A download by `os.system` uses next to no processor time."""

    class Downloads(pl.Callback):
        def setup(self, trainer, *_):
            if trainer.global_rank == 1:
                os.system("sleep 5")

    run(Downloads())


def test_a_rank_that_is_done_is_not_taken_for_one_that_is_gone(monkeypatch):
    """However slowly its main thread says that it is done."""
    send_heartbeat = Watchdog.send_heartbeat

    def slow(watchdog, done=False):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.5)
        send_heartbeat(watchdog, done)

    monkeypatch.setattr(Watchdog, "send_heartbeat", slow)
    for _ in range(3):
        run()
