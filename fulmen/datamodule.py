"""`LightningDataModule`: everything about the data of an experiment in one class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from fulmen.checkpoint.load import ClassOnlyMethod, load_from_checkpoint
from fulmen.hooks import DataHooks
from fulmen.hparams import HyperparametersMixin
from fulmen.utilities.introspection import takes_argument

if TYPE_CHECKING:
    from typing_extensions import Self

    from fulmen.trainer import Trainer


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Downloads, prepares, splits and loads data; write the hooks you need::

        class Digits(LightningDataModule):
            def __init__(self, root: str, batch_size: int = 32):
                super().__init__()
                self.save_hyperparameters()

            def prepare_data(self): ...          # one process: download
            def setup(self, stage): ...          # every process: read and split
            def train_dataloader(self): ...

    Attributes:
        trainer: the trainer that uses it, None before the first run.
        prepare_data_per_node: whether `prepare_data` runs once on every node or only once in all.
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
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """A datamodule around datasets: each one dataset, or a nested list or dict of them.

        Training data are shuffled, except iterable-style datasets; memory is pinned. `batch_size` and `num_workers`
        reach the constructor too, if it has arguments of these names.
        """
        for name, value in {"batch_size": batch_size, "num_workers": num_workers}.items():
            if takes_argument(cls.__init__, name):
                datamodule_kwargs[name] = value
        datamodule = cls(**datamodule_kwargs)
        load = partial(DataLoader, batch_size=batch_size, num_workers=num_workers, pin_memory=True)
        for verb, dataset, make in (
            ("train", train_dataset, partial(_shuffled, load)),
            ("val", val_dataset, load),
            ("test", test_dataset, load),
            ("predict", predict_dataset, load),
        ):
            if dataset is not None:
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
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A datamodule made with the arguments stored in a checkpoint, and its stored state.

        Args:
            checkpoint_path: a path, URL or open binary file.
            hparams_file: a .yaml or .csv file that replaces the stored arguments.
            weights_only: False allows any pickled object in the file; only for files you trust.
            kwargs: arguments that replace stored ones.
        """
        return load_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, weights_only=weights_only, **kwargs
        )

    def __str__(self) -> str:
        """The sizes of the datasets behind the loaders, as far as these can be made now."""
        titles = {"train": "Train", "val": "Validation", "test": "Test", "predict": "Predict"}
        sizes = {title: self._dataset_sizes(f"{verb}_dataloader") for verb, title in titles.items()}
        return "\n".join(f"{{{title} dataloader: {text}}}" for title, text in sizes.items())

    def _dataset_sizes(self, hook: str) -> str:
        try:
            sizes = [f"size={_dataset_size(loader)}" for loader in _leaves(getattr(self, hook)())]
        except Exception:  # not written, or `setup` has not run yet
            return "None"
        if len(sizes) < 2:
            return sizes[0] if sizes else "None"
        return " ; ".join(f"{number}. {size}" for number, size in enumerate(sizes, start=1))


def _shuffled(load: Callable, dataset: Any) -> DataLoader:
    return load(dataset, shuffle=not isinstance(dataset, IterableDataset))


def _map_leaves(fn: Callable[[Any], Any], data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _map_leaves(fn, value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_map_leaves(fn, value) for value in data]
    return fn(data)


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, (Mapping, list, tuple)):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from _leaves(value)
    elif data is not None:
        yield data


def _dataset_size(loader: Any) -> int | str:
    try:
        return len(getattr(loader, "dataset", loader))
    except (TypeError, NotImplementedError):
        return "NA"
