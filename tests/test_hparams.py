"""`save_hyperparameters`: what is kept, what is forgotten, and what loggers receive."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from argparse import Namespace

import pytest
import torch

import fulmen as pl
from fulmen.hparams import clean_for_loggers, drop_unpicklable


class Base(pl.LightningModule):
    def __init__(self, lr=1, *args, depth=2, **kwargs):
        super().__init__()
        self.save_hyperparameters()


class OneObject(pl.LightningModule):
    def __init__(self, conf, other=2):
        super().__init__()
        self.save_hyperparameters(conf)


def test_all_arguments_are_kept_with_keyword_arguments_flattened():
    module = Base(3, "not kept", extra=5)
    assert module.hparams == {"lr": 3, "depth": 2, "extra": 5}
    assert module.hparams.lr == module.hparams["lr"] == 3
    assert module._hparams_name == "kwargs"


def test_arguments_named_args_and_kwargs_are_arguments_like_others():
    class Odd(pl.LightningModule):
        def __init__(self, args, kwargs=1, *more, **rest):
            super().__init__()
            self.save_hyperparameters()

    assert Odd(3, 4, 5, z=1).hparams == {"args": 3, "kwargs": 4, "z": 1}


def test_a_base_class_keeps_the_arguments_of_the_subclass_whose_values_win():
    class Sub(Base):
        def __init__(self, lr, width=7, **kwargs):
            super().__init__(lr * 10, **kwargs)

    assert Sub(2, extra=1).hparams == {"lr": 2, "width": 7, "depth": 2, "extra": 1}


def test_ignore_in_a_subclass_forgets_what_the_base_class_kept():
    class Sub(Base):
        def __init__(self, lr, width=7):
            super().__init__(lr)
            self.save_hyperparameters(ignore=["depth"])

    assert Sub(2).hparams == Sub(2).hparams_initial == {"lr": 2, "width": 7}


@pytest.mark.parametrize("ignore", ["a", ["a"], ("a",), {"a"}])
def test_ignore_takes_a_name_or_a_collection_of_names(ignore):
    class Module(pl.LightningModule):
        def __init__(self, a, b):
            super().__init__()
            self.save_hyperparameters(ignore=ignore)

    assert Module(1, 2).hparams == {"b": 2}


def test_names_choose_arguments_and_an_unknown_name_is_an_error():
    class Module(pl.LightningModule):
        def __init__(self, learning_rate, b, names):
            super().__init__()
            self.save_hyperparameters(*names)

    assert Module(1, 2, ["b"]).hparams == {"b": 2}
    with pytest.raises(KeyError, match="Did you mean `learning_rate`"):
        Module(1, 2, ["learning_rat"])


def test_the_value_at_the_time_of_the_call_is_kept():
    class Module(pl.LightningModule):
        def __init__(self, width=None):
            super().__init__()
            width = width or 7
            self.save_hyperparameters()

    assert Module().hparams == {"width": 7}


def test_it_may_be_called_by_a_method_of_the_constructor_or_with_a_frame():
    class Module(pl.LightningModule):
        def __init__(self, a):
            super().__init__()
            self.remember()

        def remember(self):
            self.save_hyperparameters()

    class Framed(pl.LightningModule):
        def __init__(self, a):
            super().__init__()
            frame = inspect.currentframe()
            torch.utils.data.default_collate([0])
            self.save_hyperparameters(frame=frame)

    assert Module(3).hparams == Framed(3).hparams == {"a": 3}


def test_a_decorated_constructor_hides_nothing():
    def logged(init):
        @functools.wraps(init)
        def wrapper(self, *args, **kwargs):
            return init(self, *args, **kwargs)

        return wrapper

    class Decorated(pl.LightningModule):
        @logged
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters()

    class Sub(Decorated):
        def __init__(self, b):
            super().__init__(b + 1)

    assert Sub(5).hparams == {"a": 6, "b": 5}


def test_a_module_made_inside_another_constructor_keeps_its_own_arguments_only():
    class Inner(pl.LightningModule):
        def __init__(self, p):
            super().__init__()
            self.save_hyperparameters()

    class Outer(pl.LightningModule):
        def __init__(self, q):
            super().__init__()
            self.inner = Inner(5)
            self.save_hyperparameters()

    outer = Outer(1)
    assert outer.hparams == {"q": 1}
    assert outer.inner.hparams == {"p": 5}


def test_a_dataclass_keeps_the_fields_of_its_constructor():
    @dataclasses.dataclass(eq=False)
    class Module(pl.LightningModule):
        a: int = 1
        b: list = dataclasses.field(default_factory=lambda: [4])
        c: int = dataclasses.field(default=3, init=False)

        def __post_init__(self):
            super().__init__()
            self.save_hyperparameters()

    assert Module(5).hparams == {"a": 5, "b": [4]}


@pytest.mark.parametrize("conf", [{"lr": 3}, Namespace(lr=3)])
def test_the_content_of_one_object_is_kept_under_the_name_of_the_argument(conf):
    module = OneObject(conf)
    assert module.hparams == {"lr": 3}
    assert module.hparams.lr == 3
    assert module._hparams_name == "conf"


def test_a_dict_that_is_no_argument_is_kept_even_without_arguments():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"a": 1, "b": 2}, ignore="b")

    assert Module().hparams == {"a": 1}
    assert Module()._hparams_name is None


@pytest.mark.parametrize("conf", [3, 2.5, True, [1], {1}, (1,), object()])
def test_what_has_no_names_is_refused(conf):
    with pytest.raises(ValueError, match="no names"):
        OneObject(conf)


def test_several_objects_are_refused():
    class Module(pl.LightningModule):
        def __init__(self, a, b):
            super().__init__()
            self.save_hyperparameters(a, b)

    with pytest.raises(ValueError, match="2 objects"):
        Module({"x": 1}, {"y": 2})


def test_calls_add_up():
    class Module(pl.LightningModule):
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters({"x": 1})
            self.save_hyperparameters()

    assert Module(2).hparams == Module(2).hparams_initial == {"x": 1, "a": 2}


def test_hparams_can_be_changed_and_the_initial_ones_cannot():
    module = Base([1])
    module.hparams.lr.append(2)
    module.hparams.new = 4
    module.hparams_initial["lr"] = "changed"
    assert module.hparams == {"lr": [1, 2], "depth": 2, "new": 4}
    assert module.hparams_initial == {"lr": [1], "depth": 2}


def test_without_saving_there_is_an_empty_dict_that_can_be_filled():
    module = pl.LightningModule()
    module.hparams.a = 1
    assert module.hparams == {"a": 1}
    assert module.hparams_initial == {}


def test_values_that_cannot_be_copied_are_shared():
    generator = (number for number in range(3))
    assert Base(generator).hparams_initial["lr"] is generator


def test_a_module_among_the_arguments_is_warned_about():
    with pytest.warns(UserWarning, match=r"is an instance of `nn.Module`.*ignore=\['lr'\]"):
        Base(torch.nn.Linear(1, 1))


def test_what_cannot_be_pickled_is_removed_with_a_warning():
    module = Base(lambda x: x, extra=1)
    with pytest.warns(UserWarning, match="`lr` was removed"):
        drop_unpicklable(module)
    assert module.hparams == {"depth": 2, "extra": 1}


class Data(pl.LightningDataModule):
    def __init__(self, batch_size, lr=1, logger=True):
        super().__init__()
        self.save_hyperparameters(logger=logger, ignore="logger")


def test_loggers_receive_the_initial_values_of_module_and_datamodule():
    module = Base(1, _instantiator="x", _class_path="y")
    module.hparams.lr = 100
    assert clean_for_loggers(module, Data(4)) == {"lr": 1, "depth": 2, "batch_size": 4}
    assert clean_for_loggers(module, None) == {"lr": 1, "depth": 2}
    assert clean_for_loggers(pl.LightningModule(), Data(4, logger=False)) == {}


def test_one_name_with_two_values_cannot_be_logged():
    with pytest.raises(RuntimeError, match=r"\['lr'\]"):
        clean_for_loggers(Base(2), Data(4))
    with pytest.raises(RuntimeError):
        clean_for_loggers(Base(torch.ones(2)), Data(4, torch.zeros(2)))
    shared = object()
    for one, other in (
        (torch.ones(2), torch.ones(2)),
        (torch.ones(2).numpy(), torch.ones(2).numpy()),
        (shared, shared),
    ):
        assert set(clean_for_loggers(Base(one), Data(4, other))) == {"lr", "depth", "batch_size"}
    for one, other in (
        (torch.ones(2), torch.ones(1)),
        (torch.ones(2).numpy(), torch.zeros(2).numpy()),
        (object(), object()),
    ):
        with pytest.raises(RuntimeError):
            clean_for_loggers(Base(one), Data(4, other))
    assert clean_for_loggers(Base(2), Data(4, logger=False)) == {"lr": 2, "depth": 2}
    assert clean_for_loggers(Base(torch.ones(2)), Data(4, torch.ones(2)))["batch_size"] == 4
