"""The smallest models and data that every verb runs with: `BoringModel` and its relatives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule
from fulmen.utilities.types import STEP_OUTPUT

FEATURES = 32
SAMPLES = 64


class RandomDataset(Dataset[Tensor]):
    """Normally distributed vectors, which stay the same.

    Args:
        size: elements of each.
        length: how many there are.

    Examples:
        >>> data = RandomDataset(size=32, length=64)
        >>> len(data), data[0].shape
        (64, torch.Size([32]))
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """The same in dictionaries: "a" is a vector, and "b" is larger by 2.

    Args:
        size: elements of each vector.
        length: how many dictionaries there are.

    Examples:
        >>> sample = RandomDictDataset(size=3, length=4)[0]
        >>> torch.allclose(sample["b"] - sample["a"], torch.tensor(2.0))
        True
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"a": self.data[index], "b": self.data[index] + 2}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """Normally distributed vectors, new ones in each pass, whose number nobody is told.

    Args:
        size: elements of each.
        count: how many a pass has.

    Examples:
        >>> len(list(RandomIterableDataset(size=32, count=5)))
        5
    """

    def __init__(self, size: int, count: int) -> None:
        self.count = count
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(RandomIterableDataset):
    """A `RandomIterableDataset` that says how many vectors a pass has.

    Examples:
        >>> len(RandomIterableDatasetWithLen(size=32, count=5))
        5
    """

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """One linear layer that learns to return ones, with steps and loaders for all verbs.

    Override what your experiment or bug report is about.

    Examples:
        >>> from fulmen import Trainer
        >>> trainer = Trainer(fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step
        1
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The two outputs for vectors of 32 elements."""
        output: Tensor = self.layer(x)
        return output

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared distance of outputs from labels, or from ones."""
        return functional.mse_loss(preds, torch.ones_like(preds) if labels is None else labels)

    def step(self, batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.loss(self(batch))

    def training_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        """Returns the loss under "loss"."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        """Returns the loss under "x"."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        """Returns the loss under "y"."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Gradient descent, whose rate shrinks in each epoch."""
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """64 random vectors, one by one."""
        return DataLoader(RandomDataset(FEATURES, SAMPLES))

    def val_dataloader(self) -> DataLoader[Tensor]:
        """As many others."""
        return DataLoader(RandomDataset(FEATURES, SAMPLES))

    def test_dataloader(self) -> DataLoader[Tensor]:
        """As many others."""
        return DataLoader(RandomDataset(FEATURES, SAMPLES))

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """As many others."""
        return DataLoader(RandomDataset(FEATURES, SAMPLES))


class ManualOptimBoringModel(BoringModel):
    """A `BoringModel` with manual optimization.

    Examples:
        >>> ManualOptimBoringModel().automatic_optimization
        False
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        """Makes the step itself, and returns the loss."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class BoringDataModule(LightningDataModule):
    """Random vectors for each verb: parts of 64 of one dataset of 256.

    Examples:
        >>> data = BoringDataModule()
        >>> data.setup("fit")
        >>> len(data.random_full), len(data.train_dataloader())
        (256, 64)
    """

    def __init__(self) -> None:
        super().__init__()
        self.random_full = RandomDataset(FEATURES, SAMPLES * 4)

    def setup(self, stage: str) -> None:
        """Cuts out the parts that the verb needs."""
        if stage == "fit":
            self.random_train = self._take_part(0)
        if stage in ("fit", "validate"):
            self.random_val = self._take_part(1)
        if stage == "test":
            self.random_test = self._take_part(2)
        if stage == "predict":
            self.random_predict = self._take_part(3)

    def _take_part(self, number: int) -> Subset[Tensor]:
        return Subset(self.random_full, range(number * SAMPLES, (number + 1) * SAMPLES))

    def train_dataloader(self) -> DataLoader[Tensor]:
        """The first part, one by one."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The second part."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """The third part."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The last part."""
        return DataLoader(self.random_predict)


class BoringDataModuleNoLen(LightningDataModule):
    """Random vectors for each verb, from loaders without a length.

    Examples:
        >>> data = BoringDataModuleNoLen()
        >>> data.setup("test")
        >>> len(list(data.test_dataloader()))
        64
    """

    def setup(self, stage: str) -> None:
        """Makes the datasets that the verb needs."""
        if stage == "fit":
            self.random_train = RandomIterableDataset(FEATURES, SAMPLES)
        if stage in ("fit", "validate"):
            self.random_val = RandomIterableDataset(FEATURES, SAMPLES)
        if stage == "test":
            self.random_test = RandomIterableDataset(FEATURES, SAMPLES)
        if stage == "predict":
            self.random_predict = RandomIterableDataset(FEATURES, SAMPLES)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """64 vectors, one by one."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """As many others."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """As many others."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """As many others."""
        return DataLoader(self.random_predict)


class IterableBoringDataModule(LightningDataModule):
    """Two loaders for each verb.

    Examples:
        >>> data = IterableBoringDataModule()
        >>> data.setup("validate")
        >>> [len(loader) for loader in data.val_dataloader()]
        [64, 64]
    """

    def setup(self, stage: str) -> None:
        """Makes the datasets that the verb needs."""
        if stage == "fit":
            self.train_datasets = _make_two()
        if stage in ("fit", "validate"):
            self.val_datasets = _make_two()
        if stage == "test":
            self.test_datasets = _make_two()
        if stage == "predict":
            self.predict_datasets = _make_two()

    def train_dataloader(self) -> list[DataLoader[Tensor]]:
        """Two loaders of random vectors, one by one."""
        return [DataLoader(dataset) for dataset in self.train_datasets]

    def val_dataloader(self) -> list[DataLoader[Tensor]]:
        """Two others."""
        return [DataLoader(dataset) for dataset in self.val_datasets]

    def test_dataloader(self) -> list[DataLoader[Tensor]]:
        """Two others."""
        return [DataLoader(dataset) for dataset in self.test_datasets]

    def predict_dataloader(self) -> list[DataLoader[Tensor]]:
        """Two others."""
        return [DataLoader(dataset) for dataset in self.predict_datasets]


def _make_two() -> list[RandomDataset]:
    return [RandomDataset(FEATURES, SAMPLES), RandomDataset(FEATURES, SAMPLES)]


class DemoModel(LightningModule):
    """One layer with a size and a learning rate to choose, such as on a command line.

    Args:
        out_dim: how many outputs it has.
        learning_rate: of Adam.

    Examples:
        >>> DemoModel(out_dim=4)(torch.zeros(2, 32)).shape
        torch.Size([2, 4])
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(FEATURES, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for samples of 32 elements, none of them negative."""
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch: Tensor, batch_nb: int) -> Tensor:
        """Returns the sum of the outputs as the loss."""
        loss: Tensor = self(batch).sum()
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Adam with the rate of the constructor."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Net(nn.Module):
    """A convolutional network for images of 28 x 28 pixels and 10 classes, such as MNIST.

    Examples:
        >>> Net()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logarithms of the probabilities of the classes."""
        x = torch.relu(self.conv1(x))
        x = functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(self.dropout1(x).flatten(1)))
        return torch.log_softmax(self.fc2(self.dropout2(x)), dim=1)
