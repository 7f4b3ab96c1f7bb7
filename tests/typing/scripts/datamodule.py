"""What a type checker knows of a datamodule."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

from fulmen import LightningDataModule, Trainer


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None:
        self.dataset = TensorDataset(torch.ones(8, 2))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> dict[str, DataLoader[tuple[Tensor, ...]]]:
        return {"all": self.train_dataloader()}

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        return batch.to(device)

    def state_dict(self) -> dict[str, int]:
        return {"seen": 1}


data = Data()
assert_type(data.trainer, Trainer | None)
assert_type(data.prepare_data_per_node, bool)
assert_type(Data.from_datasets(TensorDataset(torch.ones(8)), [range(8), range(4)], batch_size=2), Data)
assert_type(Data.load_from_checkpoint("a.ckpt", batch_size=8), Data)
size: int = data.hparams.batch_size
