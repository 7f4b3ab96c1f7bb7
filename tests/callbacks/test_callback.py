"""The base class: what it offers, and that it names every hook of the table."""

from __future__ import annotations

import inspect

import fulmen
from fulmen.callbacks import Callback
from fulmen.hooks import HOOKS


def test_every_hook_of_callbacks_exists_and_does_nothing():
    hooks = [hook.name for hook in HOOKS if "callbacks" in hook.order]
    assert len(hooks) == 37
    for name in hooks:
        parameters = inspect.signature(getattr(Callback(), name)).parameters
        assert list(parameters)[:2] == ["trainer", "pl_module"]
        assert getattr(Callback(), name)(*[None] * len(parameters)) is None


def test_only_evaluation_and_prediction_hooks_know_a_dataloader():
    with_loader = {
        name for name in vars(Callback) if name.startswith("on_") and "dataloader_idx" in takes(getattr(Callback, name))
    }
    assert with_loader == {f"on_{v}_batch_{w}" for v in ("validation", "test", "predict") for w in ("start", "end")}


def takes(function):
    return inspect.signature(function).parameters


def test_state_is_stored_under_the_name_of_the_class():
    class Mine(Callback):
        pass

    assert Callback().state_key == "Callback"
    assert Mine().state_key == Mine.__qualname__
    assert Mine()._generate_state_key(a=1, b="x") == Mine.__qualname__ + "{'a': 1, 'b': 'x'}"
    assert Mine().state_dict() == {}


def test_package_and_top_level_offer_the_same_class():
    assert fulmen.Callback is Callback
    assert "ModelCheckpoint" in dir(fulmen.callbacks)
    assert "EarlyStopping" in fulmen.callbacks.__all__
