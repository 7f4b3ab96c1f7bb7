"""What is asked of a loader before it is read, and loaders made again from other arguments."""

from __future__ import annotations

import functools
import inspect
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fulmen.data.combined import CombinedLoader, loader_length
from fulmen.data.loader_state import dataset_of, is_map_style
from fulmen.data.sample_order import ForwardsAttributes, ShardedSampler, sampler_of, samplers_of, tell_epoch
from fulmen.data.tensor_batches import in_memory_dataset
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning, describe_received
from fulmen.utilities.introspection import is_generator
from fulmen.utilities.modules import suggested_max_num_workers
from fulmen.utilities.rank_zero import rank_zero_warn, warn_user
from fulmen.utilities.seed import pl_worker_init_function

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy

T = TypeVar("T")

# Where an object keeps the arguments it was made with.
_RECORD_KEY = "_fulmen_arguments"
_warn_possible = functools.partial(rank_zero_warn, category=PossibleUserWarning)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_length(loader: Iterable[Any]) -> int | float:
    """The number of batches, infinite if the loader does not know; warns about lengths that are often a mistake."""
    length = loader_length(loader)
    if length == 0:
        rank_zero_warn(f"Total length of `{type(loader).__name__}` is zero. Nothing will run on it; is that intended?")
    data = dataset_of(loader)
    if not math.isinf(length) and isinstance(data, IterableDataset) and data is not loader:
        rank_zero_warn(
            "The `IterableDataset` has `__len__` defined, which is wrong if several workers do not share out the data."
        )
    return length


# What gives exactly as many indices as it says.
_EXACT_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def length_is_certain(part: object) -> bool:
    """Do a loader's parts, or those of a sampler, leave no doubt that it gives as many batches as `len()` says?

    `len()` of an `IterableDataset`, of a sampler or of a loader of one's own is a promise that nobody checks. A subclass of
    `DataLoader` is taken to give what its samplers say, unless its `__iter__` is a generator, which may leave batches out.
    """
    if isinstance(part, DataLoader):
        own = type(part).__len__ is not DataLoader.__len__ or is_generator(type(part).__iter__)
        order = part.sampler if part.batch_sampler is None else part.batch_sampler
        return not own and is_map_style(part) and length_is_certain(order)
    if type(part) is BatchSampler:
        return length_is_certain(part.sampler)
    if isinstance(part, IndexRecorder):
        return length_is_certain(part.batch_sampler)
    if isinstance(part, ShardedSampler):
        return length_is_certain(part.order)
    return type(part) in (*_EXACT_SAMPLERS, list, tuple, range)


def limit_batches(length: int | float, limit: int | float, *, name: str) -> int | float:
    """How many batches are read of a loader with ``length`` batches (infinite if unknown).

    ``limit``, the Trainer's argument ``name``, is a number of batches or, as a float up to 1.0, a fraction.
    """
    given = f"`{name}={limit}`"
    if limit < 0 or (limit > 1 and int(limit) != limit):
        fix = "Use a float in [0.0, 1.0] for a fraction of the batches, or an int for their number."
        raise MisconfigurationException(f"{given} is not an amount of batches. {fix}")
    if isinstance(limit, int) or limit > 1 or not limit:
        return min(length, int(limit))
    if limit == 1.0 or length == 0:
        return length
    if math.isinf(length):
        fix = f"Use `{name}=1.0` for all batches or an int for their number, or define `__len__`."
        raise MisconfigurationException(f"{given} asks for a fraction of a loader with no length. {fix}")
    if int(length * limit) == 0:
        fix = f"Try at least `{name}={1 / length}`, an int, or 0 to switch this part off."
        raise MisconfigurationException(f"{given} leaves none of the {length} batches of a loader. {fix}")
    return int(length * limit)


def _flatten_loaders(loader: object) -> list[Any]:
    return loader.flattened if isinstance(loader, CombinedLoader) else [loader]


def check_iterable(loader: object, label: str) -> None:
    """Raise a TypeError unless batches can be read from ``loader``; ``label`` says where it comes from."""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        what = (
            f"A `Dataset` (`{type(loader).__name__}`) was given by {label}, and it gives single samples, not batches."
        )
        raise TypeError(f"{what} Wrap it: `DataLoader(dataset, batch_size=...)`.")
    if isinstance(loader, (str, bytes, type)) or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        fix = "Give a `DataLoader`, another iterable of batches, or a list, tuple or dict of them."
        raise TypeError(f"An invalid dataloader was given by {label}: {describe_received(loader)}. {fix}")


def warn_about_settings(loader: object, *, stage: str, reloaded: bool = False) -> None:
    """Warn about slow or mistaken settings of the loader for "train" or another stage; will fit ask for it again?"""
    if not isinstance(loader, DataLoader):
        return
    name = f"{stage}_dataloader"
    if stage != "train" and isinstance(inner_sampler(loader), RandomSampler):
        what = f"The sampler of the `{name}` has shuffling enabled."
        _warn_possible(f"{what} Evaluation is best read in order: `shuffle=False`.")
    possible = suggested_max_num_workers(local_world_size=1)
    # Workers would only slow down data that is indexed in memory.
    if loader.num_workers < 2 <= possible and in_memory_dataset(loader) is None:
        what = f"The `{name}` has {loader.num_workers} workers, which may be too few."
        _warn_possible(f"{what} Try `num_workers={possible}`.")
    if loader.num_workers and not loader.persistent_workers and _spawns_workers(loader):
        rank_zero_warn(f"The workers of the `{name}` are spawned in every epoch. Use `persistent_workers=True`.")
    if reloaded and loader.pin_memory and loader.persistent_workers:
        what = f"The `{name}` has `pin_memory=True` and `persistent_workers=True`: torch may hang when"
        _warn_possible(f"{what} `reload_dataloaders_every_n_epochs` replaces it. Use `pin_memory=False`.")


def _spawns_workers(loader: DataLoader[Any]) -> bool:
    context = loader.multiprocessing_context or multiprocessing
    return bool(context.get_start_method() == "spawn")


@contextmanager
def record_arguments() -> Iterator[None]:
    """Remember how every object of a `DataLoader` or `BatchSampler` subclass made in here was called; see `rebuild_loader`."""
    family = _all_subclasses(DataLoader) | _all_subclasses(BatchSampler)
    originals = {cls: cls.__init__ for cls in family if "__init__" in vars(cls)}
    for cls, init in originals.items():
        cls.__init__ = _record_calls(init)
    try:
        yield
    finally:
        for cls, init in originals.items():
            cls.__init__ = init


def _all_subclasses(cls: type) -> set[Any]:
    return set(cls.__subclasses__()).union(*map(_all_subclasses, cls.__subclasses__()))


def _record_calls(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Only the constructor the user called counts, not those it calls in turn.
        if type(self).__init__ is recording_init:
            vars(self)[_RECORD_KEY] = _bind_by_name(init, _torch_base(self), (self, *args), kwargs)
        init(self, *args, **kwargs)

    return recording_init


def _torch_base(obj: object) -> type:
    return DataLoader if isinstance(obj, DataLoader) else BatchSampler


def _init_parameters(cls: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


def _bind_by_name(
    init: Callable[..., None], base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call as keywords; what is passed on as ``*args`` is taken to go to the base class."""
    try:
        found = inspect.signature(init).bind(*args, **kwargs)
    except TypeError:  # the call itself fails with a better message
        return None
    named: dict[str, Any] = {}
    for name, value in list(found.arguments.items())[1:]:
        kind = found.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            value = dict(zip((inherited.name for inherited in _init_parameters(base)), value))
        named |= value if kind in _VARIADIC else {name: value}
    return named


def rebuild_loader(loader: DataLoader[Any], **order: Any) -> DataLoader[Any]:
    """A loader of the same class from the same arguments, but with this ``sampler`` or ``batch_sampler``.

    The arguments of subclasses are those `record_arguments` saw, else the attributes of the same names. In the same
    way a custom batch sampler is made again around a new sampler, with a TypeError if that is impossible.
    """
    if "sampler" in order and loader.batch_size is None and loader.batch_sampler is not None:
        order = {"batch_sampler": _rebuild_object(loader.batch_sampler, **order)}
    # What torch refuses to take together with them is put back to its default.
    clashing: dict[str, Any] = {"shuffle": False}
    if "batch_sampler" in order:
        clashing |= {"sampler": None, "batch_size": 1, "drop_last": False}
    given = {*_init_arguments(loader)}
    if loader.batch_size != 1:
        given.add("batch_size")
    if loader.drop_last:
        given.add("drop_last")
    if hasattr(loader, "shuffle") and loader.shuffle:  # of a subclass whose own default it is
        given.add("shuffle")
    return _rebuild_object(loader, **{**order, **{name: value for name, value in clashing.items() if name in given}})


def _rebuild_error(obj: object, problem: str, fix: str) -> Exception:
    error = MisconfigurationException if isinstance(obj, DataLoader) else TypeError
    return error(f"`{type(obj).__name__}` has to be made again, but {problem}. {fix}")


def _rebuild_object(obj: T, **changes: Any) -> T:
    arguments = {**_init_arguments(obj), **changes}
    try:
        again = type(obj)(**arguments)
    except (TypeError, ValueError) as problem:
        fix = "Let its `__init__` take `**kwargs` and pass them to `super().__init__`, with nothing twice."
        raise _rebuild_error(obj, f"with another {sorted(changes)} that fails: {problem}", fix) from problem
    # What the user attached to the old one stays readable.
    vars(again).update({name: value for name, value in vars(obj).items() if name not in vars(again)})
    vars(again)[_RECORD_KEY] = arguments
    return again


def _init_arguments(obj: object) -> dict[str, Any]:
    """The constructor arguments of a loader or batch sampler, from the record or from attributes."""
    cls = type(obj)
    base = _torch_base(obj)
    recorded: dict[str, Any] | None = vars(obj).get(_RECORD_KEY)
    if cls is not base and recorded is not None:
        return recorded
    own = [p for p in _init_parameters(cls) if p.kind not in _VARIADIC]
    if missing := [p.name for p in own if p.default is p.empty and not hasattr(obj, p.name)]:
        fix = f"Make it inside a `*_dataloader` hook, or keep them: `self.{missing[0]} = {missing[0]}` in `__init__`."
        raise _rebuild_error(obj, f"its arguments {missing} are not known", fix)
    passed_on = _init_parameters(base) if len(own) < len(_init_parameters(cls)) else []
    names = {p.name for p in own + passed_on if hasattr(obj, p.name)}
    if isinstance(obj, DataLoader):
        names -= _derived_arguments(obj)
    return {name: getattr(obj, name) for name in names}


def _derived_arguments(loader: DataLoader[Any]) -> set[str]:
    """Attributes for what a loader made itself, which it would not take back together."""
    custom = loader.batch_size is None and loader.batch_sampler is not None
    derived = {"batch_size", "sampler", "drop_last"} if custom else {"batch_sampler"}
    return derived | ({"sampler"} if isinstance(loader.dataset, IterableDataset) else set())


def inner_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler that decides the order of samples."""
    return loader.sampler if loader.batch_sampler is None else sampler_of(loader.batch_sampler)


def disable_shuffling(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader reading its samples in order, as ``overfit_batches`` needs it; warns when it did not."""
    if not is_map_style(loader) or isinstance(inner_sampler(loader), (SequentialSampler, list, tuple, range)):
        return loader
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):  # a batch sampler of the user knows best
        return loader
    rank_zero_warn("`overfit_batches` needs the same batches in every epoch: shuffling is off.")
    return rebuild_loader(loader, sampler=SequentialSampler(loader.dataset))  # type: ignore[arg-type]


class IndexRecorder(ForwardsAttributes):
    """A batch sampler that notes which samples it chose, ahead of what workers deliver, until that is asked for."""

    _forwards_to = "batch_sampler"

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.seen_indices: list[list[int]] = []
        self._popped = 0

    def pop_indices(self, batch_idx: int) -> list[int]:
        """The samples of a batch; they, and those of batches before it, are forgotten."""
        new = batch_idx + 1 - self._popped
        indices = self.seen_indices[new - 1]
        self._popped = batch_idx + 1
        del self.seen_indices[:new]
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        self.seen_indices = []
        self._popped = 0
        for indices in self.batch_sampler:
            self.seen_indices.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.batch_sampler)


def keep_last_batch(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader without ``drop_last``, if its batch sampler can be made again that way."""
    if not is_map_style(loader) or loader.batch_sampler is None:
        return loader
    batch_sampler = loader.batch_sampler
    name = type(batch_sampler).__name__
    if not hasattr(batch_sampler, "drop_last"):
        _warn_possible(f"Predictions may miss samples: `{name}` has no `drop_last`, so make sure it gives all indices.")
    elif batch_sampler.drop_last:
        try:
            return rebuild_loader(loader, batch_sampler=_rebuild_object(batch_sampler, drop_last=False))
        except TypeError as problem:
            rank_zero_warn(f"Predictions will miss the last, incomplete batch, which `{name}` drops. {problem}")
    return loader


def record_indices(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader with an `IndexRecorder` as its ``batch_sampler``; unchanged where there is none."""
    if not is_map_style(loader) or loader.batch_sampler is None:
        return loader
    return rebuild_loader(loader, batch_sampler=IndexRecorder(loader.batch_sampler))


def set_epoch(loader: object, epoch: int) -> None:
    """Tell every sampler of the loader that cares which epoch begins."""
    for leaf in _flatten_loaders(loader):
        for sampler in samplers_of(leaf):
            tell_epoch(sampler, epoch)


def seed_workers(loader: object, rank: int) -> None:
    """Give each worker of each rank its own random stream, if `seed_everything` was asked to and the user did not."""
    wanted = os.environ.get("PL_SEED_WORKERS", "0") not in ("", "0")
    if wanted and isinstance(loader, DataLoader) and loader.worker_init_fn is None:
        loader.worker_init_fn = functools.partial(pl_worker_init_function, rank=rank)


def shutdown_workers(source: object) -> None:
    """End the worker processes behind a loader or a running iterator."""
    if isinstance(source, CombinedLoader):
        source.reset()
    for leaf in _flatten_loaders(source):
        iterator = leaf
        if isinstance(leaf, DataLoader):
            iterator = leaf._iterator
            leaf._iterator = None
        if hasattr(iterator, "_shutdown_workers") and callable(iterator._shutdown_workers):
            iterator._shutdown_workers()


def has_len_all_ranks(
    dataloader: Iterable[Any], strategy: Strategy, allow_zero_length_dataloader_with_multiple_devices: bool = False
) -> bool:
    """Does the loader have a length on every process? An error if that is zero on this one and not on all of them."""
    length = loader_length(dataloader)
    if math.isinf(length):
        return False
    total = int(strategy.reduce(torch.tensor(length, device=strategy.root_device), reduce_op="sum"))  # sync
    name = type(dataloader).__name__
    if total == 0:
        rank_zero_warn(f"Total length of `{name}` across ranks is zero: there are no batches. Check its dataset.")
    elif length == 0:
        what = f"`{name}` within local rank has zero length, while others have batches."
        if not allow_zero_length_dataloader_with_multiple_devices:
            fix = "Give each at least one, or set `allow_zero_length_dataloader_with_multiple_devices = True`."
            raise RuntimeError(f"{what} {fix}")
        warn_user(what)
    return True
