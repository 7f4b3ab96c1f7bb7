"""What a type checker knows of a callback."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import assert_type

from fulmen import Callback, LightningModule, Trainer
from fulmen.utilities.types import STEP_OUTPUT


class Counter(Callback):
    seen = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        self.log("seen", self.seen)
        if isinstance(outputs, Tensor):
            assert_type(outputs, Tensor)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert_type(optimizer.param_groups[0]["lr"], Any)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: tuple[Tensor, Tensor],
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert_type(trainer.callback_metrics["val_loss"], Tensor)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        print(exception)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


assert_type(Counter().state_key, str)
