"""Several loaders read as one: which batches come, in which shape, and when each loader is opened."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset

from fulmen.data.combined import CombinedLoader

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")


class Letters:
    """Gives a0, a1, …; notes in ``events`` when it is opened and read."""

    def __init__(self, name, size, events=None):
        self.name, self.size, self.events = name, size, [] if events is None else events

    def __iter__(self):
        self.events.append(f"open {self.name}")
        return self.read()

    def read(self):
        for i in range(self.size):
            self.events.append(f"{self.name}{i}")
            yield f"{self.name}{i}"
        self.events.append(f"end {self.name}")


class Sized(Letters):
    def __len__(self):
        return self.size


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


class Shrinking:
    """Gives three batches, then two, then one."""

    size = 4

    def __iter__(self):
        self.size -= 1
        return iter(range(self.size))


class Stateful(Sized):
    def state_dict(self):
        return {"name": self.name}

    def load_state_dict(self, state):
        self.events.append(state)


def events_of(mode, sizes, limits=None):
    events = []
    combined = CombinedLoader([Sized("abc"[i], size, events) for i, size in enumerate(sizes)], mode)
    combined.limits = limits
    iter(combined)
    events.append("|")
    while next(combined, None) is not None:
        events.append("|")
    return ",".join(events)


@pytest.mark.parametrize("kind", [Letters, Sized])
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [({"a": "a0", "b": "b0"}, 0, 0), ({"a": "a1", "b": "b1"}, 1, 0)]),
        (
            "max_size_cycle",
            [({"a": "a0", "b": "b0"}, 0, 0), ({"a": "a1", "b": "b1"}, 1, 0), ({"a": "a2", "b": "b0"}, 2, 0)],
        ),
        ("max_size", [({"a": "a0", "b": "b0"}, 0, 0), ({"a": "a1", "b": "b1"}, 1, 0), ({"a": "a2", "b": None}, 2, 0)]),
        ("sequential", [("a0", 0, 0), ("a1", 1, 0), ("a2", 2, 0), ("b0", 0, 1), ("b1", 1, 1)]),
    ],
)
def test_the_four_modes(kind, mode, expected):
    combined = CombinedLoader({"a": kind("a", 3), "b": kind("b", 2)}, mode)
    assert list(combined) == expected
    assert list(combined) == expected
    assert combined.num_batches() == (len(expected) if kind is Sized else math.inf)


def test_an_exhausted_loader_is_opened_again_when_its_next_batch_is_asked_for():
    assert events_of("max_size_cycle", [3, 2]) == "open a,open b,|,a0,b0,|,a1,b1,|,a2,end b,open b,b0,|,end a"


def test_sequential_mode_opens_a_loader_when_its_turn_comes():
    assert events_of("sequential", [1, 0, 2]) == "open a,|,a0,|,end a,open b,end b,open c,c0,|,c1,|,end c"


def test_sequential_mode_reads_nothing_beyond_a_limit():
    assert events_of("sequential", [3, 2], limits=2) == "open a,|,a0,|,a1,|,open b,b0,|,b1,|"
    assert events_of("sequential", [2, 2], limits=[0, 1]) == "open a,|,open b,b0,|"


def test_shortest_mode_stops_reading_with_the_first_exhausted_loader():
    assert events_of("min_size", [2, 1]) == "open a,open b,|,a0,b0,|,a1,end b"


@pytest.mark.parametrize("mode", MODES)
def test_empty_loaders(mode):
    assert list(CombinedLoader([[], []], mode)) == []
    found = list(CombinedLoader([Sized("a", 0), Sized("b", 2)], mode))
    padded = [([None, "b0"], 0, 0), ([None, "b1"], 1, 0)]
    expected = {"max_size": padded, "max_size_cycle": padded, "sequential": [("b0", 0, 1), ("b1", 1, 1)]}
    assert found == expected.get(mode, [])


def test_a_source_that_cannot_begin_again_is_named():
    for used_up in ((number for number in range(2)), DataLoader(Nothing(), batch_size=1)):
        combined = iter(CombinedLoader({"a": range(4), "b": used_up}, "max_size_cycle"))
        with pytest.raises(RuntimeError, match=rf"source 1, a `{type(used_up).__name__}`.*used up"):
            list(combined)


def test_a_source_that_is_shorter_when_it_begins_again_is_read_as_often_as_it_takes():
    found = list(CombinedLoader([range(6), Shrinking()], "max_size_cycle"))
    assert [batch[1] for batch, *_ in found] == [0, 1, 2, 0, 1, 0]
    assert [batch[0] for batch, *_ in found] == list(range(6))


@pytest.mark.parametrize(("mode", "total"), list(zip(MODES, (1, 2, 2, 3))))
def test_as_many_batches_come_as_the_limits_and_the_length_say(mode, total):
    combined = CombinedLoader([range(5), range(3)], mode)
    assert combined.limits is None
    combined.limits = [1, 2]
    assert combined.loader_lengths() == [1, 2]
    assert len(list(combined)) == len(combined) == combined.num_batches() == total


def test_a_limited_cycle_still_reads_the_shorter_loader_to_its_end():
    combined = CombinedLoader([Sized("a", 5), Sized("b", 3)], "max_size_cycle")
    combined.limits = [3, 1]
    assert [batch for batch, _, _ in combined] == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]


def test_limits_stand_in_for_unknown_lengths():
    combined = CombinedLoader([Letters("a", 5), Letters("b", 3)], "sequential")
    combined.limits = 2
    assert combined.limits == [2, 2]
    assert len(list(combined)) == len(combined) == 4


def test_one_limit_for_each_loader():
    combined = CombinedLoader([range(5), range(3)])
    with pytest.raises(ValueError, match="Mismatch in number of limits: 1 for 2 iterables"):
        combined.limits = [1]


def test_the_length_is_known_after_iter():
    combined = CombinedLoader([range(5), range(3)])
    with pytest.raises(RuntimeError, match="iter"):
        len(combined)
    assert iter(combined) is combined
    assert len(combined) == 3
    combined.reset()
    with pytest.raises(RuntimeError, match="iter"):
        len(combined)
    with pytest.raises(RuntimeError, match="iter"):
        next(combined)


def test_without_lengths_there_is_no_length():
    combined = CombinedLoader([Letters("a", 2)])
    iter(combined)
    with pytest.raises(TypeError, match="no length"):
        len(combined)


def test_iter_starts_again():
    combined = CombinedLoader([Sized("a", 2)], "sequential")
    assert next(iter(combined)) == next(iter(combined)) == ("a0", 0, 0)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match=r"max_size_cicle.*min_size.*Did you mean `max_size_cycle`"):
        CombinedLoader([], "max_size_cicle")


Pair = namedtuple("Pair", "x y")
WITH_DEFAULT = defaultdict(list, a=range(1))


@pytest.mark.parametrize(
    ("iterables", "batch"),
    [
        ([range(2), range(3)], [0, 0]),
        ((range(2), [range(3), {"x": range(1)}]), (0, [0, {"x": 0}])),
        (Pair(range(2), range(2)), Pair(0, 0)),
        (OrderedDict(b=range(2), a=range(2)), OrderedDict(b=0, a=0)),
        (WITH_DEFAULT, defaultdict(list, a=0)),
        ({"a": [1, 2, 3], "b": [4, 5]}, {"a": 1, "b": 4}),
        ([[1, 2], [3, 4]], [1, 3]),
        ([1, 2, 3], 1),
        ((1.5, 2), 1.5),
        (["x", "y"], "x"),
        (range(3), 0),
    ],
)
def test_a_batch_has_the_shape_of_the_iterables(iterables, batch):
    found, _, _ = next(iter(CombinedLoader(iterables)))
    assert found == batch
    assert type(found) is type(batch)


def test_lists_of_numbers_and_empty_containers_are_single_loaders():
    for leaf in ([1, 2], ["a"], (1, "b"), [], {}, "abc", None, 5, torch.arange(3)):
        assert CombinedLoader(leaf).flattened == [leaf]
    assert CombinedLoader([None]).flattened == [None]
    assert CombinedLoader({"a": 5}).flattened == [5]

    class Own(list):
        pass

    own = Own([range(2)])
    assert CombinedLoader(own).flattened[0] is own


def test_loaders_can_be_replaced():
    combined = CombinedLoader({"a": range(3), "b": [range(2)]}, "sequential")
    assert combined.flattened == [range(3), range(2)]
    combined.flattened = [range(1), range(1)]
    assert combined.iterables == {"a": range(1), "b": [range(1)]}
    assert len(list(combined)) == 2
    with pytest.raises(ValueError, match="Mismatch in flattened length"):
        combined.flattened = [range(1)]


def test_samplers_have_the_shape_of_the_iterables():
    loader = DataLoader(range(3))
    assert isinstance(CombinedLoader(loader).sampler, SequentialSampler)
    combined = CombinedLoader({"a": loader, "b": range(3)})
    assert combined.sampler == {"a": loader.sampler, "b": None}
    assert combined.batch_sampler == {"a": loader.batch_sampler, "b": None}


def test_states_of_the_loaders_that_have_one():
    events = []
    combined = CombinedLoader([Stateful("a", 2, events), Sized("b", 3), Stateful("c", 4, events)], "sequential")
    assert combined.state_dict() == [{"name": "a"}, {"name": "c"}]
    combined.load_state_dict([{"at": 1}, {"at": 2}])
    assert events == [{"at": 1}, {"at": 2}]
    with pytest.raises(RuntimeError, match="states of 1 loaders, but 2"):
        combined.load_state_dict([{"at": 1}])


def test_batches_of_tensor_datasets_are_those_of_the_loader():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=3, shuffle=True)
    torch.manual_seed(0)
    expected = [batch[0] for batch in loader]
    torch.manual_seed(0)
    assert all(torch.equal(batch[0], other) for (batch, _, _), other in zip(CombinedLoader(loader), expected))


def test_a_running_loader_can_be_pickled():
    combined = CombinedLoader([range(2), range(3)], "max_size")
    next(iter(combined))
    assert list(pickle.loads(pickle.dumps(combined))) == list(combined)


def test_combined_loaders_can_be_nested():
    inner = CombinedLoader([range(2), range(3)], "sequential")
    outer = CombinedLoader([inner, range(10)], "min_size")
    assert outer.num_batches() == 5
    assert next(iter(outer)) == ([(0, 0, 0), 0], 0, 0)
