"""`Fabric` on two processes over gloo: the bits of one process, checkpoints, launching, and failures."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from fulmen import Fabric

SAMPLES = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


def train(fabric: Fabric, folder: str) -> tuple[list[float], list[list[float]]]:
    """Two epochs, in windows of two batches; the second one is repeated from the checkpoint between them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.1))
    data = TensorDataset(SAMPLES.double())
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=4 // fabric.world_size))
    losses = []

    def run_epoch() -> None:
        for index, (batch,) in enumerate(loader):
            open_window = index % 2 == 0
            with fabric.no_backward_sync(model, enabled=open_window):
                loss = model(batch).square().mean()
                fabric.backward(loss / 2)
            losses.append(fabric.all_reduce(loss.detach()).item())
            if not open_window:
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()

    run_epoch()
    fabric.save(folder, {"model": model, "optimizer": optimizer, "epoch": 1})
    run_epoch()
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    assert fabric.load(folder, state) == {} and state["epoch"] == 1
    again = len(losses)
    run_epoch()
    assert losses[again:] == losses[again - 4 : again]
    return losses[:again], [parameter.tolist() for parameter in net.parameters()] if fabric.world_size == 1 else []


def exchange(fabric: Fabric, number: int) -> dict:
    first = []
    with fabric.rank_zero_first():
        first = sorted(os.listdir())
        open(f"rank-{fabric.global_rank}", "w").close()
    with pytest.raises(RuntimeError, match="launched already"):
        fabric.launch(exchange, 1)
    value = torch.tensor([1.0, fabric.global_rank], requires_grad=True)
    gathered = fabric.all_gather(value, sync_grads=True)
    gathered[:, 1].sum().backward()
    shuffled = fabric.setup_dataloaders(DataLoader(range(8), shuffle=True))
    everything = fabric.setup_dataloaders(DataLoader(range(3)), use_distributed_sampler=False)
    return {
        "number": number,
        "gathered": gathered.tolist(),
        "gradient": value.grad.tolist(),
        "sum": fabric.all_reduce({"a": fabric.global_rank + 1}, reduce_op="sum")["a"].item(),
        "mean of integers": fabric.all_reduce(torch.tensor([fabric.global_rank])).item(),
        "value": value.tolist() if fabric.all_reduce(value) is not value else None,
        "from 1": fabric.broadcast(f"rank {fabric.global_rank}", src=1),
        "first": fabric.broadcast(first, src=0),
        "shuffled": sorted(int(b) for part in fabric.all_gather(torch.cat(list(shuffled))) for b in part),
        "everything": [int(batch) for batch in everything],
    }


def test_two_processes_have_the_losses_of_one_and_resume(tmp_path) -> None:
    alone, _ = train(Fabric(accelerator="cpu"), str(tmp_path / "one"))
    together, _ = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(train, str(tmp_path / "two"))
    assert together == pytest.approx(alone, rel=1e-12)
    files = [torch.load(tmp_path / name, weights_only=True) for name in ("one", "two")]
    for name, value in files[0]["model"].items():
        assert torch.allclose(value, files[1]["model"][name], rtol=1e-12)


def test_processes_exchange_what_they_have() -> None:
    found = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(exchange, number=5)
    assert found == {
        "number": 5,
        "gathered": [[1.0, 0.0], [1.0, 1.0]],
        "gradient": [0.0, 2.0],
        "sum": 3,
        "mean of integers": 0.5,
        "value": [1.0, 0.0],
        "from 1": "rank 1",
        "first": [],
        "shuffled": list(range(8)),
        "everything": [0, 1, 2],
    }
    assert sorted(os.listdir()) == ["rank-0", "rank-1"]


def read_parts(fabric: Fabric) -> None:
    data = range(10)
    loader = DataLoader(data, batch_size=2, shuffle=True)
    plain = DistributedSampler(data, shuffle=True)
    expected = DataLoader(data, batch_size=2, sampler=plain)
    mine = fabric.setup_dataloaders(loader)
    for epoch in range(2):
        plain.set_epoch(epoch)
        assert [batch.tolist() for batch in mine] == [batch.tolist() for batch in expected]
    for order in (RandomSampler(data, replacement=True, num_samples=6), [9, 8, 7, 6, 5, 4]):
        part = torch.tensor([int(i) for i in fabric.setup_dataloaders(DataLoader(data, sampler=order))])
        both = fabric.all_gather(part)
        assert both.shape == (2, 3)
        assert isinstance(order, RandomSampler) or both.T.flatten().tolist() == order


def test_each_process_reads_its_part() -> None:
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(read_parts)


SCRIPT = """
import sys
import torch
from fulmen import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
try:
    fabric.launch()
except RuntimeError as error:
    assert "launched already" in str(error)
net = torch.nn.Linear(2, 1)
model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
for step in range(4):
    if step == 2 and sys.argv[1:] == ["raises"] and fabric.global_rank == 1:
        raise ValueError("rank 1 is unhappy")
    optimizer.zero_grad()
    fabric.backward(model(torch.ones(1, 2) * (1 + fabric.global_rank)).sum())
    optimizer.step()
weights = fabric.all_gather(net.weight.detach())
assert torch.equal(weights[0], weights[1])
fabric.print("done", fabric.world_size)
"""


def test_a_script_runs_under_torchrun(script, ended, tmp_path) -> None:
    (tmp_path / "loop.py").write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code, output = ended(script(before=(*torchrun, "loop.py")))
    assert (code, output.count("done 2")) == (0, 1), output


def test_a_process_that_fails_is_named_and_ends_the_others(script, ended, tmp_path) -> None:
    (tmp_path / "loop.py").write_text(SCRIPT)
    code, output = ended(script("raises", before=("loop.py",), FULMEN_WATCHDOG_TIMEOUT_S="10"))
    assert code == 1
    assert "Started 2 processes" in output and re.search(r"Rank 1 failed at loop.py:\d+", output)
    assert "ValueError: rank 1 is unhappy" in output
    assert "Rank 0 ends because of rank 1" in output
