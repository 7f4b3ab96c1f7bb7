"""``python -m fulmen fabric``: what a script is started with, really."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fulmen.engine.cluster import free_port
from fulmen.fabric import cli

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
import torch
from fulmen import Fabric

fabric = Fabric()
torch.manual_seed(fabric.global_rank)
net = torch.nn.Linear(2, 1, bias=False)
model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
before = net.weight.detach().clone()
fabric.backward(model(torch.full((1, 2), fabric.global_rank + 1.0)).sum())
optimizer.step()
who = [type(fabric.strategy).__name__, fabric.global_rank, fabric.world_size, str(fabric.device)]
names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
told = {name: value for name, value in os.environ.items() if name.startswith("LT_") or name in names}
with open(f"rank-{os.environ['RANK']}.json", "w") as file:
    moved = (before - net.weight.detach()).tolist()
    json.dump({"arguments": sys.argv[1:], "told": told, "who": who, "moved": moved}, file)
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What torchrun would be given, for the words of a command line; the environment is put back."""
    from torch.distributed import run as torchrun

    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(torchrun, "main", given.extend)
    monkeypatch.setattr(os, "environ", {name: v for name, v in os.environ.items() if not name.startswith("LT_")})

    def run(*words):
        given.clear()
        cli.main(["run", *words])
        return list(given)

    return run


def told():
    return {name: value for name, value in os.environ.items() if name.startswith("LT_")}


def test_defaults(started):
    assert started("train.py") == [
        "--nproc_per_node=1", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=29400",
        "train.py",
    ]  # fmt: skip
    assert told() == {"LT_CLI_USED": "1", "LT_DEVICES": "1", "LT_NUM_NODES": "1"}


def test_options_become_variables_and_arguments_of_torchrun(started):
    words = ["--accelerator", "cpu", "--strategy=ddp", "--devices", "2", "--num-nodes", "3", "--node-rank", "1"]
    words += ["--main-address", "10.0.0.1", "--main-port", "1234", "--precision", "bf16-mixed"]
    assert started(*words, "train.py") == [
        "--nproc_per_node=2", "--nnodes=3", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=1234", "train.py",
    ]  # fmt: skip
    assert told() == {
        "LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_STRATEGY": "ddp", "LT_DEVICES": "2", "LT_NUM_NODES": "3",
        "LT_PRECISION": "bf16-mixed",
    }  # fmt: skip


def test_other_words_are_the_script_s_own(started):
    given = started("train.py", "--lr", "0.1", "fast", "--devices", "2", "--accelerator=cpu", "--name=x")
    assert given[0] == "--nproc_per_node=2"
    assert given[given.index("train.py") + 1 :] == ["--lr", "0.1", "fast", "--name=x"]
    given = started("--accelerator=cpu", "train.py", "--", "--devices", "7")
    assert given[0] == "--nproc_per_node=1" and given[-2:] == ["--devices", "7"]


def test_dp_is_one_process(started):
    assert started("train.py", "--accelerator=cpu", "--strategy=dp", "--devices=2")[0] == "--nproc_per_node=1"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["run", "nowhere.py"], "there is no script 'nowhere.py'"),
        (["run", "train.py", "--strategy", "ddp_spawn"], "invalid choice: 'ddp_spawn'"),
        (["run", "train.py", "--precision", "8"], "invalid choice: '8'"),
        (["run", "train.py", "--accelerator", "tpu"], "does not support it"),
        (["consolidate", "here", "--nothing"], "unknown arguments: --nothing"),
    ],
)
def test_wrong_words_end_with_what_is_wrong(started, capsys, words, what):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and what in capsys.readouterr().err


def test_strategies_on_offer_need_nothing_else():
    offered = cli.offered_strategies()
    assert {"ddp", "dp", "fsdp", "deepspeed_stage_3"} <= set(offered)
    assert not [name for name in offered if any(word in name for word in ("spawn", "fork", "xla", "tpu", "offload"))]


def test_a_script_runs_on_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    port = str(free_port())
    command = [
        sys.executable,
        "-m",
        "fulmen",
        "fabric",
        "run",
        "--accelerator",
        "cpu",
        "--strategy",
        "ddp",
        "--devices",
        "2",
    ]
    command += ["--main-port", port, "train.py", "--epochs", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for rank, one in enumerate(found):
        assert one["arguments"] == ["--epochs", "3"]
        assert (one["told"]["RANK"], one["told"]["WORLD_SIZE"], one["told"]["MASTER_PORT"]) == (str(rank), "2", port)
        assert one["told"]["LT_CLI_USED"] == "1" and one["told"]["LT_DEVICES"] == "2"
        assert one["who"] == ["DDPStrategy", rank, 2, "cpu"]
        assert one["moved"] == [[1.5, 1.5]]  # the mean of the inputs of both
        assert int(one["told"]["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


def test_consolidate_makes_one_file(tmp_path, capsys):
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "sharded"
    dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=folder)
    cli.main(["consolidate", str(folder), "--output_file", str(tmp_path / "one.ckpt")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "one.ckpt")
    assert torch.equal(torch.load(tmp_path / "one.ckpt")["model"]["weight"], torch.ones(2))
