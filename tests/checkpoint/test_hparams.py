"""Hyper-parameters in files: whatever they are, they come back, and no code of a file runs that was not asked for."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import functools
import os
import pathlib
import pickle
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.utilities.collections import AttributeDict


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int = 3
    color: Color = Color.RED
    path: pathlib.Path = pathlib.Path("data")


class Out:
    n = 3

    def __eq__(self, other):
        return type(other) is type(self)

    __hash__ = None


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


class Model(Regression):
    def __init__(self, value, other=None, lr=0.1):
        super().__init__(lr)
        self.save_hyperparameters()
        self.loaded = None

    def on_load_checkpoint(self, checkpoint):
        self.loaded = checkpoint["hyper_parameters"]


class Data(pl.LightningDataModule):
    def __init__(self, value, other=None):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return make_loader()


class Bare(Regression):
    """Saves no hyper-parameters of its own accord."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.layer = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


OBJECTS = {
    "object in a dict": {"out": Out(), "lr": 0.1},
    "object in lists": [[Out()]],
    "dataclass": Config(),
    "enum": Color.RED,
    "loss": nn.CrossEntropyLoss(weight=torch.ones(2)),
    "class": nn.ReLU,
    "function": torch.nn.functional.relu,
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "attributes in attributes": AttributeDict(a=AttributeDict(b=[Out()])),
}
DATA = {
    "path": pathlib.Path("x"),
    "paths": [pathlib.PurePosixPath("x")],
    "namespace": argparse.Namespace(a=argparse.Namespace(b=1)),
    "simple namespace": SimpleNamespace(a=1),
    "attributes": AttributeDict(a=AttributeDict(b=1)),
    "time": datetime.timedelta(minutes=1),
    "frozen set": frozenset({1}),
    "type": float,
    "complex": 1j,
    "range": range(3),
}


def save(path, *args, kind=Model, weights_only=None, **kwargs):
    """The file of a short run."""
    trainer, model = make_trainer(max_epochs=1), kind(*args, **kwargs)
    trainer.fit(model, make_loader())
    trainer.save_checkpoint(path, weights_only=weights_only)
    assert torch.load(path, weights_only=True)["global_step"] > 0
    return path


def same(found, value):
    if isinstance(value, nn.Module):
        return type(found) is type(value) and str(found.state_dict()) == str(value.state_dict())
    if isinstance(value, functools.partial):
        return (found.func, found.args, found.keywords) == (value.func, value.args, value.keywords)
    return type(found) is type(value) and found == value


@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`")
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_come_back_from_a_trusted_file_and_from_others_only_where_they_are_allowed(tmp_path, name):
    value = OBJECTS[name]
    path = save(tmp_path / "a.ckpt", value, weights_only=True if name == "enum" else None)
    assert same(Model.load_from_checkpoint(path, weights_only=False).hparams.value, value)
    with pytest.raises(pickle.UnpicklingError, match=r"`value` is a .*weights_only=False.*value=\.\.\."):
        Model.load_from_checkpoint(path)
    given = Model.load_from_checkpoint(path, value=5)
    assert given.hparams.value == given.loaded["value"] == 5
    if name == "object in a dict":
        with torch.serialization.safe_globals([Out]):
            assert Model.load_from_checkpoint(path).hparams.value == value
    if name == "dataclass":
        with torch.serialization.safe_globals([Config, Color]):
            assert Model.load_from_checkpoint(path).hparams.value == value


@pytest.mark.parametrize("name", DATA)
def test_plain_data_in_other_types_comes_back_from_any_file(tmp_path, name):
    before = torch.serialization.get_safe_globals()
    loaded = Model.load_from_checkpoint(save(tmp_path / "a.ckpt", DATA[name]))
    assert same(loaded.hparams.value, DATA[name]) and same(loaded.loaded["value"], DATA[name])
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_paths_of_other_versions_of_python_come_back(tmp_path, monkeypatch, weights_only):
    class PosixPath:
        """What Python 3.13 calls it."""

        def __reduce__(self):
            return PosixPath, ("x",)

        def __deepcopy__(self, memo):
            return self

    with monkeypatch.context() as patch:
        PosixPath.__module__, PosixPath.__qualname__ = "pathlib._local", "PosixPath"
        patch.setitem(sys.modules, "pathlib._local", SimpleNamespace(PosixPath=PosixPath))
        path = save(tmp_path / "a.ckpt", PosixPath())
    assert Model.load_from_checkpoint(path, weights_only=weights_only).hparams.value == pathlib.PosixPath("x")


def test_arrays_come_back_from_any_file(tmp_path):
    numpy = pytest.importorskip("numpy")
    arrays = [numpy.ones((2, 3), "float32"), numpy.arange(3), numpy.array(["a", "bc"]), numpy.array([True])]
    scalars = [numpy.float64(0.1), numpy.int32(2)]
    found = Model.load_from_checkpoint(save(tmp_path / "a.ckpt", arrays, scalars)).hparams
    assert [type(a) for a in found.other] == [type(a) for a in scalars] and found.other == scalars
    assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(found.value, arrays, strict=True))


def test_configurations_come_back_from_any_file_as_what_they_were(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    create = omegaconf.OmegaConf.create
    config = create({"width": 8, "deep": {"list": [1, "x", None], "same": "${width}"}, "path": pathlib.Path("x")})
    omegaconf.OmegaConf.set_readonly(config, True)
    for value in (config, create([1, {"a": 2}]), [config], {"in": config}, config.deep):
        found = Model.load_from_checkpoint(save(tmp_path / "a.ckpt", value)).hparams.value
        assert type(found) is type(value) and found == value
        inside = found[0] if isinstance(found, list) else found
        assert type(inside) is type(value[0] if isinstance(value, list) else value)
    assert Model.load_from_checkpoint(save(tmp_path / "a.ckpt", config.deep)).hparams.value.same == 8
    found = Model.load_from_checkpoint(save(tmp_path / "a.ckpt", config)).hparams.value
    assert omegaconf.OmegaConf.is_readonly(found)


def test_no_code_of_a_stored_object_runs_unless_the_file_is_trusted_and_the_object_is_needed(tmp_path):
    mark = tmp_path / "the payload was here"
    path = save(tmp_path / "a.ckpt", {"inside": Payload(mark)})
    mark.rmdir()  # copying the hyper-parameters for loggers made it
    for load in (torch.load, Model.load_from_checkpoint):
        try:
            load(path)
        except pickle.UnpicklingError as error:
            assert load != torch.load and "mkdir" in str(error)
    make_trainer(max_epochs=2).fit(Model(1), make_loader(), ckpt_path=path)
    make_trainer(max_epochs=2).validate(Model(1), make_loader(), ckpt_path=path)
    assert Model.load_from_checkpoint(path, weights_only=False, value=1).hparams.value == 1
    assert not mark.exists()
    Model.load_from_checkpoint(path, weights_only=False)
    assert mark.exists()


def test_hooks_of_a_continued_run_see_objects_of_a_trusted_file(tmp_path):
    path = save(tmp_path / "a.ckpt", Out(), pathlib.Path("x"))
    for weights_only, expected in ((False, {"value", "other", "lr"}), (None, {"other", "lr"})):
        model = Model(1)
        make_trainer(max_epochs=2).fit(model, make_loader(), ckpt_path=path, weights_only=weights_only)
        assert set(model.loaded) == expected and model.loaded["other"] == pathlib.Path("x")


def test_a_datamodule_gets_its_objects_back_too(tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Regression(), datamodule=Data(Out(), other=pathlib.Path("x")))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Data.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert dict(loaded.hparams) == {"value": Out(), "other": pathlib.Path("x")}
    with pytest.raises(pickle.UnpicklingError, match="`value` is a `Out`"):
        Data.load_from_checkpoint(tmp_path / "a.ckpt")
    assert Data.load_from_checkpoint(tmp_path / "a.ckpt", value=3).hparams.other == pathlib.Path("x")


def test_the_content_of_one_mapping_comes_back_with_its_objects(tmp_path):
    class One(Bare):
        def __init__(self, conf):
            super().__init__()
            self.save_hyperparameters(conf)

    path = save(tmp_path / "a.ckpt", {"out": Out(), "a": 1}, kind=One)
    assert One.load_from_checkpoint(path, weights_only=False).hparams == {"out": Out(), "a": 1}
    assert One.load_from_checkpoint(path, out=2).hparams["out"] == 2
    assert One.load_from_checkpoint(path, conf={"b": 1}).hparams["b"] == 1
    with pytest.raises(pickle.UnpicklingError, match="`out` is a `Out`"):
        One.load_from_checkpoint(path)


def test_what_cannot_be_pickled_is_said_when_it_is_saved_and_named_when_it_is_missed(tmp_path):
    with pytest.warns(UserWarning, match="`value` was removed.*cannot be pickled"):
        path = save(tmp_path / "a.ckpt", lambda: 0, other=3)
    with pytest.raises(
        TypeError, match=r"(?s)missing 1 required.*'value'.*`function` that could not be pickled.*value=\.\.\."
    ):
        Model.load_from_checkpoint(path)
    assert Model.load_from_checkpoint(path, value=1).hparams == {"lr": 0.1, "value": 1, "other": 3}

    class Later(Model):
        def on_train_start(self):
            self.hparams.other = open(os.devnull)  # noqa: SIM115

    with pytest.warns(UserWarning, match="left out of checkpoints.*'other': 'TextIOWrapper'"):
        path = save(tmp_path / "b.ckpt", 1, kind=Later)
    with pytest.warns(UserWarning, match="Defaults take the place.*`other`.*other=..."):
        assert Later.load_from_checkpoint(path).hparams.other is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Later.load_from_checkpoint(path, other=2).hparams.other == 2


def test_a_missing_argument_is_named_with_the_way_to_pass_it(tmp_path):
    class Ignoring(Regression):
        def __init__(self, net, *, width):
            super().__init__()
            self.save_hyperparameters(ignore=["net"])

    class ByPosition(Bare):
        def __init__(self, a, b=2, /, c=3):
            super().__init__()
            self.save_hyperparameters()

    assert ByPosition.load_from_checkpoint(save(tmp_path / "c.ckpt", 5, kind=ByPosition)).hparams == {
        "a": 5,
        "b": 2,
        "c": 3,
    }

    class Silent(Bare):
        def __init__(self, net):
            super().__init__()

    path = save(tmp_path / "a.ckpt", 1, width=2, kind=Ignoring)
    with pytest.raises(
        TypeError, match=r"missing 1 required argument.*'net'.*ignore=.*Ignoring.load_from_checkpoint\(path, net=\.\.\."
    ):
        Ignoring.load_from_checkpoint(path)
    assert Ignoring.load_from_checkpoint(path, net=3).hparams.width == 2
    with pytest.raises(TypeError, match=r"'net'.*`save_hyperparameters\(\)` was not called"):
        Silent.load_from_checkpoint(save(tmp_path / "b.ckpt", 1, kind=Silent))


def test_files_of_others_with_objects_need_trust_and_old_keys_are_read(tmp_path):
    path = save(tmp_path / "a.ckpt", 5)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hyper_parameters": {"value": Out()}}, tmp_path / "objects.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "objects.ckpt", weights_only=False).hparams.value == Out()
    with pytest.raises(pickle.UnpicklingError, match=r"Out.*weights_only=False"):
        Model.load_from_checkpoint(tmp_path / "objects.ckpt")
    arguments = content.pop("hyper_parameters")
    for key in ("hparams", "module_arguments"):
        torch.save({**content, key: arguments}, tmp_path / "old.ckpt")
        assert Model.load_from_checkpoint(tmp_path / "old.ckpt").hparams.value == 5


def test_a_file_of_arguments_that_is_not_there_is_said_and_the_stored_ones_are_used(tmp_path):
    path = save(tmp_path / "a.ckpt", 5)
    for name in ("nowhere.yaml", "nowhere.csv"):
        with pytest.warns(UserWarning, match=f"{name}.*does not exist"):
            assert Model.load_from_checkpoint(path, hparams_file=tmp_path / name).hparams.value == 5
