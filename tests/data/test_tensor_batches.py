"""`iterate_batches` gives what `iter` gives, to the last bit, and leaves the random generators where `iter` leaves them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from fulmen.data.loaders import IndexRecorder
from fulmen.data.tensor_batches import in_memory_dataset, iterate_batches

SIZE = 23


def tensors(*shapes):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randn(SIZE, *shape, generator=generator) for shape in shapes))


def datasets():
    labelled = TensorDataset(tensors((3, 4)).tensors[0], torch.arange(SIZE))
    numpy = pytest.importorskip("numpy")
    yield "one tensor", tensors((2,))
    yield "image and label", labelled
    yield "range subset", Subset(labelled, range(3, 20))
    yield "split", random_split(labelled, [15, SIZE - 15], generator=torch.Generator().manual_seed(2))[0]
    yield "list subset with repeats", Subset(labelled, [5, 5, 1, 22, 0, 7, 7, 8, 9, 10])
    yield "negative indices", Subset(labelled, [-1, 3, -5, 2, 4, 4, 0])
    yield "numpy subset", Subset(labelled, numpy.arange(20)[::-2].copy())
    yield "tensor subset", Subset(labelled, torch.randperm(17))
    yield "int8 tensor subset", Subset(labelled, torch.arange(9, dtype=torch.int8))
    yield "nested subsets", Subset(Subset(labelled, list(range(20, 2, -1))), [0, 4, 5, 6, 7, 17, 3, 1])


def loader_arguments():
    for batch_size, drop_last, shuffle in itertools.product((1, 4, 50), (False, True), (False, True)):
        yield {"batch_size": batch_size, "drop_last": drop_last, "shuffle": shuffle}


def samplers(n):
    yield RandomSampler(range(n), replacement=True, num_samples=40)
    yield RandomSampler(range(n), num_samples=2 * n + 1)
    yield WeightedRandomSampler(torch.ones(n), 9)
    yield SubsetRandomSampler(range(2, n))
    yield SubsetRandomSampler(range(2, n), generator=torch.Generator().manual_seed(5))
    yield [3, 1, 1, 0, 2]
    yield list(torch.tensor([2, 0, 1, 1]))


def read(get_iterator, loader, seed=7):
    """The batches, and the state of both generators before the first and after the last one."""
    torch.manual_seed(seed)
    own = loader.generator
    if own is not None:
        own.manual_seed(seed + 1)
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            sampler.generator.manual_seed(seed + 2)
    iterator = get_iterator(loader)
    states = [torch.get_rng_state(), own.get_state() if own else None]
    batches = list(iterator)
    return batches, [*states, torch.get_rng_state(), own.get_state() if own else None]


def assert_same(loader):
    expected, expected_states = read(iter, loader)
    found, states = read(iterate_batches, loader)
    assert len(found) == len(expected)
    for batch, other in zip(found, expected):
        assert type(batch) is type(other)
        assert len(batch) == len(other)
        for tensor, twin in zip(batch, other):
            assert (tensor.dtype, tensor.stride(), tensor.device) == (twin.dtype, twin.stride(), twin.device)
            assert torch.equal(tensor, twin)
            assert tensor.requires_grad == twin.requires_grad
    for state, other in zip(states, expected_states):
        assert state is other is None or torch.equal(state, other)


@pytest.mark.parametrize(("name", "dataset"), list(datasets()))
def test_batches_and_generators_are_those_of_the_loader(name, dataset):
    assert in_memory_dataset(DataLoader(dataset)) is not None
    for arguments in loader_arguments():
        assert_same(DataLoader(dataset, **arguments))
        assert_same(DataLoader(dataset, generator=torch.Generator(), **arguments))
    for sampler in samplers(len(dataset)):
        assert_same(DataLoader(dataset, 3, sampler=sampler))
        assert_same(DataLoader(dataset, 3, sampler=sampler, drop_last=True, generator=torch.Generator()))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64],
)
def test_every_dtype_keeps_its_bits(dtype):
    data = torch.arange(SIZE * 2).reshape(SIZE, 2).remainder(7).to(dtype)
    for shuffle in (False, True):
        assert_same(DataLoader(TensorDataset(data), 4, shuffle=shuffle))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1, 28, 28), (3, 1, 1), (1, 1, 1), (2, 1, 3), (1, 2, 3, 4)])
def test_every_shape_keeps_its_memory_layout(shape):
    for arguments in loader_arguments():
        assert_same(DataLoader(tensors(shape, (2,)), **arguments))


def test_not_a_number_and_negative_zero_survive():
    data = torch.tensor([[float("nan"), -0.0], [float("inf"), 0.0], [-0.0, float("nan")]])
    found = torch.cat([batch for (batch,) in iterate_batches(DataLoader(TensorDataset(data), 2, sampler=[2, 0, 1]))])
    assert torch.equal(found.view(torch.int32), data[[2, 0, 1]].view(torch.int32))


def test_batches_do_not_share_memory_with_the_data():
    dataset = tensors((3,))
    before = dataset.tensors[0].clone()
    for shuffle in (False, True):
        for (batch,) in iterate_batches(DataLoader(dataset, 4, shuffle=shuffle)):
            batch.zero_()
    assert torch.equal(dataset.tensors[0], before)


def test_leaving_the_loop_early_costs_the_same_random_numbers():
    loader = DataLoader(tensors((3,)), 4, shuffle=True)
    states = []
    for get_iterator in (iter, iterate_batches):
        torch.manual_seed(3)
        iterator = get_iterator(loader)
        next(iterator)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_batch_samplers_of_any_kind_are_read_as_they_are():
    class Halves(BatchSampler):
        def __iter__(self):
            yield from ([0, 1, 2], [5, 4], [torch.tensor(3), 1], (2, 3))

    dataset = tensors((3,))
    assert_same(DataLoader(dataset, batch_sampler=Halves(range(6), 3, False)))
    assert_same(DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 5, True)))
    recorder = IndexRecorder(BatchSampler(RandomSampler(dataset), 5, False))
    assert_same(DataLoader(dataset, batch_sampler=recorder))
    assert sorted(itertools.chain(*recorder.seen_indices)) == list(range(SIZE))


@pytest.mark.parametrize("indices", [[0, SIZE], [0, -SIZE - 1], [1.0, 2.0]])
def test_wrong_indices_fail_as_they_do_in_the_loader(indices):
    loader = DataLoader(tensors((3,)), 2, sampler=indices)
    with pytest.raises(Exception) as expected:
        list(loader)
    with pytest.raises(expected.type):
        list(iterate_batches(loader))


def test_wrong_subset_indices_fail_as_they_do_in_the_loader():
    for indices in ([0, SIZE], [0, 1]):
        loader = DataLoader(Subset(tensors((3,)), indices), 2, sampler=[0, 1, 2])
        with pytest.raises(IndexError):
            list(loader)
        with pytest.raises(IndexError):
            list(iterate_batches(loader))


class Doubled(TensorDataset):
    def __getitem__(self, index):
        return tuple(2 * tensor for tensor in super().__getitem__(index))


class Counting(DataLoader):
    def __iter__(self):
        self.opened = getattr(self, "opened", 0) + 1
        return super().__iter__()


def unusual_loaders():
    dataset = tensors((3,))
    yield "dataset subclass", DataLoader(Doubled(*dataset.tensors), 4)
    yield "loader subclass", Counting(dataset, 4, shuffle=True)
    yield "own collate", DataLoader(dataset, 4, collate_fn=lambda samples: [default_collate(samples)[0] + 1])
    yield "no batches", DataLoader(dataset, batch_size=None)
    yield "needs grad", DataLoader(TensorDataset(torch.randn(5, 2, requires_grad=True)), 2)
    yield "transposed", DataLoader(TensorDataset(torch.randn(4, 5).t()), 2, shuffle=True)
    yield "channels last", DataLoader(TensorDataset(torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last)), 4)
    yield "conjugated", DataLoader(TensorDataset(torch.randn(6, 2, dtype=torch.cfloat).conj()), 4)
    yield "worker", DataLoader(dataset, 4, num_workers=1)


@pytest.mark.parametrize(("name", "loader"), list(unusual_loaders()))
def test_everything_else_is_left_to_the_loader(name, loader):
    assert in_memory_dataset(loader) is None
    assert_same(loader)


def test_a_changed_collate_table_is_respected():
    from torch.utils.data._utils.collate import default_collate_fn_map

    loader = DataLoader(tensors((3,)), 4)
    default_collate_fn_map[tuple] = lambda batch, *, collate_fn_map=None: "mine"
    try:
        assert list(iterate_batches(loader)) == ["mine"] * 6
    finally:
        del default_collate_fn_map[tuple]
    assert in_memory_dataset(loader) is not None


def test_any_iterable_can_be_iterated():
    class Numbers(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return index

    assert list(iterate_batches([1, 2])) == [1, 2]
    assert [batch.tolist() for batch in iterate_batches(DataLoader(Numbers(), 2))] == [[0, 1], [2, 3], [4]]


@pytest.mark.gpu
def test_data_on_the_gpu_is_indexed_there():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    data = tensors((3,), (1, 4))
    mixed = TensorDataset(data.tensors[0].cuda(), data.tensors[1])
    for arguments in loader_arguments():
        assert_same(DataLoader(mixed, **arguments))
