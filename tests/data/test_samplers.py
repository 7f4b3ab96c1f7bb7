"""Each process gets its part of the data, whatever the loader is made of."""

from __future__ import annotations

import itertools
import os
import random

import numpy
import pytest
import torch
from ranks import run_ranks
from support import make_trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import fulmen as pl
from fulmen.data.loaders import keep_last_batch, record_indices, set_epoch
from fulmen.data.samplers import order_seed, shard_samples

SIZES = (1, 2, 7, 23)


class Numbers(Dataset):
    def __init__(self, size=23):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class Plain:
    """A sampler that is no `Sampler`: it has `__iter__` and `__len__`, nothing else."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(reversed(range(self.size)))


class Indexed(Plain):
    __iter__ = None

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError
        return index * 5 % self.size


del Indexed.__iter__


class Drawing(Plain):
    """Draws from every source of random numbers there is."""

    def __iter__(self):
        order = list(range(self.size))
        random.shuffle(order)
        order = numpy.random.permutation(order).tolist()
        return iter([order[i] for i in torch.randperm(self.size)])


class Unending:
    """No length and no end; draws as it goes."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        while True:
            yield int(torch.randint(self.size, ()))


class Unsized:
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        yield from torch.randperm(self.size).tolist()


class Buckets:
    """A batch sampler of the user's own, with arguments nobody could guess."""

    def __init__(self, widths, secret):
        self.widths = widths
        self.secret = secret

    def __len__(self):
        return len(self.widths)

    def __iter__(self):
        indices = itertools.count()
        for width in self.widths:
            yield [next(indices) for _ in range(width)]


class Epochs(Plain):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([(index + self.epoch) % self.size for index in range(self.size)])


class Named(DataLoader):
    """A subclass with arguments of its own."""

    def __init__(self, name, *args, **kwargs):
        self.name = name
        super().__init__(*args, **kwargs)


def odd_loaders(size):
    data, seeded = Numbers(size), torch.Generator().manual_seed(5)
    weights = [index + 1.0 for index in range(size)]
    return {
        "plain": DataLoader(data, 3),
        "shuffled": DataLoader(data, 3, shuffle=True),
        "shuffled by a generator": DataLoader(data, 3, shuffle=True, generator=seeded),
        "drop_last": DataLoader(data, 3, drop_last=True),
        "a batch sampler": DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 3, False)),
        "batches of the user's own": DataLoader(
            data, batch_sampler=Buckets([w for w in (1, 3, 2, 4, 1) if w <= size][: max(1, size // 4)], secret=object())
        ),
        "one sample at a time": DataLoader(data, batch_size=None),
        "one drawn sample at a time": DataLoader(data, batch_size=None, shuffle=True),
        "a sampler with a length": DataLoader(data, 2, sampler=Plain(size)),
        "a sampler with indices": DataLoader(data, 2, sampler=Indexed(size)),
        "a list": DataLoader(data, 2, sampler=list(range(size))[::-1]),
        "a subset": DataLoader(data, 2, sampler=SubsetRandomSampler(range(size))),
        "weights": DataLoader(data, 2, sampler=WeightedRandomSampler(weights, size)),
        "weights without replacement": DataLoader(data, 2, sampler=WeightedRandomSampler(weights, size, False, seeded)),
        "everything drawn": DataLoader(data, 2, sampler=Drawing(size)),
        "no length": DataLoader(data, 2, sampler=Unsized(size)),
        "epochs": DataLoader(data, 2, sampler=Epochs(size)),
        "a subclass": Named("mine", data, 2, shuffle=True),
    }


NAMES = list(odd_loaders(4))
AS_THEY_ARE = {"plain", "drop_last", "batches of the user's own", "one sample at a time", "a sampler with a length",
               "a sampler with indices", "a list", "epochs"}  # fmt: skip


def read(loader):
    return [batch.tolist() if isinstance(batch, torch.Tensor) else [batch] for batch in loader]


def parts_of(name, size, ranks, padded, epoch=0, seed=3):
    """The batches of each rank, which draws with a state of its own."""
    parts = []
    for rank in range(ranks):
        torch.manual_seed(rank), random.seed(rank), numpy.random.seed(rank)
        loader = odd_loaders(size)[name]
        loader = shard_samples(loader, num_replicas=ranks, rank=rank, padded=padded, seed=seed)
        set_epoch(loader, epoch)
        parts.append((loader, read(loader)))
    return parts


def together(batches_of_ranks):
    """As one process would get them: dealt out one by one."""
    rounds = itertools.zip_longest(*batches_of_ranks)
    return [batch for batches in rounds for batch in batches if batch is not None]


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_deals_out_the_batches_of_one_process(name):
    for size, ranks in itertools.product(SIZES, (1, 2, 3)):
        parts = parts_of(name, size, ranks, padded=False)
        alone = read(shard_samples(odd_loaders(size)[name], num_replicas=1, rank=0, padded=False, seed=3))
        assert together(batches for _, batches in parts) == alone, (size, ranks)
        if name in AS_THEY_ARE:
            assert alone == read(odd_loaders(size)[name]), size
        if name != "no length":
            assert [len(loader) for loader, _ in parts] == [len(batches) for _, batches in parts]


@pytest.mark.parametrize("name", NAMES)
def test_training_gives_all_processes_as_many_samples_and_together_the_large_batch(name):
    for size, ranks in itertools.product(SIZES, (2, 3)):
        parts = [batches for _, batches in parts_of(name, size, ranks, padded=True)]
        assert len({len(batches) for batches in parts}) == 1, (size, ranks)
        if name == "batches of the user's own":
            assert together(parts)[: len(parts_of(name, size, 1, False)[0][1])] == parts_of(name, size, 1, False)[0][1]
            continue
        assert {tuple(map(len, batches)) for batches in parts} == {tuple(map(len, parts[0]))}
        if "drop_last" in name or not size:
            continue
        drawn = [sample for rounds in zip(*parts) for row in zip(*rounds) for sample in row]
        alone = [s for batch in parts_of(name, size, 1, padded=False)[0][1] for s in batch]
        assert drawn[:size] == alone, (size, ranks)
        assert len(drawn) - size == -size % ranks
        assert drawn[size:] == list(itertools.islice(itertools.cycle(alone), -size % ranks))


@pytest.mark.parametrize("name", ["shuffled", "shuffled by a generator", "weights", "everything drawn", "no length"])
def test_each_epoch_has_an_order_of_its_own_that_follows_from_the_seed(name):
    first, again = parts_of(name, 23, 2, True), parts_of(name, 23, 2, True)
    assert [b for _, b in first] == [b for _, b in again]
    assert [b for _, b in parts_of(name, 23, 2, True, epoch=1)] != [b for _, b in first]
    assert [b for _, b in parts_of(name, 23, 2, True, seed=4)] != [b for _, b in first]


def test_a_sampler_that_knows_epochs_is_told():
    parts = parts_of("epochs", 6, 2, False, epoch=2)
    assert together(batches for _, batches in parts) == [[2, 3], [4, 5], [0, 1]]


def test_the_order_of_a_loader_that_does_not_shuffle_is_kept():
    assert [batches for _, batches in parts_of("plain", 8, 2, True)] == [[[0, 2, 4], [6]], [[1, 3, 5], [7]]]


def test_a_sampler_without_end_is_drawn_as_it_is_read():
    loaders = [
        shard_samples(DataLoader(Numbers(100), 4, sampler=Unending(100)), num_replicas=2, rank=r, padded=True, seed=3)
        for r in range(2)
    ]
    random.seed(0), torch.manual_seed(9)
    parts = [[batch.tolist() for batch in itertools.islice(loader, 1500)] for loader in loaders]
    torch.default_generator.manual_seed(3)
    alone = list(itertools.islice(Unending(100), 12_000))
    assert [s for rounds in zip(*parts) for row in zip(*rounds) for s in row] == alone


def test_drawing_the_order_changes_no_other_random_numbers():
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    generator = torch.Generator().manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), generator.get_state()
    loader = DataLoader(Numbers(), 2, sampler=Drawing(23))
    list(shard_samples(loader, num_replicas=2, rank=0, padded=True, seed=3).sampler)
    list(shard_samples(DataLoader(Numbers(), sampler=RandomSampler(Numbers(), generator=generator)), num_replicas=2, rank=0,
                 padded=True, seed=3).sampler)  # fmt: skip
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist(), generator.get_state()
    assert torch.equal(before[0], after[0]) and before[1:3] == after[1:3] and torch.equal(before[3], after[3])


def test_the_order_follows_from_the_seed_of_the_generator_or_of_the_run(monkeypatch):
    own = torch.Generator().manual_seed(5)
    assert order_seed(DataLoader(Numbers(), shuffle=True, generator=own)) == 5
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert order_seed(DataLoader(Numbers(), shuffle=True)) == 7
    monkeypatch.delenv("PL_GLOBAL_SEED")
    torch.manual_seed(9)
    assert order_seed(DataLoader(Numbers(), shuffle=True)) == order_seed([1, 2]) == 9


def test_weighted_sampling_keeps_its_weights():
    loader = DataLoader(Numbers(6), 2, sampler=WeightedRandomSampler([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 40))
    parts = [read(shard_samples(loader, num_replicas=2, rank=rank, padded=True)) for rank in range(2)]
    assert {number for part in parts for batch in part for number in batch} == {1, 2, 4}


def test_a_shard_is_a_distributed_sampler():
    shard = shard_samples(DataLoader(Numbers(4)), num_replicas=2, rank=1, padded=True).sampler
    assert isinstance(shard, DistributedSampler)
    assert (shard.num_replicas, shard.rank, shard.drop_last) == (2, 1, False)


class Lookalike(Plain):
    num_replicas, rank = 2, 1


def test_samplers_that_split_the_data_themselves_are_left_alone():
    own = DistributedSampler(Numbers(), num_replicas=2, rank=1)
    for loader in (
        DataLoader(Numbers(), 2, sampler=own),
        DataLoader(Numbers(), batch_sampler=BatchSampler(own, 2, False)),
        DataLoader(Numbers(), 2, sampler=Lookalike(5)),
    ):
        assert shard_samples(loader, num_replicas=2, rank=1, padded=True) is loader


def test_a_batch_sampler_of_the_users_own_is_wrapped_and_still_answers():
    batches = Buckets([1, 2, 3], secret=object())
    loader = shard_samples(DataLoader(Numbers(), batch_sampler=batches), num_replicas=2, rank=0, padded=True)
    assert loader.batch_sampler.order is batches
    assert loader.batch_sampler.secret is batches.secret


def test_a_subclass_keeps_its_arguments():
    loader = shard_samples(Named("mine", Numbers(), 2), num_replicas=2, rank=0, padded=True)
    assert type(loader) is Named and loader.name == "mine" and loader.batch_size == 2


def test_workers_read_the_part_of_their_process():
    options = {"num_workers": 2, "persistent_workers": True}
    loaders = [
        shard_samples(DataLoader(Numbers(10), 2, **options), num_replicas=2, rank=r, padded=False, seed=3)
        for r in range(2)
    ]
    for _ in range(2):
        assert together(map(read, loaders)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_predictions_know_their_samples_and_drop_none():
    loader = DataLoader(Numbers(7), 2, drop_last=True)
    parts = [
        record_indices(shard_samples(keep_last_batch(loader), num_replicas=2, rank=rank, padded=False, seed=0))
        for rank in range(2)
    ]
    assert together(map(read, parts)) == [[0, 1], [2, 3], [4, 5], [6]]
    assert [part.batch_sampler.seen_indices for part in parts] == [[[0, 1], [4, 5]], [[2, 3], [6]]]


# ---------------------------------------------------------------------- with real processes


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


class PerWorker(IterableDataset):
    """The documented way of sharing data out to workers."""

    def __iter__(self):
        info = get_worker_info()
        yield from range(10) if info is None else range(info.id, 10, info.num_workers)


class PerRank(IterableDataset):
    def __iter__(self):
        yield from range(int(os.environ["RANK"]), 10, int(os.environ["WORLD_SIZE"]))


class Reader(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": []}

    def note(self, kind, batch):
        plain = torch.utils._pytree.tree_map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, batch)
        self.seen[kind].append(plain)

    def training_step(self, batch, batch_idx):
        if not self.trainer.fit_loop.join.exhausted:
            self.note("train", batch)
        return self.weight * 1

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loaders_of_runs():
    seeded = torch.Generator().manual_seed(int(os.environ["RANK"]))  # differs, on purpose
    return {
        "stream": lambda: DataLoader(Stream(), 2),
        "stream with workers": lambda: DataLoader(PerWorker(), 2, num_workers=2),
        "split by rank": lambda: DataLoader(PerRank(), 2),
        "generator": lambda: (number for number in range(5)),
        "numbers": lambda: [1.0, 2.0, 3.0, 4.0],
        "several": lambda: {"a": DataLoader(Numbers(8), 2), "b": DataLoader(Numbers(4), 1)},
        "combined": lambda: pl.utilities.CombinedLoader([DataLoader(Numbers(8), 2), DataLoader(Stream(), 2)], "min_size"),
        "shuffled": lambda: DataLoader(Numbers(8), 2, shuffle=True, generator=seeded),
    }  # fmt: skip


def runs():
    torch.manual_seed(int(os.environ["RANK"]))  # nobody seeded the processes alike
    seen = {}
    for name, make in loaders_of_runs().items():
        if "workers" not in name:  # starting them takes long
            reader = Reader()
            make_trainer(strategy="ddp", devices=2, max_epochs=1).fit(reader, make())
            seen[name] = reader.seen["train"]
        if name not in ("several", "combined"):
            reader = Reader()
            make_trainer(strategy="ddp", devices=2).validate(reader, make(), verbose=False)
            seen[f"{name}, validated"] = reader.seen["val"]
    reader = Reader()
    make_trainer(strategy="ddp", devices=2, use_distributed_sampler=False).fit(reader, DataLoader(Numbers(4), 2))
    seen["as it is"] = reader.seen["train"]
    reader = Reader()
    trainer = make_trainer(strategy="ddp", devices=2, limit_val_batches=0.5)
    trainer.validate(reader, DataLoader(Numbers(14), 2), verbose=False)
    seen["half"] = reader.seen["val"]
    reader = Reader()
    trainer = make_trainer(strategy="ddp", devices=2, limit_val_batches=2)
    trainer.validate(reader, DataLoader(Numbers(14), 2), verbose=False)
    seen["two"] = reader.seen["val"]
    return seen


@pytest.fixture(scope="module")
def seen():
    return run_ranks(2, runs)


def test_what_has_no_indices_is_dealt_out_batch_by_batch(seen):
    for suffix in ("", ", validated"):
        stream = together(rank["stream" + suffix] for rank in seen)
        assert stream == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert together(rank["generator" + suffix] for rank in seen) == [0, 1, 2, 3, 4]
        assert together(rank["numbers" + suffix] for rank in seen) == [1.0, 2.0, 3.0, 4.0]


def test_a_stream_that_its_workers_share_is_dealt_out_too(seen):
    batches = together(rank["stream with workers, validated"] for rank in seen)
    assert sorted(number for batch in batches for number in batch) == list(range(10))


def test_a_stream_that_splits_itself_is_left_alone(seen):
    for rank, split in enumerate(each["split by rank"] for each in seen):
        assert [number for batch in split for number in batch] == list(range(rank, 10, 2))


def test_each_of_several_loaders_is_split(seen):
    for key, size in (("a", 8), ("b", 4)):
        samples = [number for rank in seen for batches in rank["several"] for number in batches[key]]
        assert sorted(samples) == list(range(size))
    for rank in seen:
        assert len(rank["combined"]) == 2


def test_processes_that_were_seeded_differently_still_draw_one_order(seen):
    for name in ("shuffled", "shuffled, validated"):
        samples = [number for rank in seen for batch in rank[name] for number in batch]
        assert sorted(samples) == list(range(8))


def test_data_is_not_split_if_the_trainer_is_told_not_to(seen):
    assert [rank["as it is"] for rank in seen] == [[[0, 1], [2, 3]]] * 2


def test_a_fraction_is_one_of_all_batches(seen):
    assert together(rank["half"] for rank in seen) == [[0, 1], [2, 3], [4, 5]]


def test_a_whole_number_counts_batches_of_each_process(seen):
    assert [rank["two"] for rank in seen] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
