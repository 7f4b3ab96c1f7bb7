"""On a CUDA device: every precision trains, and nothing on the step path waits for the device."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from support import make_trainer
from torch import nn
from torch.nn import functional as F

import fulmen as pl
from fulmen.callbacks import EMAWeightAveraging, GradientNorm, NonFiniteError, NonFiniteGuard
from fulmen.engine.stochastic_rounding import stochastic_round

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STRINGS = ["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
BATCHES, EPOCHS = 24, 6


class Net(pl.LightningModule):
    """Convolutions, batch norm and a classifier of random images that can be told apart."""

    def __init__(self, optimizer="plain"):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        self.optimizer, self.losses = optimizer, []

    def loss(self, batch):
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        fused = {"fused": True} if self.optimizer == "fused" else {}
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **fused)


class Loader:
    """Batches that are there already; a list would be a collection of loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def batches(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (BATCHES, 32), generator=generator)
    prototypes = torch.randn(10, 3, 16, 16, generator=generator)
    noise = torch.randn(BATCHES, 32, 3, 16, 16, generator=generator)
    images = prototypes[labels] + 2 * noise
    return Loader([(x.to(device), y.to(device)) for x, y in zip(images, labels)])


def fit(module, data, **arguments):
    trainer = make_trainer(**{"accelerator": "gpu", "devices": 1, "max_epochs": EPOCHS, **arguments})
    trainer.fit(module, data)
    return trainer


def final(precision, optimizer="plain"):
    torch.manual_seed(1)
    net = Net(optimizer)
    fit(net, batches(), precision=precision)
    return torch.stack(net.losses[-BATCHES:]).double().mean().item()


@pytest.mark.parametrize("optimizer", ["plain", "fused"])
def test_every_precision_ends_near_the_loss_of_32_bits(optimizer):
    reference = final("32-true", optimizer)
    print()
    for precision in STRINGS:
        found = final(precision, optimizer)
        print(f"{precision} {optimizer}: {found:.5f} ({found / reference - 1:+.2%})")
        assert abs(found / reference - 1) < 0.05


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_the_weights_are_those_of_the_loop_written_by_hand(precision):
    torch.manual_seed(1)
    ours = Net()
    theirs = copy.deepcopy(ours).cuda()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        fit(ours, batches(), precision=precision, max_epochs=2, gradient_clip_val=0.5)
        optimizer = theirs.configure_optimizers()
        scaler = torch.amp.GradScaler("cuda", enabled=precision == "16-mixed")
        dtype = AUTOCAST.get(precision)
        for batch in [*batches("cuda"), *batches("cuda")]:
            with torch.autocast("cuda", dtype, cache_enabled=False) if dtype else nullcontext():
                loss = theirs.loss(batch)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    for a, b in zip(ours.parameters(), theirs.cpu().parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class NoWaiting(pl.Callback):
    """From the third batch to the last but one, torch raises where something waits for the device."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            torch.cuda.set_sync_debug_mode("error")
        if batch_idx == BATCHES - 2:
            torch.cuda.set_sync_debug_mode("default")


class Schedules(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}]


class Weighted(Schedules):
    def training_step(self, batch, batch_idx):
        losses = F.cross_entropy(self.layers(batch[0]), batch[1], reduction="none")
        return losses.sum(), (batch[1] < 7).sum()  # a weight that is known on the device only


class Turns(Net):
    def training_step(self, batch, batch_idx):
        yield super().training_step(batch, batch_idx)
        yield self.loss(batch)

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.layers[0], self.layers[-1])]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Schedules, {}),
        (Schedules, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}),
        (Weighted, {"accumulate_grad_batches": 4}),
        (Turns, {"gradient_clip_val": 0.5}),
    ],
    ids=["plain", "windows and clipping", "weights", "turns"],
)
def test_no_step_waits_for_the_device(kind, arguments, precision):
    callbacks = [NonFiniteGuard("stop", every_n_steps=100), GradientNorm(), NoWaiting()]
    if precision.startswith(("32", "bf16-mixed")):
        callbacks.append(EMAWeightAveraging())
    try:
        fit(kind(), batches("cuda"), precision=precision, max_epochs=1, callbacks=callbacks, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_fused_optimizer_under_a_loss_scaler_does_not_wait_either():
    """torch's scaler waits once a step to decide; a fused optimizer decides on the device."""
    try:
        fit(Net("fused"), batches("cuda"), precision="16-mixed", max_epochs=1, callbacks=[NoWaiting()])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_finds_a_fault_with_one_reading_per_window():
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 13 else loss

    with pytest.raises(NonFiniteError, match="batch 13, step 13"):
        fit(Broken(), batches("cuda"), callbacks=[NonFiniteGuard("stop", every_n_steps=20)])
    net = Broken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(net, batches("cuda"), max_epochs=1, callbacks=[NonFiniteGuard("rollback", every_n_steps=4)])
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_rounding_by_chance_on_the_device():
    generator = torch.Generator("cuda").manual_seed(0)
    rounded = stochastic_round(torch.full((400_003,), 1.001, device="cuda"), generator).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert rounded.mean().item() == pytest.approx(1.001, abs=4e-5)


def test_a_run_moves_between_devices_with_its_checkpoint(tmp_path):
    net = Net()
    trainer = fit(net, batches(), precision="16-mixed", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "gpu.ckpt")
    resumed = Net()
    make_trainer(max_epochs=2, limit_train_batches=2, precision="16-mixed").fit(
        resumed, batches(), ckpt_path=tmp_path / "gpu.ckpt"
    )
    assert all(value.isfinite().all() for value in resumed.state_dict().values())
