"""Complex numbers stay complex, and integers integers, in every precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import make_trainer
from torch.utils.data import DataLoader, Dataset

import fulmen as pl
from fulmen.engine.dtensor import FSDPPrecision
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import total_norm

PRECISIONS = {
    "64-true": torch.float64, "32-true": torch.float32, "16-true": torch.float16, "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
}  # fmt: skip


class Signals(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {
            "real": torch.ones(4),
            "wave": torch.full((2,), 1 + 2j),
            "number": torch.tensor(3),
            "flag": torch.tensor(True),
        }


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.phase = torch.nn.Parameter(torch.full((2,), 1 + 2j))
        self.register_buffer("shift", torch.full((2,), 3 - 1j))
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("scale", torch.ones(1))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen = {name: value.dtype for name, value in batch.items()}
        loss = self.layer(batch["real"]).float().mean()
        return loss + (batch["wave"] * self.phase + self.shift).abs().pow(2).mean().float()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_keeps_the_kind_of_every_number(precision, clip, tmp_path):
    def train():
        torch.manual_seed(0)
        net = Net()
        trainer = make_trainer(precision=precision, gradient_clip_val=clip, default_root_dir=tmp_path)
        trainer.fit(net, DataLoader(Signals(), 4))
        return net, trainer

    net, trainer = train()
    kinds = {name: value.dtype for name, value in net.state_dict().items()}
    real = PRECISIONS[precision]
    assert kinds == {
        "phase": torch.complex64, "shift": torch.complex64, "count": torch.int64, "flag": torch.bool,
        "scale": real, "layer.weight": real, "layer.bias": real,
    }  # fmt: skip
    assert net.dtype == real
    assert net.shift.tolist() == [3 - 1j] * 2 and net.count.item() == 2**40 + 1
    batch = torch.float32 if precision == "bf16-mixed" else real
    assert net.seen == {"real": batch, "wave": torch.complex64, "number": torch.int64, "flag": torch.bool}
    # The same steps by hand: the imaginary part is trained, too.
    phase = torch.full((2,), 1 + 2j, requires_grad=True)
    for _ in range(2):
        loss = (torch.full((4, 2), 1 + 2j) * phase + (3 - 1j)).abs().pow(2).mean()
        (gradient,) = torch.autograd.grad(loss, phase)
        if clip is not None:
            gradient = (
                gradient * clip / (gradient.abs().pow(2).sum() + 4 + 1).sqrt()
            )  # of the layer: (1, 1, 1, 1) and 1
        phase = (phase - 0.01 * gradient).detach().requires_grad_()
    assert torch.allclose(net.phase.detach(), phase, rtol=1e-3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Net.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.phase, net.phase) and torch.equal(again.shift, net.shift)


def test_what_shards_would_make_real_is_refused():
    with pytest.raises(MisconfigurationException, match=r"complex parameters \['phase'\] real"):
        FSDPPrecision("bf16-mixed").convert_module(Net())
    assert FSDPPrecision("bf16-true").convert_module(Net()).phase.dtype == torch.complex64


def test_the_norm_of_real_and_complex_gradients_together():
    parts = [torch.full((3,), 3.0), torch.full((2,), 3 + 4j), torch.full((2,), 1.0, dtype=torch.float64)]
    for gradients in (parts, parts[::-1], parts[1:2] * 2, parts[:2]):
        expected = sum(gradient.abs().double().pow(2).sum() for gradient in gradients) ** 0.5
        assert total_norm(gradients).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("value", [torch.tensor(1 + 2j), 1 + 2j, np.complex64(1 + 2j), torch.full((1,), 1 + 2j)])
@pytest.mark.parametrize("on_step", [True, False])
def test_a_complex_value_is_not_logged_as_its_real_part(value, on_step):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            self.log("z", value, on_step=on_step, on_epoch=not on_step)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"complex number .*1\.?\+2\.?j.*`value.abs\(\)`"):
        make_trainer().fit(Logs(), DataLoader(Signals(), 4))
