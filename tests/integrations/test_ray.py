"""Ray Train and Ray Tune with real workers; `pip install 'ray[train,tune]'`, and the tests that take minutes run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ray = pytest.importorskip("ray", reason="Ray is not installed: `pip install 'ray[train,tune]'`, then `-m slow`")
HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray on this machine, whose workers can import what is here."""
    paths = [str(path) for path in (HERE.parents[1], HERE.parent, HERE)]
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    # A busy machine is slow to start things, and workers that Ray makes nicer than others slower still.
    os.environ |= {"RAY_worker_niceness": "0"}
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "600"
    sys.path[:0] = paths
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()
    sys.path[:3] = []
    os.environ.clear()
    os.environ.update(before)


def run(program, folder: Path, order: str = "", workers: int = 2, callbacks=()):
    """What Ray says of a program's run on two workers, and what these wrote down at its end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder.mkdir(exist_ok=True)
    trainer = TorchTrainer(
        program,
        train_loop_config={"folder": str(folder), "order": order},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=1), callbacks=list(callbacks)
        ),
    )
    result = trainer.fit()
    return result, [torch.load(folder / f"end-{rank}.pt") for rank in range(workers)]


def test_a_plain_script_is_killed_and_ends_in_the_bits_of_the_documented_program(tmp_path):
    from ray_programs import documented, plain

    written = run(documented, tmp_path / "documented")
    order = tmp_path / "kill"
    order.touch()
    killed = run(plain, tmp_path / "plain", str(order))
    assert not order.exists()
    for result, ends in (written, killed):
        assert result.error is None and os.listdir(result.checkpoint.path) == ["checkpoint.ckpt"]
        assert {"val_loss", "train_loss", "epoch", "step"} <= set(result.metrics)
        assert (result.metrics["epoch"], result.metrics["step"]) == (3, 8)
        assert [(end["world_size"], end["steps"]) for end in ends] == [(2, 8)] * 2
    for one, other in zip(written[1], killed[1]):
        assert all(map(torch.equal, one["weights"].values(), other["weights"].values()))
    assert written[0].metrics["val_loss"] == killed[0].metrics["val_loss"]
    assert [end["strategy"] for end in written[1] + killed[1]] == ["RayDDPStrategy"] * 2 + ["DDPStrategy"] * 2
    assert written[1][0]["callbacks"] == ["RayTrainReportCallback"]
    assert killed[1][0]["callbacks"] == ["RayTrainReport"]
    assert all(end["resumed"].endswith("checkpoint.ckpt") for end in killed[1])  # after the second epoch

    for rank in range(2):
        fsdp, devices = (tmp_path / "documented" / f"refused-{rank}").read_text().splitlines()
        assert "MisconfigurationException" in fsdp and "older wrapper" in fsdp and "strategy='fsdp'" in fsdp
        assert "started 2 workers on this node, and `devices=3`" in devices


def test_ray_tune_gets_what_the_workers_of_its_trials_report(tmp_path):
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray_programs import plain

    def trial(config):
        run(plain, tmp_path / config["name"], workers=1, callbacks=[TuneReportCallback()])

    space = {"name": tune.grid_search(["only"])}
    results = tune.Tuner(trial, param_space=space, run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"))).fit()
    assert not results.errors
    metrics = results[0].metrics
    assert (metrics["epoch"], metrics["step"]) == (3, 16) and metrics["val_loss"] > 0
    assert metrics["checkpoint_path"]
