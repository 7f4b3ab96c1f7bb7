"""Averages of parameters that are spread over processes: the bits of DDP, in either kind of file, and after a resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from support import make_trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from fulmen.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
        self.register_buffer("center", torch.zeros(1))

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def squares(self, batch):
        return (self.net(batch[0]) + self.center - batch[1]) ** 2

    def training_step(self, batch, batch_idx):
        self.center = self.center * 0.9 + batch[0].mean().reshape(1) * 0.1
        return self.squares(batch).mean()

    def validation_step(self, batch, batch_idx):
        modes = {part.training for part in self.trainer.model.modules()}  # of the wrapper too
        assert modes == {False}
        self.log("val", self.squares(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fitted(strategy, callback, folder, ckpt_path=None, precision="32-true"):
    """Validations of two epochs, and on rank 0 what the module has in the end."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(32, 3, generator=generator), torch.randn(32, 1, generator=generator)
    seen, model = [], Net()

    class Validations(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["val"]))

    files = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        strategy=strategy, devices=2, max_epochs=2, callbacks=[callback, files, Validations()], num_sanity_val_steps=0,
        enable_checkpointing=True, precision=precision,
    )  # fmt: skip
    trainer.fit(
        model, DataLoader(TensorDataset(x, y), 4), DataLoader(TensorDataset(x[:11], y[:11]), 4), ckpt_path=ckpt_path
    )
    trainer.save_checkpoint(f"{folder}/after.ckpt", weights_only=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()} if os.environ["RANK"] == "0" else {}
    return seen, state


CALLBACKS = (lambda: EMAWeightAveraging(decay=0.5), lambda: WeightAveraging(use_buffers=False, device="cpu"))


def sharded():
    return FSDPStrategy(state_dict_type="sharded")


def trials(folder):
    ema, mean = CALLBACKS
    last = "step=6.ckpt"
    first = {
        "ddp": fitted(DDPStrategy(), ema(), f"{folder}/ddp"),
        "full": fitted(FSDPStrategy(), ema(), f"{folder}/full"),
        "sharded": fitted(sharded(), ema(), f"{folder}/sharded"),
        "full, resumed": fitted(FSDPStrategy(), ema(), f"{folder}/1", f"{folder}/full/{last}"),
        "sharded, resumed": fitted(sharded(), ema(), f"{folder}/2", f"{folder}/sharded/{last}"),
        "full, by ddp": fitted(DDPStrategy(), ema(), f"{folder}/3", f"{folder}/full/{last}"),
        "ddp, by sharded": fitted(sharded(), ema(), f"{folder}/4", f"{folder}/ddp/{last}"),
        "parallel": fitted(ModelParallelStrategy(2, 1), ema(), f"{folder}/parallel"),
        "parallel, resumed": fitted(ModelParallelStrategy(2, 1), ema(), f"{folder}/9", f"{folder}/parallel/{last}"),
    }
    second = {
        "ddp": fitted(DDPStrategy(), mean(), f"{folder}/5"),
        "sharded": fitted(sharded(), mean(), f"{folder}/6"),
        "sharded, resumed": fitted(sharded(), mean(), f"{folder}/7", f"{folder}/6/{last}"),
    }
    half = [fitted(sharded(), ema(), f"{folder}/half", precision="bf16-true")]
    half.append(fitted(sharded(), ema(), f"{folder}/8", f"{folder}/half/{last}", "bf16-true"))
    return [first, second], half


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    return run_ranks(2, trials, str(folder)), folder


def test_an_average_that_is_spread_has_the_bits_of_one_that_is_not(tried):
    for found, _ in tried[0]:
        for runs in found:
            for name, (seen, state) in runs.items():
                assert seen == runs["ddp"][0][-len(seen) :] and seen, name
                torch.testing.assert_close(state, runs["ddp"][1], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_an_average_in_32_bits_of_weights_in_16_is_resumed_from_shards(tried):
    for _, (run, resumed) in tried[0]:
        assert resumed[0] == run[0][-len(resumed[0]) :]
        torch.testing.assert_close(resumed[1], run[1], rtol=0, atol=0)


def test_files_hold_the_whole_average_and_the_weights(tried):
    folder = Path(tried[1])
    of_ddp, full = (torch.load(folder / name / "step=6.ckpt", weights_only=True) for name in ("ddp", "full"))
    for kind in ("state_dict", "current_model_state"):
        torch.testing.assert_close(full[kind], of_ddp[kind], rtol=0, atol=0)
    after = torch.load(folder / "full" / "after.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(after, tried[0][0][0][0]["ddp"][1], rtol=0, atol=0)
