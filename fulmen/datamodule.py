"""`LightningDataModule`: everything about the data of an experiment in one class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import IO, TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from fulmen.checkpoint.load import ClassOnlyMethod, load_from_checkpoint
from fulmen.data.combined import loader_length
from fulmen.hooks import DataHooks
from fulmen.hparams import HyperparametersMixin
from fulmen.utilities.introspection import takes_argument

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION
    from typing_extensions import Self

    from fulmen.trainer import Trainer

    # What has `len` and `[]`, such as a range, counts as a dataset for torch.
    Datasets = Dataset[Any] | Sequence[Any] | Mapping[str, Any]


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Downloads, prepares, splits and loads data; `trainer` is None before the first run. Write the hooks you need::

        class Digits(LightningDataModule):
            def __init__(self, root: str, batch_size: int = 32):
                super().__init__()
                self.save_hyperparameters()

            def prepare_data(self): ...          # one process: download
            def setup(self, stage): ...          # every process: read and split
            def train_dataloader(self): ...

    Without `prepare_data_per_node`, `prepare_data` runs only once in all and not once per node.
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    name: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None

    @classmethod
    def from_datasets(
        cls, train_dataset: Datasets | None = None, val_dataset: Datasets | None = None,
        test_dataset: Datasets | None = None, predict_dataset: Datasets | None = None, batch_size: int = 1,
        num_workers: int = 0, **datamodule_kwargs: Any,
    ) -> Self:  # fmt: skip
        """A datamodule around datasets. Training data are shuffled (iterable-style datasets are not), memory is pinned.

        Arguments:
            train_dataset: one dataset, or a nested list or dict of them; as are the others.
            batch_size: samples per batch of each loader.
            num_workers: processes that load, for each loader; 0 loads in this one.
            datamodule_kwargs: arguments of the constructor. One that takes `batch_size` or `num_workers` receives it too.

        Examples:
            >>> datamodule = LightningDataModule.from_datasets(train_dataset=range(10), batch_size=4)
            >>> len(datamodule.train_dataloader())
            3
        """
        loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        accepted = {name: value for name, value in loading.items() if takes_argument(cls.__init__, name)}
        datamodule = cls(**datamodule_kwargs, **accepted)
        datasets = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for verb, dataset in datasets.items():
            if dataset is not None:
                make = partial(_make_loader, shuffle=verb == "train", **loading)
                # Instance attributes count as overridden hooks; partials, unlike closures, reach spawned processes.
                setattr(datamodule, f"{verb}_dataloader", partial(_map_leaves, make, dataset))
        return datamodule

    def state_dict(self) -> dict[str, Any]:
        """State to store in checkpoints, under the name of the class; nothing is stored if it is empty.

        Returns:
            A dict of plain types and tensors, so that it can be loaded with `weights_only=True`.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned, when a checkpoint is loaded."""

    def on_exception(self, exception: BaseException) -> None:
        """When a run fails, at any point, also by Ctrl-C; the exception is raised again afterwards."""

    @ClassOnlyMethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | os.PathLike[str] | IO[bytes], map_location: MAP_LOCATION = None,
        hparams_file: str | os.PathLike[str] | None = None, weights_only: bool | None = None, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A datamodule made with the arguments stored in a checkpoint, and its stored state.

        Arguments:
            checkpoint_path: path, URL or file object.
            map_location: as for `torch.load`; None keeps the saved device if it exists.
            hparams_file: .yaml or .csv with arguments of the constructor, which replace stored ones.
            weights_only: handed to `torch.load`; False unpickles anything, for files you trust.
            kwargs: arguments of the constructor, before all others.
        """
        datamodule: Self = load_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, None, weights_only, **kwargs
        )
        return datamodule

    def __str__(self) -> str:
        """The sizes of the datasets behind the loaders, as far as these can be made now."""
        titles = {"Train": "train", "Validation": "val", "Test": "test", "Predict": "predict"}
        return "\n".join(f"{{{title} dataloader: {self._dataset_sizes(verb)}}}" for title, verb in titles.items())

    def _dataset_sizes(self, verb: str) -> str:
        sizes: list[float] = []
        try:
            loaders = getattr(self, f"{verb}_dataloader")()
            _map_leaves(lambda loader: sizes.append(loader_length(getattr(loader, "dataset", loader))), loaders)
        except Exception:  # not written, or `setup` has not run yet
            return "None"
        texts = ["size=NA" if size == inf else f"size={size}" for size in sizes]
        if len(texts) > 1:
            texts = [f"{number}. {text}" for number, text in enumerate(texts, start=1)]
        return " ; ".join(texts) or "None"


def _make_loader(dataset: Dataset[Any], shuffle: bool, **given: Any) -> DataLoader[Any]:
    return DataLoader(dataset, shuffle=shuffle and not isinstance(dataset, IterableDataset), pin_memory=True, **given)


def _map_leaves(fn: Callable[[Any], Any], data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _map_leaves(fn, value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_map_leaves(fn, value) for value in data]
    return None if data is None else fn(data)
