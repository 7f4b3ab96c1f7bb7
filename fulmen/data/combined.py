"""Several loaders read as one."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice, zip_longest
from typing import Any

from torch.utils.data import IterableDataset

from fulmen.data.loader_state import LoaderPass
from fulmen.data.tensor_batches import iterate_batches
from fulmen.utilities.collections import map_children
from fulmen.utilities.errors import suggestion

Triple = tuple[Any, int, int]

_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)
_END = object()


def _skeleton(tree: Any, found: list[Any]) -> Any:
    """The container with its loaders moved to the end of ``found``, and their positions there in their place."""
    container = type(tree) in _CONTAINERS or (isinstance(tree, tuple) and hasattr(tree, "_fields"))
    # A list of numbers or strings is a loader, and so is what is empty.
    plain = container and not isinstance(tree, dict) and all(isinstance(item, (int, float, str)) for item in tree)
    if container and len(tree) and not plain:
        return map_children(tree, lambda item: _skeleton(item, found))
    found.append(tree)
    return len(found) - 1


def _fill(skeleton: Any, values: Sequence[Any]) -> Any:
    return values[skeleton] if type(skeleton) is int else map_children(skeleton, lambda item: _fill(item, values))


def _of_each(attribute: str) -> property:
    """The attribute of each iterable (None for those without), in the shape of ``iterables``."""
    return property(
        lambda combined: combined.tree_unflatten([getattr(each, attribute, None) for each in combined.flattened])
    )


def loader_length(loader: Any) -> int | float:
    """The number of batches a loader says it has; infinite when it does not say."""
    if isinstance(loader, CombinedLoader):
        return loader.num_batches()
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


class CombinedLoader:
    """One iterable over several, yielding ``(batch, batch_idx, dataloader_idx)``.

    ``iterables`` is any nesting of lists, tuples and dictionaries of iterables, and a batch has the same shape, with a
    batch in the place of each iterable. It ends with the shortest (mode ``"min_size"``), or with the longest while the
    others start again (``"max_size_cycle"``) or give None (``"max_size"``). In mode ``"sequential"`` one is read after
    the other, and ``batch_idx`` counts within each.

    ``len()`` works after ``iter()`` was called, and only if the iterables have a length.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in _MODES:
            hint = f"Use one of {list(_MODES)}.{suggestion(str(mode), _MODES)}"
            raise ValueError(f"Unsupported mode: `CombinedLoader(mode={mode!r})`. {hint}")
        self.mode = mode
        self._iterables = iterables
        self._flattened: list[Any] = []
        self._skeleton = _skeleton(iterables, self._flattened)
        self._limits: list[int | float] | None = None
        self._triples: Iterator[Triple] | None = None
        self._readings: dict[int, LoaderPass] = {}  # the passes that run, by position
        self._over: set[int] = set()  # those that have ended at least once in this pass
        self._kept: dict[str, Any] = {}  # where the next pass goes on
        self._done = 0  # batches before this pass
        self._history: deque[tuple[int, Any]] = deque(maxlen=4)  # states of loaders, by the batches they gave before

    @property
    def iterables(self) -> Any:
        """The iterables in the shape they were given."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a flat list; a list of equal length may be assigned."""
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        if len(flattened) != len(self._flattened):
            raise ValueError(
                f"Mismatch in flattened length: {len(flattened)} cannot replace {len(self._flattened)} iterables."
            )
        self._iterables = self.tree_unflatten(flattened)
        self._flattened = list(flattened)

    sampler = _of_each("sampler")
    batch_sampler = _of_each("batch_sampler")

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches are counted at most for each iterable; assign one number for all, or one for each."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None and len(limits) != len(self._flattened):
            raise ValueError(
                f"Mismatch in number of limits: {len(limits)} for {len(self._flattened)} iterables. Give one for each, or one for all."
            )
        self._limits = limits

    def loader_lengths(self) -> list[int | float]:
        """The number of batches of each iterable, limits applied; infinite where neither length nor limit is known."""
        limits = self._limits or [math.inf] * len(self._flattened)
        return [min(loader_length(loader), limit) for loader, limit in zip(self._flattened, limits)]

    def num_batches(self) -> int | float:
        """The number of batches of one pass over everything, limits applied; infinite when unknown."""
        return _MODES[self.mode][1](self.loader_lengths())

    def __len__(self) -> int:
        if self._triples is None:
            raise RuntimeError("Call `iter(combined_loader)` before `len(combined_loader)`.")
        total = self.num_batches()
        if math.isinf(total):
            raise TypeError("This `CombinedLoader` has no length, because one of its iterables has none.")
        return int(total)

    def __iter__(self) -> CombinedLoader:
        self.reset()
        in_turn = self.mode == "sequential"
        self._over, self._done = set(self._kept.get("over", ())), self._kept.get("done", 0)
        opened = [self.open_pass(position) for position in range(1 if in_turn else len(self._flattened))]
        triples = _MODES[self.mode][0](self, opened)
        self._kept = {"readings": self._kept.get("readings", {})}
        total = math.inf if in_turn or self._limits is None else self.num_batches()
        self._triples = triples if math.isinf(total) else islice(triples, int(total))
        return self

    def __next__(self) -> Triple:
        if self._triples is None:
            raise RuntimeError("Call `iter(combined_loader)` before `next(combined_loader)`.")
        return next(self._triples)

    def reset(self) -> None:
        """Forget the running iterators; the next ``iter()`` starts from the beginning."""
        self._triples = None

    def open_pass(self, position: int, at: int = 0) -> Iterator[Any]:
        """A new iterator over the iterable at this position of ``flattened``, in mode "sequential" up to its limit.

        So many batches of the epoch come before ``at`` it. After `load_pass_state`, the first one goes on.
        """
        loader = self._flattened[position]
        if _has_state(loader):
            batches = iterate_batches(loader)
        else:
            kept = self._kept.get("readings", {}).pop(position, None)
            reading = self._readings[position] = LoaderPass(loader, at, kept, self._kept.get("done", 0))
            batches = reading.open()
        limit = self._limits[position] if self._limits and self.mode == "sequential" else math.inf
        return batches if math.isinf(limit) else islice(batches, int(limit))

    def tree_unflatten(self, values: Sequence[Any]) -> Any:
        """A value for each iterable, in the shape of ``iterables``."""
        return _fill(self._skeleton, values)

    def _stateful(self) -> list[Any]:
        return [each for each in self._flattened if _has_state(each)]

    def _datasets(self) -> dict[int, Any]:
        """Datasets without indices that keep a state themselves, where they are read in this process; by position."""
        found = {
            position: getattr(loader, "dataset", None)
            for position, loader in enumerate(self._flattened)
            if not _has_state(loader) and not getattr(loader, "num_workers", 0)
        }
        return {at: data for at, data in found.items() if isinstance(data, IterableDataset) and _has_state(data)}

    def is_stateful(self) -> bool:
        """Has any of the loaders, or of their datasets, a state of its own?"""
        return bool(self._stateful() or self._datasets())

    def record_state(self, given: int) -> None:
        """Keeps what `state_dict` and `pass_state` are to hold of loaders while so many batches are done."""
        datasets = {position: data.state_dict() for position, data in self._datasets().items()}
        self._history.append((given, ([loader.state_dict() for loader in self._stateful()], datasets)))

    def _noted(self, done: int | None) -> tuple[list[Any], dict[int, Any]]:
        found = [states for given, states in self._history if given == done]
        if not found:
            self.record_state(-1)
            found = [self._history.pop()[1]]
        return found[-1]

    def state_dict(self, done: int | None = None) -> list[dict[str, Any]]:
        """The states of those iterables that have one; as of so many batches, where they were read ahead."""
        return self._noted(done)[0]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Hand each iterable that has a state its own, in the order `state_dict` collected them."""
        stateful = self._stateful()
        if len(stateful) != len(states):
            what = f"The checkpoint has the states of {len(states)} loaders, but {len(stateful)} loaders take one."
            raise RuntimeError(f"{what} Resume with the loaders that were in use when it was saved.")
        for loader, state in zip(stateful, states):
            loader.load_state_dict(state)

    def pass_state(self, done: int, inside: bool, ahead: int = 0) -> dict[str, Any]:
        """Where the pass is, in plain types: inside, with so many batches done and more read ahead, or between two."""
        opened = {position: reading.state(done, inside, ahead) for position, reading in self._readings.items()}
        readings = {**self._kept.get("readings", {}), **opened}
        found: dict[str, Any] = {"done": done, "inside": inside, "readings": readings}
        if not inside:
            return found
        states, datasets = self._noted(done)
        return {**found, "over": sorted(self._over), "states": states, "datasets": datasets}

    def load_pass_state(self, kept: dict[str, Any]) -> None:
        """Lets the next pass begin at this `pass_state`."""
        self._history.clear()
        if states := kept.get("states"):
            self.load_state_dict(states)
        readings = {position: dict(reading) for position, reading in kept["readings"].items()}
        for position, data in self._datasets().items():
            if position in kept.get("datasets", {}) and position in readings:
                data.load_state_dict(kept["datasets"][position])
                readings[position]["placed"] = True
        self._kept = {**kept, "readings": readings}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_triples": None, "_readings": {}}


def _has_state(obj: Any) -> bool:
    return hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")


def _side_by_side(together: Callable, combined: CombinedLoader, iterators: list[Iterator]) -> Iterator[Triple]:
    for batch_idx, batches in enumerate(together(*iterators)):
        yield combined.tree_unflatten(batches), batch_idx, 0


def _cycling(combined: CombinedLoader, iterators: list[Iterator]) -> Iterator[Triple]:
    running = set(range(len(iterators))) - combined._over
    vacant = {position for position, loader in enumerate(combined.flattened) if loader_length(loader) == 0}
    running -= vacant
    for batch_idx in count(combined._done):
        batches = []
        for position, iterator in enumerate(iterators):
            batch = None if position in vacant else next(iterator, _END)
            if batch is _END:
                running.discard(position)
                combined._over.add(position)
                if not running:
                    return
                iterators[position] = combined.open_pass(position, batch_idx)
                batch = next(iterators[position], _END)
                if batch is _END:
                    raise RuntimeError(_cannot_begin_again(combined, position, batch_idx))
            batches.append(batch)
        if not running:  # all of them say that they are empty
            return
        yield combined.tree_unflatten(batches), batch_idx, 0


def _cannot_begin_again(combined: CombinedLoader, position: int, batch_idx: int) -> str:
    loader = combined.flattened[position]
    name = f"`{type(loader).__name__}`"
    if (data := getattr(loader, "dataset", None)) is not None:
        name += f" over `{type(data).__name__}`"
    what = (
        f"`CombinedLoader(mode='max_size_cycle')`: source {position}, a {name}, gave nothing when it was opened again"
    )
    fix = "Give one whose `__iter__` begins anew (no generator), or use mode 'max_size' or 'min_size'."
    return f"{what} for batch {batch_idx}: it is empty or used up, and others are not. {fix}"


def _sequential(combined: CombinedLoader, iterators: list[Iterator]) -> Iterator[Triple]:
    for dataloader_idx in range(len(combined.flattened)):
        # No other name for the iterator: it is gone, and its workers with it, before the next one is opened.
        for batch_idx, batch in enumerate(iterators.pop() if iterators else combined.open_pass(dataloader_idx)):
            yield batch, batch_idx, dataloader_idx


# Mode -> how the open iterators are read, and the number of batches from the lengths of all.
_MODES: dict[str, tuple[Callable[..., Iterator[Triple]], Callable[[list[int | float]], int | float]]] = {
    "min_size": (partial(_side_by_side, zip), min),
    "max_size_cycle": (_cycling, max),
    "max_size": (partial(_side_by_side, zip_longest), max),
    "sequential": (_sequential, sum),
}
