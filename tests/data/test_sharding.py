"""The part of the samples that each of several processes reads."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fulmen.data.loaders import Shard, set_epoch, sharded


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def parts(make, ranks: int, padded: bool, epoch: int = 0) -> list[list[int]]:
    """What each rank reads in one epoch; global random numbers differ between the ranks."""
    found = []
    for rank in range(ranks):
        torch.manual_seed(rank)
        loader = sharded(make(), num_replicas=ranks, rank=rank, padded=padded)
        set_epoch(loader, epoch)
        found.append([int(value) for (batch,) in loader for value in batch])
        assert len(loader.sampler if loader.batch_sampler is None else loader.batch_sampler.sampler) == len(found[-1])
    return found


@pytest.mark.parametrize("count", [1, 5, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_batches_of_the_ranks_make_up_the_large_batch(count, ranks):
    made = lambda: DataLoader(numbers(count), batch_size=2)  # noqa: E731
    found = parts(made, ranks, padded=False)
    assert found == [list(range(count))[rank::ranks] for rank in range(ranks)]
    padded = parts(made, ranks, padded=True)
    assert len({len(part) for part in padded}) == 1
    assert [part[: len(short)] for part, short in zip(padded, found)] == found


@pytest.mark.parametrize(
    "order",
    [
        RandomSampler,
        lambda data: SubsetRandomSampler(range(len(data))),
        lambda data: RandomSampler(data, generator=torch.Generator().manual_seed(1)),
        lambda data: torch.randperm(len(data), generator=torch.Generator().manual_seed(1)).tolist(),
    ],
    ids=["random", "subset", "generator", "list"],
)
def test_all_ranks_draw_the_same_order(order):
    data = numbers(12)
    found = parts(lambda: DataLoader(data, batch_size=2, sampler=order(data)), 3, padded=True)
    assert sorted(value for part in found for value in part) == list(range(12))


def test_every_epoch_has_another_order():
    made = lambda: DataLoader(numbers(12), batch_size=2, shuffle=True)  # noqa: E731
    assert parts(made, 2, padded=True, epoch=0) == parts(made, 2, padded=True, epoch=0)
    assert parts(made, 2, padded=True, epoch=0) != parts(made, 2, padded=True, epoch=1)


def test_the_order_follows_the_seed(monkeypatch):
    made = lambda: DataLoader(numbers(12), batch_size=2, shuffle=True)  # noqa: E731
    first = parts(made, 2, padded=True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert parts(made, 2, padded=True) != first


def test_weighted_sampling_keeps_its_weights():
    weights = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    made = lambda: DataLoader(numbers(6), batch_size=2, sampler=WeightedRandomSampler(weights, 40))  # noqa: E731
    found = parts(made, 2, padded=True)
    assert [len(part) for part in found] == [20, 20] and {value for part in found for value in part} == {1, 2, 4}


def test_random_numbers_of_the_user_are_not_used_up():
    loader = sharded(DataLoader(numbers(12), shuffle=True), num_replicas=2, rank=0, padded=True)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(loader.sampler)
    assert torch.equal(torch.rand(1), expected)


def test_a_batch_sampler_of_the_user_is_made_again_around_the_shard():
    class Pairs(BatchSampler):
        """Batches by size."""

    made = lambda: DataLoader(  # noqa: E731
        numbers(9), batch_sampler=Pairs(SequentialSampler(numbers(9)), batch_size=2, drop_last=True)
    )
    loader = sharded(made(), num_replicas=2, rank=1, padded=False)
    assert type(loader.batch_sampler) is Pairs and [batch.tolist() for (batch,) in loader] == [[1, 3], [5, 7]]


def test_what_is_shared_out_already_or_has_no_indices_stays():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    own = DataLoader(numbers(4), sampler=DistributedSampler(numbers(4), 2, 0))
    for loader in (own, DataLoader(Stream()), [1, 2, 3]):
        assert sharded(loader, num_replicas=2, rank=0, padded=True) is loader


def test_a_shard_is_a_distributed_sampler():
    shard = sharded(DataLoader(numbers(4)), num_replicas=2, rank=1, padded=True).sampler
    assert isinstance(shard, Shard) and isinstance(shard, DistributedSampler)
    assert (shard.num_replicas, shard.rank, shard.drop_last) == (2, 1, False)
