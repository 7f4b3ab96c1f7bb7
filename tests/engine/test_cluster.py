import os
import socket

import pytest

from fulmen.engine.cluster import ClusterEnvironment, LightningEnvironment
from fulmen.utilities.rank_zero import rank_zero_only

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job",
    "WORLD_SIZE": "8",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "123",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets exactly the given variables of launchers and schedulers, and restores the rank afterwards."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in {*TORCHRUN, "NODE_RANK"}:
            monkeypatch.delenv(name)

    def set_to(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def place(cluster: ClusterEnvironment):
    return cluster.world_size(), cluster.global_rank(), cluster.local_rank(), cluster.node_rank()


def test_alone_this_process_is_everybody():
    cluster = LightningEnvironment()
    assert place(cluster) == (1, 0, 0, 0)
    assert cluster.main_address == "127.0.0.1" and not cluster.creates_processes_externally
    assert LightningEnvironment.detect()


def test_a_found_port_is_free_and_stays_the_same():
    cluster = LightningEnvironment()
    assert cluster.main_port == cluster.main_port > 0
    with socket.socket() as listener:
        listener.bind(("", cluster.main_port))


def test_processes_started_by_hand_are_recognised(environment):
    environment(LOCAL_RANK="1", NODE_RANK="2", MASTER_ADDR="host", MASTER_PORT="123")
    cluster = LightningEnvironment()
    assert cluster.creates_processes_externally
    assert (cluster.local_rank(), cluster.node_rank()) == (1, 2)
    assert (cluster.main_address, cluster.main_port) == ("host", 123)


@pytest.mark.parametrize(("variables", "rank"), [({"GROUP_RANK": "3"}, 3), ({"GROUP_RANK": "3", "NODE_RANK": "4"}, 4)])
def test_the_node_rank_has_two_names(environment, variables, rank):
    environment(**variables)
    assert LightningEnvironment().node_rank() == rank


def test_the_strategy_tells_the_environment_rank_and_world_size():
    cluster = LightningEnvironment()
    cluster.set_world_size(5)
    cluster.set_global_rank(3)
    assert place(cluster)[:2] == (5, 3)
    assert rank_zero_only.rank == 3
