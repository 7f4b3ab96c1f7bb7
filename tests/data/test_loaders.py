"""Lengths and limits, warnings, and loaders made again from other arguments."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fulmen.data.combined import CombinedLoader
from fulmen.data.loaders import (
    IndexRecorder,
    check_iterable,
    check_length,
    disable_shuffling,
    keep_last_batch,
    limit_batches,
    rebuild_loader,
    record_arguments,
    record_indices,
    seed_workers,
    set_epoch,
    shutdown_workers,
    warn_about_settings,
)
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning


def for_prediction(loader):
    return record_indices(keep_last_batch(loader))


class Numbers(Dataset):
    def __init__(self, size=5):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class SizedStream(Stream):
    def __len__(self):
        return 5


def batches_of(loader):
    return [batch.tolist() for batch in loader]


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    """The same number of CPUs wherever the tests run; and warnings are failures unless a test expects them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


# lengths and limits


@pytest.mark.parametrize(
    ("loader", "length"),
    [
        (DataLoader(Numbers(), batch_size=2), 3),
        (DataLoader(Stream(), batch_size=2), math.inf),
        ([1, 2], 2),
        (iter([1, 2]), math.inf),
        (CombinedLoader([range(3), range(2)], "sequential"), 5),
        (CombinedLoader([range(3), iter([])], "sequential"), math.inf),
    ],
)
def test_the_length_of_a_loader(loader, length):
    assert check_length(loader) == length


def test_suspicious_lengths_are_pointed_out():
    with pytest.warns(UserWarning, match="Total length of `DataLoader` is zero"):
        assert check_length(DataLoader(Numbers(0))) == 0
    with pytest.warns(UserWarning, match="`IterableDataset` has `__len__` defined"):
        assert check_length(DataLoader(SizedStream(), batch_size=2)) == 3


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (10, 1.0, 10),
        (10, 0.5, 5),
        (10, 0.39, 3),
        (10, 1, 1),
        (10, 3, 3),
        (10, 30, 10),
        (10, 2.0, 2),
        (10, 0, 0),
        (10, 0.0, 0),
        (0, 0.5, 0),
        (0, 1.0, 0),
        (math.inf, 1.0, math.inf),
        (math.inf, 3, 3),
        (math.inf, 0, 0),
        (math.inf, 0.0, 0),
    ],
)
def test_limits(length, limit, expected):
    found = limit_batches(length, limit, name="limit_train_batches")
    assert found == expected
    assert isinstance(found, int) or math.isinf(found)


@pytest.mark.parametrize(
    ("length", "limit", "message"),
    [
        (10, -1, "`limit_val_batches=-1` is not an amount"),
        (10, 1.5, r"`limit_val_batches=1.5` is not an amount.*\[0.0, 1.0\] .* or an int"),
        (4, 0.1, "leaves none of the 4 batches.*at least `limit_val_batches=0.25`"),
        (math.inf, 0.5, "`limit_val_batches=0.5` asks for a fraction.*no length.*limit_val_batches=1.0"),
    ],
)
def test_impossible_limits(length, limit, message):
    with pytest.raises(MisconfigurationException, match=message):
        limit_batches(length, limit, name="limit_val_batches")


# what a loader may be


@pytest.mark.parametrize("loader", [DataLoader(Numbers()), [1, 2], iter([]), range(3), torch.arange(3)])
def test_anything_that_can_be_read_is_a_loader(loader):
    check_iterable(loader, "argument `dataloaders`")


@pytest.mark.parametrize("loader", [5, None, "abc", object(), DataLoader])
def test_what_cannot_be_read_is_named_with_its_origin(loader):
    with pytest.raises(TypeError, match="given by `val_dataloader` of `Mine`"):
        check_iterable(loader, "`val_dataloader` of `Mine`")


# advice


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_few_workers(num_workers):
    loader = DataLoader(Numbers(), num_workers=num_workers)
    with pytest.warns(PossibleUserWarning, match=f"`train_dataloader` has {num_workers} workers.*`num_workers=7`"):
        warn_about_settings(loader, stage="train")


def test_no_advice_about_workers_where_they_would_not_help():
    warn_about_settings(DataLoader(TensorDataset(torch.zeros(4))), stage="train")
    warn_about_settings(DataLoader(Numbers(), num_workers=2), stage="train")
    warn_about_settings([1, 2], stage="train")


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_shuffled_evaluation(stage):
    in_memory = TensorDataset(torch.zeros(4))
    with pytest.warns(PossibleUserWarning, match=f"`{stage}_dataloader` has shuffling enabled"):
        warn_about_settings(DataLoader(in_memory, shuffle=True), stage=stage)
    with pytest.warns(PossibleUserWarning, match=f"`{stage}_dataloader` has shuffling enabled"):
        warn_about_settings(
            DataLoader(in_memory, batch_sampler=BatchSampler(RandomSampler(in_memory), 2, False)), stage=stage
        )
    warn_about_settings(DataLoader(in_memory), stage=stage)
    warn_about_settings(DataLoader(in_memory, sampler=WeightedRandomSampler(torch.ones(4), 4)), stage=stage)
    warn_about_settings(DataLoader(in_memory, shuffle=True), stage="train")


def test_workers_that_are_spawned_in_every_epoch():
    context = {"num_workers": 2, "multiprocessing_context": "spawn"}
    with pytest.warns(UserWarning, match="`train_dataloader` are spawned.*`persistent_workers=True`"):
        warn_about_settings(DataLoader(Numbers(), **context), stage="train")
    warn_about_settings(DataLoader(Numbers(), persistent_workers=True, **context), stage="train")


def test_pinned_persistent_loaders_that_are_replaced():
    loader = DataLoader(Numbers(), num_workers=2, pin_memory=True, persistent_workers=True)
    with pytest.warns(PossibleUserWarning, match="`train_dataloader` has `pin_memory=True`.*`reload_dataloaders"):
        warn_about_settings(loader, stage="train", reloaded=True)
    warn_about_settings(loader, stage="train")


# made again


def test_a_loader_keeps_its_other_arguments():
    generator = torch.Generator()
    loader = DataLoader(
        Numbers(), 2, True, num_workers=2, collate_fn=list, drop_last=True, generator=generator, prefetch_factor=3
    )
    loader.note = "mine"
    again = rebuild_loader(loader, sampler=[4, 3, 2])
    assert (again.sampler, again.batch_size, again.drop_last) == ([4, 3, 2], 2, True)
    assert (again.num_workers, again.prefetch_factor, again.collate_fn, again.generator) == (2, 3, list, generator)
    assert again.note == "mine"
    assert isinstance(loader.sampler, RandomSampler)


def test_a_loader_without_batches_gets_its_sampler():
    assert list(rebuild_loader(DataLoader(Numbers(), batch_size=None), sampler=[3])) == [3]


class Passing(DataLoader):
    def __init__(self, number, **kwargs):
        super().__init__(Numbers(number), **kwargs)


class Variadic(DataLoader):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Deeper(Passing):
    def __init__(self, twice, number=4, **kwargs):
        super().__init__(twice * number, **kwargs)


class Closed(DataLoader):
    def __init__(self, size):
        self.size = size
        super().__init__(Numbers(size), batch_size=2, shuffle=True)


class Keeping(DataLoader):
    def __init__(self, colour, dataset, **kwargs):
        self.colour = colour
        super().__init__(dataset, **kwargs)


class Inheriting(DataLoader):
    pass


def test_recorded_subclasses_are_made_again():
    with record_arguments():
        made = [
            Passing(5, batch_size=2, shuffle=True),
            Variadic(Numbers(5), 2, True),
            Deeper(1, number=5, batch_size=2),
            Inheriting(Numbers(5), 2),
        ]
    for loader in made:
        again = rebuild_loader(loader, sampler=[4, 3, 2])
        assert type(again) is type(loader)
        assert batches_of(again) == [[4, 3], [2]]
        # What was made again can be made again.
        assert batches_of(rebuild_loader(again, sampler=[1])) == [[1]]
        assert batches_of(for_prediction(loader))[-1] == [4] or isinstance(loader.sampler, RandomSampler)


def test_recording_leaves_the_classes_as_they_were():
    before = [cls.__init__ for cls in (DataLoader, BatchSampler, Passing, Deeper)]
    with pytest.raises(ZeroDivisionError), record_arguments(), record_arguments():
        1 / 0  # noqa: B018
    assert [cls.__init__ for cls in (DataLoader, BatchSampler, Passing, Deeper)] == before


def test_attributes_stand_in_for_a_record():
    again = rebuild_loader(Keeping("red", Numbers(5), batch_size=2), sampler=[4, 3, 2])
    assert again.colour == "red"
    assert batches_of(again) == [[4, 3], [2]]


def test_what_is_missing_is_named():
    with pytest.raises(MisconfigurationException, match=r"`Passing`.*\['number'\] are not known.*self.number = number"):
        rebuild_loader(Passing(5), sampler=[0])
    with pytest.raises(MisconfigurationException, match=r"`Closed`.*'sampler'.*\*\*kwargs"):
        rebuild_loader(Closed(5), sampler=[0])


class Every(BatchSampler):
    """Takes what a batch sampler has to take."""


class Own(BatchSampler):
    def __init__(self, sampler, colour):
        super().__init__(sampler, 2, True)


class Foreign:
    def __init__(self, size):
        self.length = size

    def __iter__(self):
        return iter([[i] for i in range(self.length)])

    def __len__(self):
        return self.length


def test_custom_batch_samplers_get_the_new_sampler():
    with record_arguments():
        own = Own(range(5), "red")
    for batch_sampler in (BatchSampler(range(5), 2, True), Every(range(5), 2, True), own):
        again = rebuild_loader(DataLoader(Numbers(), batch_sampler=batch_sampler), sampler=[4, 3, 2])
        assert type(again.batch_sampler) is type(batch_sampler)
        assert batches_of(again) == [[4, 3]]
    for batch_sampler in (Own(range(5), "red"), Foreign(3)):
        with pytest.raises(TypeError, match=f"`{type(batch_sampler).__name__}` has to be made again"):
            rebuild_loader(DataLoader(Numbers(), batch_sampler=batch_sampler), sampler=[4, 3, 2])


# overfit_batches


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Numbers(), 2, shuffle=True),
        DataLoader(Numbers(), 2, sampler=SubsetRandomSampler([3, 4])),
        DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), 2, False)),
    ],
)
def test_overfitting_reads_in_order(loader):
    with pytest.warns(UserWarning, match="`overfit_batches`.*off"):
        again = disable_shuffling(loader)
    assert batches_of(again) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Numbers(), 2),
        DataLoader(Numbers(), batch_sampler=BatchSampler(range(5), 2, False)),
        DataLoader(Numbers(), batch_sampler=Foreign(3)),
        DataLoader(Stream(), 2),
        [1, 2],
    ],
)
def test_overfitting_leaves_ordered_loaders_alone(loader):
    assert disable_shuffling(loader) is loader


# prediction


def test_prediction_never_drops_samples_and_knows_which_it_saw():
    for loader in (
        DataLoader(Numbers(), 2, drop_last=True),
        DataLoader(Numbers(), batch_sampler=BatchSampler(SequentialSampler(Numbers()), 2, True)),
        DataLoader(Numbers(), batch_sampler=Every(SequentialSampler(Numbers()), 2, True)),
        DataLoader(Numbers(), 2, num_workers=1),
    ):
        again = for_prediction(loader)
        assert len(again) == 3
        assert batches_of(again) == batches_of(again) == [[0, 1], [2, 3], [4]]
        recorder = again.batch_sampler
        assert isinstance(recorder, IndexRecorder)
        assert recorder.seen_indices == [[0, 1], [2, 3], [4]]
        assert (recorder.batch_size, recorder.drop_last) == (2, False)


def test_indices_are_known_while_a_shuffled_loader_is_read():
    loader = for_prediction(DataLoader(Numbers(), 2, shuffle=True))
    for i, batch in enumerate(loader):
        assert loader.batch_sampler.seen_indices[i] == batch.tolist()


@pytest.mark.parametrize("loader", [DataLoader(Stream(), 2), DataLoader(Numbers(), batch_size=None), [1, 2]])
def test_loaders_that_choose_no_batches_stay_as_they_are(loader):
    assert for_prediction(loader) is loader


def test_batch_samplers_that_cannot_give_the_last_batch():
    with record_arguments():
        own = Own(range(5), "red")
    with pytest.warns(UserWarning, match="miss the last, incomplete batch, which `Own` drops"):
        assert batches_of(for_prediction(DataLoader(Numbers(), batch_sampler=own))) == [[0, 1], [2, 3]]
    with pytest.warns(PossibleUserWarning, match="`Foreign` has no `drop_last`"):
        assert batches_of(for_prediction(DataLoader(Numbers(), batch_sampler=Foreign(2)))) == [[0], [1]]


# epochs, workers


class Epochs(SequentialSampler):
    def set_epoch(self, epoch):
        self.epoch = epoch


def test_every_sampler_that_cares_is_told_the_epoch():
    own, batched, nested = (Epochs(Numbers()) for _ in range(3))
    set_epoch(DataLoader(Numbers(), sampler=own), 3)
    set_epoch(DataLoader(Numbers(), batch_sampler=BatchSampler(batched, 2, False)), 4)
    set_epoch(CombinedLoader([[1], for_prediction(DataLoader(Numbers(), sampler=nested))]), 5)
    set_epoch([1, 2], 6)
    assert (own.epoch, batched.epoch, nested.epoch) == (3, 4, 5)


def test_workers_are_seeded_if_asked_for(monkeypatch):
    loader = DataLoader(Numbers())
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    seed_workers(loader, rank=1)
    assert loader.worker_init_fn is None
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    seed_workers(loader, rank=1)
    assert loader.worker_init_fn.keywords == {"rank": 1}
    mine = DataLoader(Numbers(), worker_init_fn=print)
    seed_workers(mine, rank=1)
    assert mine.worker_init_fn is print
    seed_workers([1, 2], rank=1)


def test_workers_are_shut_down():
    loader = DataLoader(Numbers(), 2, num_workers=1, persistent_workers=True)
    combined = CombinedLoader([loader])
    assert [batch[0].tolist() for batch, _, _ in combined] == [[0, 1], [2, 3], [4]]
    workers = loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    shutdown_workers(combined)
    assert not any(worker.is_alive() for worker in workers)
    assert batches_of(loader) == [[0, 1], [2, 3], [4]]
    shutdown_workers(loader)
    shutdown_workers(iter(loader))
    shutdown_workers([1, 2])
