"""Arguments of running constructors, and attributes looked for in several places."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch

import fulmen as pl
from fulmen.utilities.memory import garbage_collection_cuda, is_oom_error, recursive_detach
from fulmen.utilities.parsing import (
    clean_namespace,
    collect_init_args,
    get_init_args,
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
    parse_class_init_keys,
    save_hyperparameters,
)


class Base:
    def __init__(self, size, *rest, depth=2, **more):
        super().__init__()
        self.own = get_init_args(inspect.currentframe())
        self.all = collect_init_args(inspect.currentframe(), [])
        self.of_base = collect_init_args(inspect.currentframe(), [], classes=(Other,))


class Derived(Base):
    def __init__(self, name, **kwargs):
        super().__init__(3, "rest", depth=1, extra=kwargs["extra"])


class Other: ...


def test_arguments_are_read_from_the_constructors_that_run():
    made = Derived("a", extra=5)
    assert made.own == {"size": 3, "depth": 1, "extra": 5}
    assert made.all == [made.own, {"name": "a", "extra": 5}] and made.of_base == []
    assert get_init_args(inspect.currentframe()) == {} and collect_init_args(inspect.currentframe(), []) == []
    assert parse_class_init_keys(Base) == ("self", "rest", "more")
    assert parse_class_init_keys(Derived) == ("self", None, "kwargs")


def test_what_cannot_be_pickled_is_removed_by_name():
    hparams = {"lr": 0.1, "lock": threading.Lock()}
    with pytest.warns(UserWarning, match="`lock` was removed"):
        clean_namespace(hparams)
    assert hparams == {"lr": 0.1}


def test_attributes_are_looked_for_in_the_module_its_hyper_parameters_and_the_datamodule():
    class Model(pl.LightningModule):
        def __init__(self, lr=0.1):
            super().__init__()
            save_hyperparameters(self)

    model, data = Model(), pl.LightningDataModule()
    model.trainer = trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer.datamodule, data.batch_size = data, 4
    assert lightning_getattr(model, "lr") == 0.1 and lightning_getattr(model, "batch_size") == 4
    model.lr = 0.5
    lightning_setattr(model, "lr", 0.2)
    assert (model.lr, model.hparams.lr) == (0.2, 0.2)
    assert not lightning_hasattr(model, "nowhere")
    for ask in (lambda: lightning_getattr(model, "nowhere"), lambda: lightning_setattr(model, "nowhere", 1)):
        with pytest.raises(AttributeError, match="`nowhere` is not an attribute of Model"):
            ask()


def test_nested_outputs_are_detached_and_errors_of_memory_recognised():
    tensor = torch.ones(2, requires_grad=True)
    detached = recursive_detach({"a": tensor, "b": {"c": tensor}, "d": 1}, to_cpu=True)
    assert not detached["a"].requires_grad and not detached["b"]["c"].requires_grad and detached["d"] == 1
    texts = (
        "CUDA out of memory.",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. x",
        "DefaultCPUAllocator: can't allocate memory",
    )
    assert all(is_oom_error(RuntimeError(text)) for text in texts)
    assert not is_oom_error(RuntimeError("other")) and not is_oom_error(ValueError(texts[0]))
    garbage_collection_cuda()


def test_tied_parameters_are_found_and_tied_again():
    from fulmen.utilities import find_shared_parameters, set_shared_parameters

    def make(tied):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
        if tied:
            model[1][0].weight = model[0].weight
        return model

    assert (
        find_shared_parameters(make(True)) == [["0.weight", "1.0.weight"]] and find_shared_parameters(make(False)) == []
    )
    model = set_shared_parameters(make(False), [["0.weight", "1.0.weight"]])
    assert model[1][0].weight is model[0].weight


def test_a_length_on_all_ranks():
    from fulmen.strategies import SingleDeviceStrategy
    from fulmen.utilities.data import has_len_all_ranks

    class Two(SingleDeviceStrategy):
        def reduce(self, tensor, group=None, reduce_op="mean"):
            return tensor + 2  # what another process has

    one = SingleDeviceStrategy(torch.device("cpu"))
    assert has_len_all_ranks([1, 2], one) and not has_len_all_ranks(iter([1]), one)
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        assert has_len_all_ranks([], one)
    with pytest.raises(RuntimeError, match="`list` within local rank has zero length"):
        has_len_all_ranks([], Two(torch.device("cpu")))
    with pytest.warns(UserWarning, match="within local rank has zero length"):
        assert has_len_all_ranks([], Two(torch.device("cpu")), True)
