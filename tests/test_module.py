"""A `LightningModule` on its own and inside other modules."""

from __future__ import annotations

import copy

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.utilities.errors import LightningDeprecationWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step")


class Outer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Regression(), nn.Linear(2, 2)])


def test_device_and_dtype_follow_the_module_wherever_it_is_moved():
    module = Outer()
    inner = module.inner[0]
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    for move, dtype in (
        (lambda: module.double(), torch.float64),
        (lambda: module.to(torch.bfloat16), torch.bfloat16),
        (lambda: module.half(), torch.float16),
        (lambda: module.float(), torch.float32),
        (lambda: module.type(torch.float64), torch.float64),
        (lambda: module.to(torch.ones(1)), torch.float32),
    ):
        assert move() is module
        assert module.dtype is inner.dtype is dtype and inner.layer.weight.dtype is dtype
    module.to("meta")
    assert module.device == inner.device == torch.device("meta")
    with pytest.raises((RuntimeError, AttributeError)):
        module.dtype = torch.float32


def test_dtype_is_the_default_one_at_construction():
    torch.set_default_dtype(torch.float64)
    try:
        assert Regression().dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_unattached_properties_have_answers():
    module = Regression()
    assert (module.current_epoch, module.global_step, module.global_rank, module.local_rank) == (0, 0, 0, 0)
    assert module.logger is None and not module.loggers
    assert module.automatic_optimization is True and module.strict_loading is True
    assert module.example_input_array is None
    assert module.prepare_data_per_node is True


def test_switches_can_be_set_before_and_after_construction():
    module = Regression()
    module.automatic_optimization, module.strict_loading, module.example_input_array = False, False, torch.ones(4)
    assert module.automatic_optimization is False and module.strict_loading is False
    assert torch.equal(module.example_input_array, torch.ones(4))
    assert "example_input_array" not in module.state_dict()


def test_freezing_and_unfreezing():
    module = Regression()
    assert module.freeze() is module
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert module.unfreeze() is module
    assert module.training and all(p.requires_grad for p in module.parameters())


def test_a_module_can_be_copied_while_it_is_attached():
    module = Regression()
    make_trainer(limit_val_batches=0).fit(module, make_loader())
    clone = copy.deepcopy(module)
    assert torch.equal(clone.layer.weight, module.layer.weight)
    assert clone.layer.weight is not module.layer.weight
    assert clone.hparams == module.hparams


def test_nested_modules_share_the_trainer():
    module = Outer()
    trainer = make_trainer()
    module.trainer = trainer
    assert module.inner[0].trainer is trainer
    module.trainer = None
    with pytest.raises(RuntimeError, match="attached"):
        _ = module.inner[0].trainer


def test_it_is_an_ordinary_module_for_everybody_else():
    module = Regression()
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]
    assert [name for name, _ in module.named_children()] == ["layer"]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.layer.weight.clone()
    module.loss(next(iter(make_loader()))).backward()
    optimizer.step()
    assert not torch.equal(before, module.layer.weight)
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    module(torch.ones(2, 4))
    assert calls == [1]


def test_gathering_on_one_device_changes_nothing():
    class Model(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert self.all_gather(loss) is loss
            assert self.all_gather({"a": 1}) == {"a": torch.tensor(1)}
            return loss

    make_trainer(limit_val_batches=0).fit(Model(), make_loader())


def test_printing_before_and_during_a_run(capsys):
    class Model(Regression):
        def on_train_start(self):
            self.print("during", 1, sep="-")

    model = Model()
    model.print("before")
    make_trainer(limit_val_batches=0).fit(model, make_loader())
    assert capsys.readouterr().out.split() == ["before", "during-1"]


def test_configure_model_makes_layers_when_the_run_begins():
    class Late(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = None

        def configure_model(self):
            if self.layer is None:
                self.layer = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).mean()

        def validation_step(self, batch, batch_idx): ...
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Late()
    trainer = make_trainer(precision="64-true")
    trainer.fit(model, make_loader())
    layer = model.layer
    assert layer.weight.dtype is torch.float64
    trainer.validate(model, make_loader(), verbose=False)
    assert model.layer is layer


def test_the_older_hook_that_makes_layers_still_does():
    class Late(Regression):
        def __init__(self):
            super().__init__()
            self.layer = None

        def configure_sharded_model(self):
            self.layer = self.layer or nn.Linear(4, 1)

    class Both(Late):
        def configure_model(self):
            raise AssertionError

    model = Late()
    with pytest.warns(LightningDeprecationWarning, match=r"`Late.configure_sharded_model` is deprecated. Rename it"):
        make_trainer(limit_val_batches=0).fit(model, make_loader())
    assert isinstance(model.layer, nn.Linear)
    with pytest.raises(RuntimeError, match="`Both` has `configure_model` and `configure_sharded_model`"):
        make_trainer().fit(Both(), make_loader())


def test_hooks_may_call_the_versions_they_replace():
    """`super().hook(...)` works for every hook, whatever it is given."""

    class Model(Regression):
        pass

    called = set()
    for name in dir(pl.LightningModule):
        if not name.startswith("on_") or not callable(getattr(pl.LightningModule, name)):
            continue

        def hook(self, *args, name=name, **kwargs):
            called.add(name)
            return getattr(super(Model, self), name)(*args, **kwargs)

        setattr(Model, name, hook)
    trainer = make_trainer(num_sanity_val_steps=1)
    model = Model()
    trainer.fit(model, make_loader(), make_loader())
    trainer.test(model, make_loader(), verbose=False)
    trainer.predict(model, make_loader())
    assert trainer.global_step == 3
    hooks = {name for name in dir(pl.LightningModule) if callable(getattr(Model, name)) and name.startswith("on_")}
    assert hooks - called == {"on_load_checkpoint", "on_save_checkpoint"}
