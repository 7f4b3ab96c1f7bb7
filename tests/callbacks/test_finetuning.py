"""Training the head first and the backbone later."""

from __future__ import annotations

import logging

import pytest
import torch
from support import make_loader, make_trainer
from torch import nn

from fulmen import LightningModule
from fulmen.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint
from fulmen.utilities.errors import MisconfigurationException


class Own(nn.Module):
    """A parameter of its own, and children."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(1)


def trainable(module):
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def test_flat_list_has_leaves_and_owners_of_parameters():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for modules in (inner, [inner], nn.ModuleDict({"a": inner}), nn.ModuleList([inner])):
        assert BaseFinetuning.flatten_modules(modules) == [inner[0], inner[1]]
    own = Own()
    assert BaseFinetuning.flatten_modules([own, inner]) == [own, own.norm, inner[0], inner[1]]


def test_freezing_keeps_batch_norm_unless_told_otherwise():
    own = Own()
    BaseFinetuning.freeze(own)
    assert trainable(own) == ["norm.weight", "norm.bias"]
    BaseFinetuning.freeze(own, train_bn=False)
    assert trainable(own) == []
    assert not own.norm.track_running_stats
    BaseFinetuning.make_trainable(own)
    assert len(trainable(own)) == 3
    assert own.norm.track_running_stats
    BaseFinetuning.freeze_module(own)
    assert trainable(own) == ["norm.weight", "norm.bias"]


def test_parameters_by_kind():
    own = Own()
    own.weight.requires_grad_(False)
    assert len(list(BaseFinetuning.filter_params(own))) == 2
    assert list(BaseFinetuning.filter_params(own, train_bn=False)) == []
    assert list(BaseFinetuning.filter_params(own, requires_grad=False)) == [own.weight]


def test_new_group_has_only_what_is_new():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.5)
    BaseFinetuning.unfreeze_and_add_param_group(second, optimizer)
    assert optimizer.param_groups[1]["lr"] == 0.05
    with pytest.warns(UserWarning, match="4 of the parameters"):
        BaseFinetuning.unfreeze_and_add_param_group([first, second], optimizer, lr=0.3)
    assert len(optimizer.param_groups) == 2


@pytest.fixture
def model(scripted_model):
    class Model(scripted_model):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def training_step(self, batch, batch_idx):
            return self.layer(self.backbone(batch[0].expand(2, 2))).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1)

    return Model


class Rates(Callback):
    """(learning rate, parameters) of each group at the end of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        groups = trainer.optimizers[0].param_groups
        self.seen.append([(round(group["lr"], 6), len(group["params"])) for group in groups])


HEAD = (0.1, 4)  # with the batch norm of the backbone
SCHEDULES = [
    ({"unfreeze_backbone_at_epoch": 2}, [None, None, 0.01, 0.02, 0.04, 0.08]),
    ({"backbone_initial_lr": 0.02, "should_align": False}, [None, 0.02, 0.04, 0.08, 0.16, 0.32]),
    ({"lambda_func": lambda epoch: 10.0}, [None, 0.01, 0.1, 0.1, 0.1, 0.1]),
    ({"lambda_func": float, "backbone_initial_ratio_lr": 0.001, "should_align": False}, [None, 0.0001, 0.0003, 0.0012]),
]


@pytest.mark.parametrize(("arguments", "rates"), SCHEDULES)
def test_backbone_has_its_own_learning_rate(fit, model, arguments, rates):
    seen = Rates()
    fit([BackboneFinetuning(**{"unfreeze_backbone_at_epoch": 1, **arguments}), seen], model(), max_epochs=len(rates))
    assert seen.seen == [[HEAD] if rate is None else [HEAD, (rate, 2)] for rate in rates]


def test_batch_norm_may_stay_frozen(fit, model):
    seen = Rates()
    fit([BackboneFinetuning(1, train_bn=False), seen], model(), max_epochs=2)
    assert seen.seen == [[(0.1, 2)], [(0.1, 2), (0.01, 2)]]


def test_frozen_layers_do_not_move(fit, model):
    module = model()
    before = module.backbone[0].weight.detach().clone()
    fit(BackboneFinetuning(5), module, max_epochs=1)
    assert torch.equal(module.backbone[0].weight, before)


@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_run_has_the_same_groups(fit, model, tmp_path, epoch):
    fit([BackboneFinetuning(1), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], model(), max_epochs=2)
    seen = Rates()
    callbacks = [BackboneFinetuning(1), seen]
    fit(callbacks, model(), max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    every = [[HEAD], [HEAD, (0.01, 2)], [HEAD, (0.02, 2)], [HEAD, (0.04, 2)]]
    assert seen.seen == every[epoch + 1 :]


def test_module_without_backbone(fit):
    with pytest.raises(MisconfigurationException, match="backbone"):
        fit(BackboneFinetuning())


def test_verbose_tells_the_rates(fit, model, caplog):
    with caplog.at_level(logging.INFO, logger="fulmen"):
        fit(BackboneFinetuning(1, verbose=True), model(), max_epochs=2)
    assert "Current lr: 0.1, backbone lr: 0.01" in caplog.text


def scheduled(make):
    """The learning rates of both groups in each epoch, when the second one is added in epoch 1; and after a resume."""

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head, self.rates = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1), []

        def training_step(self, batch, batch_idx):
            self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
            return self.head(self.backbone(batch[0])).pow(2).mean()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=1.0, momentum=0.9)
            return [optimizer], [make(optimizer)]

    class Unfreezes(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                lr = optimizer.param_groups[0]["lr"] / 4
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=lr)

    return Net, Unfreezes


SCHEDULES = {
    "LambdaLR": lambda lr, o: lr.LambdaLR(o, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda lr, o: lr.MultiplicativeLR(o, lambda epoch: 0.5),
    "OneCycleLR": lambda lr, o: lr.OneCycleLR(o, 1.0, total_steps=10),
    "CyclicLR": lambda lr, o: lr.CyclicLR(o, 0.1, 1.0, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda lr, o: lr.CosineAnnealingWarmRestarts(o, 2),
    "ExponentialLR": lambda lr, o: lr.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda lr, o: lr.PolynomialLR(o, 6),
    "SequentialLR": lambda lr, o: lr.SequentialLR(
        o, [lr.LambdaLR(o, lambda epoch: 0.5), lr.LambdaLR(o, lambda epoch: 0.5**epoch)], [2]
    ),
    "ChainedScheduler": lambda lr, o: lr.ChainedScheduler([lr.ExponentialLR(o, 0.9), lr.StepLR(o, 2)]),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:The epoch parameter")
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_group_that_is_added_later_follows_the_schedule_of_the_first_one(kind, tmp_path):
    net, unfreezes = scheduled(lambda optimizer: SCHEDULES[kind](torch.optim.lr_scheduler, optimizer))
    model = net()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(max_epochs=6, callbacks=[unfreezes(), saver], enable_checkpointing=True)
    trainer.fit(model, make_loader(4))
    assert [len(rates) for rates in model.rates] == [1, 2, 2, 2, 2, 2]
    for first, second in model.rates[1:]:
        assert second == pytest.approx(first / 4)
    resumed = net()
    make_trainer(max_epochs=6, callbacks=[unfreezes()]).fit(
        resumed, make_loader(4), ckpt_path=tmp_path / "epoch=2.ckpt"
    )
    assert resumed.rates == model.rates[3:]
