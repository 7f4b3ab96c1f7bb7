import os
import signal
import socket

import pytest

from fulmen.engine.cluster import ClusterEnvironment, LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from fulmen.utilities.errors import PossibleUserWarning
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
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "node[10-12,15]",
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


def test_torchrun_tells_each_process_its_place(environment):
    assert not TorchElasticEnvironment.detect()
    environment(**TORCHRUN)
    cluster = TorchElasticEnvironment()
    assert TorchElasticEnvironment.detect() and cluster.creates_processes_externally
    assert place(cluster) == (8, 5, 1, 2)
    assert (cluster.main_address, cluster.main_port) == ("host", 123)


def test_torchrun_knows_better_than_the_strategy(environment):
    environment(**TORCHRUN)
    cluster = TorchElasticEnvironment()
    cluster.set_world_size(1)
    cluster.set_global_rank(0)
    assert place(cluster)[:2] == (8, 5)


def test_a_missing_variable_is_named(environment):
    with pytest.raises(RuntimeError, match="RANK is not set"):
        TorchElasticEnvironment().global_rank()
    environment(RANK="first")
    with pytest.raises(RuntimeError, match="RANK is 'first'"):
        TorchElasticEnvironment().global_rank()


def test_slurm_tells_each_process_its_place(environment):
    environment(**SLURM)
    cluster = SLURMEnvironment()
    assert SLURMEnvironment.detect() and cluster.creates_processes_externally
    assert place(cluster) == (4, 3, 1, 1)
    assert (cluster.main_address, cluster.main_port) == ("node10", 15000 + 4567)
    assert (cluster.job_id(), cluster.job_name()) == (1234567, "train")
    assert cluster.auto_requeue and cluster.requeue_signal == getattr(signal, "SIGUSR1", None)


def test_address_and_port_can_be_set_by_hand_under_slurm(environment):
    environment(**SLURM, MASTER_ADDR="other", MASTER_PORT="77")
    assert (SLURMEnvironment().main_address, SLURMEnvironment().main_port) == ("other", 77)


@pytest.mark.parametrize("job", ["", "abc"])
def test_the_port_without_a_job_number(environment, job):
    environment(**{**SLURM, "SLURM_JOB_ID": job})
    assert SLURMEnvironment().main_port == 12910 and SLURMEnvironment.job_id() is None


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_slurm_session_is_no_job(environment, name):
    environment(**{**SLURM, "SLURM_JOB_NAME": name})
    assert not SLURMEnvironment.detect() and SLURMEnvironment.job_id() is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("alpha", "alpha"),
        ("alpha,beta[0-3]", "alpha"),
        ("node[10-12]", "node10"),
        ("node-[7,8]", "node-7"),
        ("gpu[05]", "gpu05"),
        ("a1b[001-010,2]", "a1b001"),
        ("node-a-[1-2]-x", "node-a-1-x"),
        ("rack[1,3-4]node[5-6]", "rack1node5"),
        ("one two", "one"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert SLURMEnvironment.resolve_root_node_address(nodes) == first


def test_srun_that_was_forgotten_is_mentioned(monkeypatch, tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.warns(PossibleUserWarning, match="srun python"):
        assert not SLURMEnvironment.detect()
