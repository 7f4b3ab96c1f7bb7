"""What a type checker knows of loading checkpoints."""

from io import BytesIO
from pathlib import Path

import torch
from typing_extensions import assert_type

from fulmen import LightningModule, Trainer
from fulmen.callbacks import ModelCheckpoint


class Net(LightningModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()


checkpoint = ModelCheckpoint(dirpath=Path("checkpoints"), monitor="val_loss", mode="min", save_top_k=2)
trainer = Trainer(callbacks=[checkpoint])
assert_type(checkpoint.best_model_path, str)
assert_type(Net.load_from_checkpoint(checkpoint.best_model_path), Net)
assert_type(Net.load_from_checkpoint(Path("a.ckpt"), map_location="cpu", strict=False, width=2), Net)
assert_type(Net.load_from_checkpoint(BytesIO(), map_location=torch.device("cpu"), weights_only=True), Net)
trainer.fit(Net(), ckpt_path="last")
