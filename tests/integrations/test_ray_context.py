"""What the Trainer makes of a context of Ray Train, and of one that is not whole; Ray itself is not needed."""

from __future__ import annotations

import sys
import types

import pytest
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.integrations import RayTrainEnvironment
from fulmen.plugins.environments import LightningEnvironment


class Context:
    """Rank 3 of 4 workers, of which two are on this node, as Ray tells it."""

    get_world_size = staticmethod(lambda: 4)
    get_world_rank = staticmethod(lambda: 3)
    get_local_world_size = staticmethod(lambda: 2)
    get_local_rank = staticmethod(lambda: 1)
    get_node_rank = staticmethod(lambda: 1)


@pytest.fixture
def worker(monkeypatch):
    """The modules of Ray that are there in a worker, with that context."""

    def in_worker(get_context) -> None:
        for name in ("ray", "ray.train", "ray.train.v2.api.context"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules["ray.train"], "get_context", get_context, raising=False)

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield in_worker
    pl.utilities.rank_zero.set_rank(0)


def test_where_ray_is_imported_but_no_worker_is_the_trainer_is_as_always(worker):
    def refuse():
        raise RuntimeError("`get_context` cannot be used outside of a Ray Train training function")

    worker(refuse)
    trainer = make_trainer()
    assert trainer.world_size == 1 and trainer.callbacks == []
    trainer.fit(Regression(), make_loader())
    with pytest.raises(RuntimeError, match="TorchTrainer"):
        RayTrainEnvironment()


def test_ranks_and_strategy_are_those_of_the_context(worker, monkeypatch):
    worker(Context)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4711")
    trainer = make_trainer(devices=2)
    strategy = trainer.strategy
    assert type(strategy).__name__ == "DDPStrategy" and strategy.launcher is None
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (4, 3, 1, 1)
    cluster = strategy.cluster_environment
    assert (cluster.main_address, cluster.main_port) == ("10.0.0.1", 4711)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 3}
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["RayTrainReport"]


def test_a_context_that_is_not_whole_and_devices_that_contradict_it_are_named(worker, monkeypatch):
    worker(Context)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(RuntimeError, match="4 workers that cannot meet.*MASTER_PORT not set.*TorchTrainer"):
        make_trainer(devices=2)
    with pytest.raises(ValueError, match="started 2 workers on this node, and `devices=3`"):
        make_trainer(devices=3)


def test_an_environment_of_the_users_own_comes_first(worker):
    worker(Context)
    trainer = make_trainer(devices=1, plugins=[LightningEnvironment()])
    assert trainer.world_size == 1 and trainer.callbacks == []
