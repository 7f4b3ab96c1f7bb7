"""`LightningDataModule`: everything about the data of an experiment in one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from fulmen.checkpoint.load import ClassOnlyMethod, load_from_checkpoint
from fulmen.data.combined import loader_length
from fulmen.hooks import DataHooks
from fulmen.hparams import HyperparametersMixin
from fulmen.utilities.introspection import takes_argument

if TYPE_CHECKING:
    from typing_extensions import Self

    from fulmen.trainer import Trainer


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
        cls, train_dataset: Any = None, val_dataset: Any = None, test_dataset: Any = None, predict_dataset: Any = None,
        batch_size: int = 1, num_workers: int = 0, **datamodule_kwargs: Any,
    ) -> Self:  # fmt: skip
        """A datamodule around datasets: each one dataset, or a nested list or dict of them.

        Training data are shuffled (iterable-style datasets are not), memory is pinned. A constructor that takes
        `batch_size` or `num_workers` receives it too.
        """
        loading = {"batch_size": batch_size, "num_workers": num_workers}
        accepted = {name: value for name, value in loading.items() if takes_argument(cls.__init__, name)}
        datamodule = cls(**datamodule_kwargs, **accepted)
        datasets = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for verb, dataset in datasets.items():
            if dataset is not None:
                make = partial(_loader, shuffle=verb == "train", **loading)
                # Instance attributes count as overridden hooks; partials, unlike closures, reach spawned processes.
                setattr(datamodule, f"{verb}_dataloader", partial(_map_leaves, make, dataset))
        return datamodule

    def state_dict(self) -> dict[str, Any]:
        """State to store in checkpoints, under the name of the class; nothing is stored if it is empty."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned, when a checkpoint is loaded."""

    def on_exception(self, exception: BaseException) -> None:
        """When a run ends with an exception, Ctrl-C included."""

    @ClassOnlyMethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A datamodule made with the arguments stored in a checkpoint (path, URL or file), and its stored state.

        Arguments in the .yaml or .csv file ``hparams_file`` and in ``kwargs`` replace stored ones. ``weights_only=False``
        unpickles anything: only for files you trust.
        """
        return load_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, None, weights_only, **kwargs)

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


def _loader(dataset: Any, shuffle: bool, **given: Any) -> DataLoader:
    return DataLoader(dataset, shuffle=shuffle and not isinstance(dataset, IterableDataset), pin_memory=True, **given)


def _map_leaves(fn: Callable[[Any], Any], data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _map_leaves(fn, value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_map_leaves(fn, value) for value in data]
    return None if data is None else fn(data)
