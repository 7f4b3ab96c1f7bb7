"""Who gives the loaders, and whose batch hooks run."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from fulmen.data.loaders import rebuild_loader
from fulmen.data.sources import KINDS, Sources
from fulmen.utilities.errors import MisconfigurationException


class Base:
    prepare_data_per_node = True

    def prepare_data(self): ...

    def train_dataloader(self):
        raise NotImplementedError

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch

    on_before_batch_transfer = transfer_batch_to_device = on_after_batch_transfer


class ModuleBase(Base):
    pass


class DataBase(Base):
    pass


class Module(ModuleBase):
    def __init__(self):
        self.calls = 0

    def train_dataloader(self):
        self.calls += 1
        return ["from", "module"]

    def val_dataloader(self):
        return ["from", "module"]


class Data(DataBase):
    def train_dataloader(self):
        return ["from", "datamodule"]


def sources(module, **kwargs):
    found = Sources(ModuleBase, DataBase)
    found.attach_data(module, **kwargs)
    return found


def test_an_argument_comes_before_a_hook():
    module, given = Module(), [[1]]
    found = sources(module, train=given)
    assert found.source_of("train").request_loaders() is given
    assert found.source_of("val").request_loaders() == ["from", "module"]
    assert module.calls == 0
    assert found.source_of("train").display_name == "argument `train_dataloaders` of `Trainer.fit`"


def test_the_hook_is_called_anew_for_each_request():
    module = Module()
    source = sources(module).source_of("train")
    assert source.request_loaders() == source.request_loaders() == ["from", "module"]
    assert module.calls == 2
    assert source.display_name == "`train_dataloader` of `Module`"


def test_a_datamodule_answers_for_all_loaders():
    found = sources(Module(), datamodule=Data())
    assert found.source_of("train").request_loaders() == ["from", "datamodule"]
    assert found.source_of("train").display_name == "`train_dataloader` of `Data`"
    # The module has a `val_dataloader`, but a datamodule is in use.
    assert not found.source_of("val").is_defined()
    with pytest.raises(MisconfigurationException, match=r"`val_dataloader` must be implemented.*`Data`.*datamodule"):
        found.source_of("val").request_loaders()


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_messages_name_the_argument_of_the_verb(verb):
    kind = {"validate": "val"}.get(verb, verb)
    source = sources(Module(), **{kind: [1]}, verb=verb).source_of(kind)
    assert source.display_name == f"argument `dataloaders` of `Trainer.{verb}`"


def test_only_hooks_that_are_written_are_defined():
    found = sources(Module())
    assert [kind for kind in KINDS if found.source_of(kind).is_defined()] == ["train", "val"]
    assert [kind for kind in KINDS if sources(object()).source_of(kind).is_defined()] == []
    with pytest.raises(MisconfigurationException, match=r"`test_dataloader` must be implemented.*def test_dataloader"):
        found.source_of("test").request_loaders()


def test_hooks_set_on_the_instance_count_and_none_switches_off():
    module = Module()
    module.test_dataloader = lambda: ["set"]
    module.val_dataloader = None
    found = sources(module)
    assert found.source_of("test").request_loaders() == ["set"]
    assert not found.source_of("val").is_defined()


def test_loaders_made_in_a_hook_can_be_made_again():
    class Own(DataLoader):
        def __init__(self, number, **kwargs):
            super().__init__(range(number), **kwargs)

    module = Module()
    module.train_dataloader = lambda: Own(5, shuffle=True)
    loader = sources(module).source_of("train").request_loaders()
    assert [int(batch) for batch in rebuild_loader(loader, sampler=[4, 0])] == [4, 0]


def test_the_transfer_hook_of_the_datamodule_wins():
    class Moving(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx): ...

        def transfer_batch_to_device(self, batch, device, dataloader_idx): ...

    class MovingData(Data):
        def on_before_batch_transfer(self, batch, dataloader_idx): ...

        def on_after_batch_transfer(self, batch, dataloader_idx): ...

    module, data = Moving(), MovingData()
    found = sources(module, datamodule=data)
    with pytest.warns(UserWarning, match="`on_before_batch_transfer` is overridden in both"):
        assert found.transfer_owner("on_before_batch_transfer", module, data) is data
    with pytest.warns(UserWarning, match="`transfer_batch_to_device` of the module is used"):
        assert found.transfer_owner("transfer_batch_to_device", module, data) is module
    assert found.transfer_owner("on_after_batch_transfer", module, data) is data
    assert found.transfer_owner("on_before_batch_transfer", module) is module


class Preparing:
    def __init__(self, log, per_node=True):
        self.log, self.prepare_data_per_node = log, per_node

    def prepare_data(self):
        self.log.append(type(self).__name__)


class PreparingData(Preparing, DataBase):
    pass


class PreparingModule(Preparing, ModuleBase):
    pass


@pytest.mark.parametrize(
    ("local_rank", "global_rank", "expected"),
    [(0, 0, ["PreparingData", "PreparingModule"]), (0, 4, ["PreparingModule"]), (1, 1, [])],
)
def test_data_is_prepared_once_per_node_or_once_in_all(local_rank, global_rank, expected):
    log = []
    data, module = PreparingData(log, per_node=False), PreparingModule(log)
    sources(module).prepare_data(module, data, local_rank=local_rank, global_rank=global_rank)
    assert log == expected


def test_preparing_is_optional():
    sources(Module()).prepare_data(Module(), None)
    sources(Module()).prepare_data(Module(), Data())
