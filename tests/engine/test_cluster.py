import os
import signal
import socket
import sys

import pytest

from fulmen.engine.cluster import (
    MPI_VARIABLES,
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    detect_environment,
)
from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.optional import is_installed
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
        if name.startswith(("SLURM_", "TORCHELASTIC_", "LSB_", "JSM_")) or name in {
            *TORCHRUN,
            *MPI_VARIABLES,
            "NODE_RANK",
        }:
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


@pytest.fixture
def lsf(environment, tmp_path):
    (tmp_path / "hosts").write_text("batch\nother\n" + f"{socket.gethostname()}\n" * 2)
    variables = {"LSB_JOBID": "1234567", "LSB_DJOB_RANKFILE": str(tmp_path / "hosts"), "JSM_NAMESPACE_SIZE": "4"}
    environment(**variables, JSM_NAMESPACE_RANK="3", JSM_NAMESPACE_LOCAL_RANK="1")


def test_lsf_tells_each_process_its_place(lsf):
    cluster = LSFEnvironment()
    assert LSFEnvironment.detect() and place(cluster) == (4, 3, 1, 1)
    assert (cluster.main_address, cluster.main_port) == ("other", 10000 + 4567)


@pytest.mark.parametrize("hosts", [None, "", "batch\n"])
def test_lsf_without_a_list_of_hosts(lsf, environment, tmp_path, hosts):
    (tmp_path / "hosts").unlink() if hosts is None else (tmp_path / "hosts").write_text(hosts)
    with pytest.raises(ValueError, match="LSB_DJOB_RANKFILE="):
        _ = LSFEnvironment().main_address


@pytest.fixture
def mpi(environment, tmp_path, monkeypatch):
    """A stand-in for `mpi4py`, as rank 2 of 3 on two hosts sees it."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text(
        "import socket\n"
        "class COMM_WORLD:\n"
        "    Get_size = staticmethod(lambda: 3)\n"
        "    Get_rank = staticmethod(lambda: 2)\n"
        "    allgather = staticmethod(lambda value: ['other', value, value])\n"
        "    bcast = staticmethod(lambda value, root: 4321)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    is_installed.cache_clear()
    yield environment
    for name in [name for name in sys.modules if name.startswith("mpi4py")]:
        del sys.modules[name]
    is_installed.cache_clear()


def test_mpi_tells_each_process_its_place(mpi):
    assert not MPIEnvironment.detect()  # nothing was started by MPI
    mpi(OMPI_COMM_WORLD_SIZE="3")
    cluster = MPIEnvironment()
    assert MPIEnvironment.detect() and cluster.creates_processes_externally
    assert place(cluster) == (3, 2, 1, 1)
    assert (cluster.main_address, cluster.main_port) == ("other", 4321)


def test_kubeflow_has_one_process_per_pod_and_is_not_detected(environment):
    environment(WORLD_SIZE="3", RANK="2", MASTER_ADDR="host", MASTER_PORT="123")
    cluster = KubeflowEnvironment()
    assert place(cluster) == (3, 2, 0, 2) and cluster.creates_processes_externally
    with pytest.raises(NotImplementedError, match=r"plugins=\[KubeflowEnvironment"):
        KubeflowEnvironment.detect()


def test_the_first_environment_that_recognises_itself_is_taken(lsf, mpi):
    found = [type(detect_environment())]
    for variables in (SLURM, TORCHRUN):
        mpi(**variables)
        found.append(type(detect_environment()))
    assert found == [LSFEnvironment, SLURMEnvironment, TorchElasticEnvironment]


def test_mpi_comes_after_lsf_and_before_nothing(mpi):
    assert type(detect_environment()) is LightningEnvironment
    mpi(PMI_SIZE="3")
    assert type(detect_environment()) is MPIEnvironment


@pytest.mark.parametrize(
    ("cluster", "variables", "asked", "error", "words"),
    [
        (TorchElasticEnvironment, TORCHRUN, (2, 2), ValueError, "started 8 processes, but the Trainer is made for 4"),
        (KubeflowEnvironment, TORCHRUN, (1, 2), ValueError, "Kubeflow started 8 .* made for 2"),
        (SLURMEnvironment, SLURM, (4, 2), ValueError, "--ntasks-per-node=2`, but the Trainer for `devices=4`"),
        (SLURMEnvironment, SLURM, (2, 1), ValueError, "--nodes=2`, but the Trainer for `num_nodes=1`"),
        (SLURMEnvironment, {"SLURM_NTASKS": "4"}, (2, 2), RuntimeError, "--ntasks-per-node=2"),
        (LightningEnvironment, {"LOCAL_RANK": "0", "WORLD_SIZE": "3"}, (2, 1), ValueError, "started 3 .* made for 2"),
        (LightningEnvironment, {"LOCAL_RANK": "2"}, (2, 1), ValueError, "LOCAL_RANK=2, .* the last one is 1"),
        (LightningEnvironment, {"NODE_RANK": "1"}, (2, 1), ValueError, "NODE_RANK=1"),
        (LightningEnvironment, {"MASTER_ADDR": "host"}, (2, 2), ValueError, "but MASTER_PORT of rank 0"),
    ],
)
def test_what_was_started_and_what_the_trainer_is_made_for_must_agree(
    environment, cluster, variables, asked, error, words
):
    environment(**variables)
    with pytest.raises(error, match=words):
        cluster().validate_settings(*asked)


@pytest.mark.parametrize(
    ("cluster", "variables", "asked"),
    [
        (TorchElasticEnvironment, TORCHRUN, (4, 2)),
        (SLURMEnvironment, SLURM, (2, 2)),
        (LightningEnvironment, {}, (2, 1)),
    ],
)
def test_what_agrees_is_accepted(environment, cluster, variables, asked):
    environment(**variables)
    cluster().validate_settings(*asked)
