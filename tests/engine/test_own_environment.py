"""An environment of the user's own knows its processes: every number is asked of it, none read from variables."""

import torch
from support import Regression, make_loader, make_trainer

from benchmarks.harness import free_port
from fulmen.plugins.environments import LightningEnvironment
from fulmen.utilities.rank_zero import rank_zero_only


class Actor(LightningEnvironment):
    """One process of several, of which each sees one device, as actors of a cluster do."""

    def world_size(self):
        return 6

    def global_rank(self):
        return 5

    def local_rank(self):
        return 3

    def node_rank(self):
        return 1

    def set_world_size(self, size): ...

    def set_global_rank(self, rank): ...


def test_an_environment_that_knows_its_processes_is_asked(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(devices="auto", strategy="ddp", plugins=[Actor()])
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (6, 5, 3, 1)
    assert not trainer.is_global_zero and rank_zero_only.rank == 5
    assert trainer.strategy.root_device == torch.device("cpu")
    assert trainer.strategy.distributed_sampler_kwargs == {"num_replicas": 6, "rank": 5}


def test_an_environment_with_an_address_of_its_own_needs_no_variables(monkeypatch):
    class Meets(LightningEnvironment):
        main_address = "node-0"
        main_port = 1234

    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    trainer = make_trainer(devices=1, num_nodes=2, strategy="ddp", plugins=[Meets()])
    assert trainer.world_size == 2


def test_processes_meet_at_the_port_of_the_environment():
    port = free_port()

    class Meets(LightningEnvironment):
        main_port = port

    model = Regression()
    before = model.layer.weight.detach().clone()
    trainer = make_trainer(devices=2, strategy="ddp_fork", max_steps=2, plugins=[Meets()])
    trainer.fit(model, make_loader())
    assert trainer.global_step == 2 and not torch.equal(model.layer.weight, before)
