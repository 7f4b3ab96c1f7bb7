"""Collectives as objects: what each process has afterwards, over gloo, and how groups come and go."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from fulmen.engine.cluster import free_port
from fulmen.fabric.plugins.collectives import Collective, SingleDeviceCollective, TorchCollective


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def on_each_rank() -> dict[str, object]:
    all_of_them = TorchCollective()
    rank = all_of_them.rank
    other = 1 - rank
    own = [numbers(10.0 * rank), numbers(10.0 * rank + 1)]
    found: dict[str, object] = {"rank": rank, "size": all_of_them.world_size}
    found["broadcast"] = all_of_them.broadcast(numbers(rank), 1).item()
    found["sum"] = all_of_them.all_reduce(numbers(rank + 1.0)).item()
    found["max"] = all_of_them.all_reduce(numbers(rank), op="max").item()
    found["min"] = all_of_them.all_reduce(numbers(rank), op=dist.ReduceOp.MIN).item()
    reduced = all_of_them.reduce(numbers(rank + 1.0), dst=1)
    found["reduce"] = reduced.item() if rank == 1 else None
    found["all_gather"] = torch.cat(all_of_them.all_gather([numbers(0), numbers(0)], numbers(rank))).tolist()
    gathered = all_of_them.gather(numbers(rank), [numbers(0), numbers(0)] if rank == 0 else None)
    found["gather"] = None if gathered is None else torch.cat(gathered).tolist()
    found["scatter"] = all_of_them.scatter(numbers(0), own if rank == 0 else None).item()
    if rank == 0:
        all_of_them.send(numbers(7.0), 1, tag=3)
    else:
        found["recv"] = all_of_them.recv(numbers(0), 0, tag=3).item()
    found["all_gather_object"] = all_of_them.all_gather_object([None, None], {"rank": rank})
    found["broadcast_object_list"] = all_of_them.broadcast_object_list([rank, "x"], 1)
    objects = all_of_them.gather_object(rank, [None, None] if rank == 0 else None)
    found["gather_object"] = objects
    found["scatter_object_list"] = all_of_them.scatter_object_list([None], ["a", "b"])
    all_of_them.barrier()
    all_of_them.monitored_barrier(timedelta(seconds=60))
    pair = TorchCollective().create_group(ranks=[0, 1])
    alone = TorchCollective().create_group(ranks=[0])
    found["groups"] = pair.world_size, alone.world_size if rank == 0 else None
    found["in a group"] = pair.all_reduce(numbers(other)).item()
    alone.barrier()  # of rank 0; the other one is not in it
    before = len(dist.distributed_c10d._world.pg_map)
    pair.teardown()
    found["after teardown"] = before - len(dist.distributed_c10d._world.pg_map), dist.is_initialized()
    return found


def test_every_collective_over_gloo():
    first, second = run_ranks(2, on_each_rank)
    for found in (first, second):
        assert (found["size"], found["broadcast"], found["sum"], found["max"], found["min"]) == (2, 1, 3, 1, 0)
        assert found["all_gather"] == [0.0, 1.0]
        assert found["all_gather_object"] == [{"rank": 0}, {"rank": 1}]
        assert found["broadcast_object_list"] == [1, "x"]
        assert found["in a group"] == 1.0
        assert found["after teardown"] == (1, True)  # the group of all was not made by a collective, so it stays
    assert (first["reduce"], second["reduce"]) == (None, 3.0)
    assert (first["gather"], second["gather"]) == ([0.0, 1.0], None)
    assert (first["scatter"], second["scatter"]) == (0.0, 1.0)
    assert second["recv"] == 7.0
    assert (first["gather_object"], second["gather_object"]) == ([0, 1], None)
    assert (first["scatter_object_list"], second["scatter_object_list"]) == (["a"], ["b"])
    assert (first["groups"], second["groups"]) == ((2, 1), (2, None))


def test_one_process_has_everything_already():
    one = SingleDeviceCollective()
    tensor = numbers(1.0, 2.0)
    assert (one.rank, one.world_size, one.is_available(), one.is_initialized()) == (0, 1, True, True)
    assert one.broadcast(tensor, 0) is tensor and one.all_reduce(tensor, "sum") is tensor
    assert one.reduce(tensor, dst=0) is tensor and one.recv(tensor) is tensor
    assert one.all_gather([], tensor) == [tensor] and one.gather(tensor) == [tensor]
    assert one.scatter(numbers(0), [tensor]) is tensor and one.reduce_scatter(numbers(0), [tensor]) is tensor
    assert one.all_to_all([], [tensor]) == [tensor]
    assert one.send(tensor, 0) is None and one.barrier() is None
    assert one.setup() is one
    with pytest.raises(RuntimeError, match="does not own a group"):
        one.teardown()
    owner = one.create_group()
    assert owner is one and one.group is not None
    with pytest.raises(RuntimeError, match="owns a group already"):
        one.create_group()
    assert one.teardown() is one
    with pytest.raises(RuntimeError, match="does not own a group"):
        _ = one.group


def test_what_setup_makes_the_last_teardown_ends(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    made = TorchCollective().setup(
        main_address="127.0.0.1", main_port="1", backend="gloo", world_size=1, rank=0
    )  # the port of the environment goes first, and nothing is left in it
    try:
        assert "MASTER_ADDR" not in os.environ
        assert TorchCollective.manages_default_group and made.is_initialized() and made.world_size == 1
        assert made.setup(backend="nothing known") is made  # there is a group
        part = TorchCollective().create_group()
        part.teardown()
        assert not dist.is_initialized() and not TorchCollective.manages_default_group
    finally:
        TorchCollective.manages_default_group = False
        if dist.is_initialized():
            dist.destroy_process_group()


def test_unknown_operations_are_named():
    with pytest.raises(ValueError, match="`op='nothing'` is not an operation"):
        TorchCollective().all_reduce(numbers(1.0), op="nothing")
    with pytest.raises(ValueError, match="not a `float`"):
        TorchCollective().all_reduce(numbers(1.0), op=1.5)
    with pytest.raises(TypeError, match="abstract"):
        Collective()
