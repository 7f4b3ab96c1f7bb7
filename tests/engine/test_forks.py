"""Forked processes after threads have run in the one that forks: which of them work, and what is said of the others."""

import contextlib
import gc
import os
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from support import Regression, make_loader, make_trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


def train(**kwargs):
    trainer = make_trainer(devices=2, strategy="ddp_fork", max_steps=2, **kwargs)
    trainer.fit(Regression(), make_loader())
    assert trainer.global_step == 2


@pytest.fixture
def threads():
    """So many as would run on a machine with that many processors."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_forked_processes_train_after_a_backward_pass_with_several_threads(threads):
    threads(4)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 1))
    net(torch.randn(64, 3, 16, 16)).square().mean().backward()
    torch.randn(300, 300) @ torch.randn(300, 300)
    train()


def test_forked_processes_leave_alone_what_the_other_process_did_not_collect():
    """A group whose threads are in the other process would be joined by whoever collects it."""

    class Cycle: ...

    gc.collect()
    gc.disable()
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        cycle = Cycle()
        cycle.itself, cycle.group = cycle, dist.group.WORLD
        dist.all_reduce(torch.ones(2))
        del cycle
        dist.destroy_process_group()
        train()
    finally:
        gc.enable()
        gc.collect()


@contextlib.contextmanager
def computing():
    """Inside, another thread does so."""
    over = threading.Event()

    def work():
        while not over.is_set():
            torch.randn(200, 200).sin_()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_fork_beside_a_thread_that_computes_is_warned_of():
    trainer = make_trainer(devices=2, strategy="ddp_fork")
    with computing(), pytest.warns(match="Another thread of this process computes.*'ddp_spawn'"):
        trainer.strategy.launcher.check_startable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.strategy.launcher.check_startable()
