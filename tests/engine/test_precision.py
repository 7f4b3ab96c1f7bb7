"""Every precision trains; the bits are those of the same loop written by hand, the loss is that of 32 bits within 2 %."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from sklearn.datasets import load_digits
from support import Regression, make_loader, make_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.engine import stochastic_rounding
from fulmen.engine.stochastic_rounding import stochastic_round
from fulmen.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from fulmen.utilities.errors import MisconfigurationException

BATCH, EPOCHS, LAST = 64, 8, 14
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
WEIGHTS = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
STRINGS = ["64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]
# What else may be written for each of them.
ALIASES = {64: "64-true", "64": "64-true", 32: "32-true", "32": "32-true", None: "32-true", 16: "16-mixed"}
ALIASES |= {"16": "16-mixed", "bf16": "bf16-mixed"}


@functools.cache
def digits(size: int) -> TensorDataset:
    """896 handwritten digits as images of `size` x `size`."""
    found = load_digits()
    images = torch.tensor(found.images[:896], dtype=torch.float32)[:, None] / 16
    return TensorDataset(F.interpolate(images, size=(size, size), mode="bilinear"), torch.tensor(found.target[:896]))


class EncoderDecoder(pl.LightningModule):
    """The one of the introduction."""

    size = 28

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))
        self.losses = []

    def loss(self, batch):
        x = batch[0].flatten(1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class ConvNet(EncoderDecoder):
    """Convolutions, batch norm and a classifier."""

    size = 8

    def __init__(self):
        super().__init__()
        del self.encoder, self.decoder
        blocks = ((1, 8), (8, 16))
        layers = [(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)) for i, o in blocks]
        self.layers = nn.Sequential(*sum(layers, ()), nn.Flatten(), nn.Linear(64, 10))

    def loss(self, batch):
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def build(kind):
    torch.manual_seed(11)
    return kind()


def loader(kind):
    return DataLoader(digits(kind.size), batch_size=BATCH)


@functools.cache
def trained(kind, precision):
    module = build(kind)
    trainer = make_trainer(max_epochs=EPOCHS, precision=precision)
    trainer.fit(module, loader(kind))
    return module, trainer


def final_loss(module) -> float:
    return torch.stack(module.losses[-LAST:]).double().mean().item()


def by_hand(kind, precision):
    """The loop: autocast and a scaler for mixed precisions; for 16-true a step of float32 copies."""
    module = build(kind)
    dtype = WEIGHTS.get(precision, torch.float32)
    module.to(dtype)
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    parameters = list(module.parameters())
    wide = [p.detach().float().requires_grad_() for p in parameters] if precision == "16-true" else []
    if wide:
        optimizer.param_groups[0]["params"] = wide
    for _ in range(EPOCHS):
        for x, y in loader(kind):
            autocast = precision in AUTOCAST
            with torch.autocast("cpu", AUTOCAST[precision], cache_enabled=False) if autocast else nullcontext():
                loss = module.loss((x.to(dtype), y))
            module.zero_grad()
            scaler.scale(loss).backward()
            for copy_, p in zip(wide, parameters):
                copy_.data, copy_.grad = p.detach().float(), p.grad.float()
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                for copy_, p in zip(wide, parameters):
                    p.copy_(copy_)
    return module


@pytest.mark.parametrize("kind", [EncoderDecoder, ConvNet])
@pytest.mark.parametrize("precision", STRINGS)
def test_the_final_loss_is_within_two_percent_of_32_bits(kind, precision):
    reference, ours = final_loss(trained(kind, "32-true")[0]), final_loss(trained(kind, precision)[0])
    print(f"\n{kind.__name__} {precision}: {ours:.5f}, 32-true {reference:.5f} ({ours / reference - 1:+.2%})")
    assert abs(ours / reference - 1) <= 0.02
    assert reference < 0.7 * trained(kind, "32-true")[0].losses[0].item()  # something was learned


@pytest.mark.parametrize("kind", [EncoderDecoder, ConvNet])
@pytest.mark.parametrize("precision", ["64-true", "16-mixed", "bf16-mixed", "16-true"])
def test_the_weights_have_the_bits_of_the_loop_written_by_hand(kind, precision):
    ours, theirs = trained(kind, precision)[0], by_hand(kind, precision)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{name} differs by {(a - b).abs().max():.3g}"


def test_bf16_true_keeps_up_where_a_plain_loop_in_bfloat16_falls_behind():
    """Steps and averages too small for the nearest bfloat16 are lost there; here they are rounded up as often as due."""
    reference = final_loss(trained(ConvNet, "32-true")[0])
    module = build(ConvNet).bfloat16()
    optimizer, losses = module.configure_optimizers(), []
    for x, y in [batch for _ in range(EPOCHS) for batch in loader(ConvNet)]:
        loss = module.loss((x.bfloat16(), y))
        module.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    plain = torch.stack(losses[-LAST:]).mean().item() / reference - 1
    ours = final_loss(trained(ConvNet, "bf16-true")[0]) / reference - 1
    print(f"\nfinal loss over that of 32 bits: plain bfloat16 {plain:+.2%}, bf16-true {ours:+.2%}")
    assert plain > 0.05 and abs(ours) < plain / 3


def test_bf16_true_needs_no_more_memory_than_bfloat16():
    module, trainer = trained(ConvNet, "bf16-true")
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values() if value.dim()]
    assert {value.dtype for value in [*states, *module.parameters()]} == {torch.bfloat16}
    assert len(states) == 2 * len(list(module.parameters()))


def test_bf16_true_resumes_in_the_same_bits(tmp_path):
    def run(epochs, **arguments):
        module = build(ConvNet)
        trainer = make_trainer(max_epochs=epochs, precision="bf16-true", limit_train_batches=4)
        trainer.fit(module, loader(ConvNet), **arguments)
        return module, trainer

    whole = run(3)[0]
    run(1)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed = run(3, ckpt_path=tmp_path / "one.ckpt")[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_rounding_by_chance_is_right_on_average_and_leaves_exact_values_alone():
    generator = torch.Generator().manual_seed(0)
    value = torch.full((200_003,), 1.001)  # the neighbours in bfloat16 are 1 and 1.0078125
    rounded = stochastic_round(value.clone(), generator).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert rounded.mean().item() == pytest.approx(1.001, abs=4e-5)
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf"), 2.0**-130])
    assert torch.equal(stochastic_round(exact.clone(), generator).float(), exact)
    assert stochastic_round(torch.tensor([float("nan")]), generator).isnan().all()
    assert stochastic_round(-value, generator).double().mean().item() == pytest.approx(-1.001, abs=4e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_models_are_updated_a_part_at_a_time_with_the_same_result(monkeypatch, dtype):
    """The bound on extra memory splits a step; in float16, where nothing is left to chance, the bits are the same."""
    results = []
    for part in (1 << 24, 10):
        monkeypatch.setattr(stochastic_rounding, "CHUNK_ELEMENTS", part)
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).to(dtype)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for step in range(3):
            net(torch.ones(2, 4, dtype=dtype)).square().mean().backward()
            stochastic_rounding.step_in_float32(optimizer, seed=step)
        assert [len(group["params"]) for group in optimizer.param_groups] == [4]
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
        results.append(torch.cat([p.detach().flatten().float() for p in net.parameters()]))
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float16 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.filterwarnings("ignore:.*old name")
@pytest.mark.parametrize(("written", "meant"), ALIASES.items(), ids=map(repr, ALIASES))
def test_other_ways_to_write_a_precision(written, meant):
    trainer = make_trainer(precision=written)
    assert trainer.precision == meant
    assert (trainer.scaler is not None) == (meant == "16-mixed")


# ---------------------------------------------------------------------- what a module sees


@pytest.mark.parametrize("precision", WEIGHTS)
def test_modules_inputs_and_new_tensors_have_the_dtype(precision):
    seen, dtype = [], WEIGHTS[precision]

    class Model(Regression):
        def configure_model(self):
            self.late = nn.Linear(4, 1)
            seen.append(self.late.weight.dtype)

        def training_step(self, batch, batch_idx):
            seen.extend([batch[0].dtype, torch.zeros(1).dtype, self.layer.weight.dtype])
            return self.loss(batch)

    trainer = make_trainer(precision=precision, limit_train_batches=1)
    trainer.fit(Model(), make_loader())
    assert seen == [dtype] * 4
    assert torch.zeros(1).dtype == torch.float32  # put back
    with trainer.init_module():
        assert nn.Linear(2, 2).weight.dtype == dtype


def test_inputs_that_are_no_floats_stay_as_they_are_and_outputs_come_back():
    for precision, dtype in ((HalfPrecision("bf16-true"), torch.bfloat16), (DoublePrecision(), torch.float64)):
        given = {"x": torch.ones(2), "y": torch.tensor([1]), "z": [torch.tensor([True])], "n": 3}
        found = precision.convert_input(given)
        dtypes = [found["x"].dtype, found["y"].dtype, found["z"][0].dtype]
        assert dtypes == [dtype, torch.int64, torch.bool] and found["n"] == 3
        assert precision.convert_output(found)["x"].dtype == torch.float32
    mixed = MixedPrecision("bf16-mixed", "cpu")
    assert mixed.convert_input(given)["x"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["64-true", "32-true", "16-true", "bf16-true", "bf16-mixed"])
def test_clipping_by_norm_and_value_holds_in_every_precision(precision):
    """In 16-true the norm of these gradients is beyond the largest float16: it must not come out as infinite."""
    bounds = []

    class Model(Regression):
        def on_after_backward(self):
            for p in self.parameters():
                p.grad.fill_(40_000.0)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            gradients = torch.cat([p.grad.flatten().float() for p in self.parameters()])
            bounds.append((gradients.norm().item(), gradients.abs().max().item()))

    for algorithm, index in (("norm", 0), ("value", 1)):
        bounds.clear()
        make_trainer(
            precision=precision, gradient_clip_val=2.0, gradient_clip_algorithm=algorithm, limit_train_batches=1
        ).fit(Model(), make_loader())
        assert bounds[0][index] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("make_optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_16_true_keeps_states_that_float16_cannot_hold(make_optimizer, tmp_path):
    """Squares of gradients below 2e-4 are zero in float16, and so is `eps`: the update would be 0 / 0."""

    class Small(Regression):
        def loss(self, batch):
            return super().loss(batch) * 1e-4

        def configure_optimizers(self):
            return make_optimizer(self.parameters(), lr=0.01)

    whole = Small()
    half, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
    before = whole.layer.weight.detach().clone()
    make_trainer(precision="16-true", max_epochs=4).fit(whole, make_loader())
    weight = whole.layer.weight.detach()
    assert weight.dtype == torch.float16 and weight.isfinite().all()
    assert ((weight.float() - before).abs() > 1e-3).all()
    # A resumed run goes on with those states, bit for bit.
    first = make_trainer(precision="16-true", max_epochs=2)
    first.fit(half, make_loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(precision="16-true", max_epochs=4).fit(resumed, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.layer.weight, weight)


# ---------------------------------------------------------------------- plugins of the user's


def test_a_precision_of_the_users_is_asked_at_its_moments():
    told = []

    class Told(Precision):
        precision = "told"

        def convert_module(self, module):
            told.append("module")
            return module

        def convert_input(self, data):
            told.append("input")
            return data

        def train_step_context(self):
            told.append("context")
            return nullcontext()

        def pre_backward(self, tensor, module):
            told.append("pre")
            return tensor * 2

        def backward(self, tensor, model, optimizer, *args, **kwargs):
            told.append("backward")
            super().backward(tensor, model, optimizer, *args, **kwargs)

        def post_backward(self, tensor, module):
            told.append("post")
            return tensor / 2

        def unscale_gradients(self, optimizer):
            told.append("unscale")
            for p in self.main_params(optimizer):
                p.grad /= 2

        def optimizer_step(self, optimizer, model, closure, **kwargs):
            told.append("step")
            return super().optimizer_step(optimizer, model, closure, **kwargs)

        def state_dict(self):
            return {"told": len(told)}

        def load_state_dict(self, state_dict):
            self.loaded = state_dict["told"]

        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint):
            assert checkpoint["mine"] == 1

        def teardown(self):
            told.append("teardown")

    ours, theirs = Regression(), Regression()
    theirs.load_state_dict(ours.state_dict())
    trainer = make_trainer(plugins=Told(), limit_train_batches=1)
    trainer.fit(ours, make_loader())
    make_trainer(limit_train_batches=1).fit(theirs, make_loader())
    assert torch.equal(ours.layer.weight, theirs.layer.weight)
    steps = ["step", "context", "pre", "backward", "post", "unscale"]
    assert told == ["module", "input", *steps, "teardown"]
    trainer.save_checkpoint("told.ckpt")
    again = make_trainer(plugins=[Told()], max_epochs=2, limit_train_batches=1)
    again.fit(Regression(), make_loader(), ckpt_path="told.ckpt")
    assert again.precision_plugin.loaded == len(steps) + 3


def test_wrong_precision_objects_are_refused():
    with pytest.raises(ValueError, match="precision='16-true'` is not a mixed precision"):
        MixedPrecision("16-true", "cpu")
    with pytest.raises(MisconfigurationException, match="gradients in bfloat16 do not underflow"):
        MixedPrecision("bf16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="a plugin both say"):
        make_trainer(precision="64-true", plugins=[DoublePrecision()])
