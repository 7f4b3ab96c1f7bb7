import copy
import pickle
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch

from fulmen.utilities.collections import AttributeDict, apply_to_collection, extract_batch_size, move_data_to_device
from fulmen.utilities.errors import MisconfigurationException

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Sample:
    image: torch.Tensor
    name: str = "cat"
    extra: list = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    image: torch.Tensor


def test_attributes_and_keys_are_the_same_thing():
    d = AttributeDict(lr=0.1)
    d.size = 3
    assert d == {"lr": 0.1, "size": 3} and d.lr == 0.1
    del d.size
    with pytest.raises(AttributeError, match="size"):
        _ = d.size
    assert isinstance(copy.deepcopy(d), AttributeDict)
    assert pickle.loads(pickle.dumps(d)) == d


def test_attribute_dict_prints_sorted_and_aligned():
    assert repr(AttributeDict(long_name=[1], b="x")) == '"b":         x\n"long_name": [1]'


def test_every_kind_of_container_is_walked():
    double = {
        "list": [1, (2, "two")],
        "ordered": OrderedDict(b=1),
        "default": defaultdict(int, a=1),
        "point": Point(1, None),
        "sample": Sample(torch.ones(1), extra=[1]),
    }
    result = apply_to_collection(double, int, lambda n, k: n * k, 2)
    assert result["list"] == [2, (4, "two")]
    assert isinstance(result["ordered"], OrderedDict) and result["ordered"]["b"] == 2
    assert result["default"]["missing"] == 0 and result["default"]["a"] == 2
    assert result["point"] == Point(2, None)
    assert result["sample"].extra == [2] and double["sample"].extra == [1]


def test_types_can_be_excluded():
    assert apply_to_collection([1, True], int, str, wrong_dtype=bool) == ["1", True]


def test_everything_with_a_to_method_moves():
    class Movable:
        device = "cpu"

        def to(self, device):
            self.device = device  # and returns None: it moved itself

    movable = Movable()
    batch = {"x": torch.ones(2), "y": [movable, "text"], "z": Frozen(torch.ones(1)), "w": Point(torch.ones(1), 3)}
    moved = move_data_to_device(batch, "meta")
    assert moved["x"].is_meta and moved["z"].image.is_meta and moved["w"].x.is_meta
    assert moved["y"][0] is movable and movable.device == torch.device("meta")
    assert not batch["x"].is_meta and moved["w"].y == 3


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ({"names": ["a", "b"], "x": torch.zeros(5)}, 5),
        ([["text"], torch.zeros(4)], 4),
        (Sample(torch.zeros(2)), 2),
        ({"none": None, "x": torch.zeros(6)}, 6),
    ],
)
def test_the_batch_size_is_that_of_the_first_tensor(batch, size):
    assert extract_batch_size(batch) == size


def test_disagreeing_tensors_cause_a_warning():
    with pytest.warns(UserWarning, match="batch_size"):
        assert extract_batch_size([torch.zeros(11, 2), torch.zeros(12)]) == 11


@pytest.mark.parametrize("batch", ["text", ["a"], 3, [], {}, None])
def test_a_batch_without_tensors_has_no_size(batch):
    with pytest.raises(MisconfigurationException, match="batch_size"):
        extract_batch_size(batch)


def test_a_batch_that_contains_itself_is_reported():
    batch: list = []
    batch.append(batch)
    with pytest.raises(RecursionError, match="batch_size"):
        extract_batch_size(batch)
