"""What a type checker knows of manual optimization."""

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import assert_type

from fulmen import LightningModule
from fulmen.optimizers import LightningOptimizer


class Gan(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        assert_type(optimizers, LightningOptimizer | list[LightningOptimizer])
        assert isinstance(optimizers, list)
        for optimizer in optimizers:
            with optimizer.toggle_model(sync_grad=True):
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch).sum(), retain_graph=True)
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")
                optimizer.step()
        raw = self.optimizers(use_pl_optimizer=False)
        assert_type(raw, Optimizer | list[Optimizer])
        self.toggle_optimizer(optimizers[0])
        self.untoggle_optimizer()

    def configure_optimizers(self) -> list[Optimizer]:
        return [torch.optim.Adam(self.parameters()), torch.optim.SGD(self.parameters())]
