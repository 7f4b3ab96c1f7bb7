"""Several loaders read as one."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice, zip_longest
from operator import itemgetter
from typing import Any

from fulmen.data.fetch import iterate
from fulmen.utilities.errors import explain, suggestion
from fulmen.utilities.types import Stateful

Triple = tuple[Any, int, int]

_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)
_END = object()


def is_leaf(tree: Any) -> bool:
    """Is this one loader, rather than a container of loaders?

    Lists, tuples and dictionaries are containers, also when nested; subclasses of them are not, except named tuples. A
    list of numbers or strings is data, and so is anything empty.
    """
    if type(tree) not in _CONTAINERS and not _is_named_tuple(tree):
        return True
    if isinstance(tree, dict):
        return not tree
    return all(isinstance(item, (int, float, str)) for item in tree)


def leaves(tree: Any) -> list[Any]:
    """The loaders of a nested container, in the order they stand there."""
    if is_leaf(tree):
        return [tree]
    return [leaf for item in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(item)]


def sized(loader: Any) -> int | float:
    """The number of batches a loader says it has; infinite when it does not say."""
    if isinstance(loader, CombinedLoader):
        return loader.num_batches()
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


class CombinedLoader:
    """One iterable over several, yielding ``(batch, batch_idx, dataloader_idx)``.

    ``iterables`` is any nesting of lists, tuples and dictionaries of iterables; except in mode ``"sequential"`` a batch
    has the same shape, with a batch in the place of each iterable. The modes:

    * ``"min_size"`` stops with the shortest iterable.
    * ``"max_size_cycle"`` stops with the longest one; the others start again when they are exhausted.
    * ``"max_size"`` stops with the longest one; the others give None when they are exhausted.
    * ``"sequential"`` reads one iterable after the other. ``batch_idx`` counts within each of them.

    ``len()`` works after ``iter()`` was called, and only if the iterables have a length.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in _MODES:
            hint = f"Use one of {list(_MODES)}.{suggestion(str(mode), _MODES)}"
            raise ValueError(explain(f"`CombinedLoader(mode={mode!r})` is not a way to combine loaders.", fix=hint))
        self.mode = mode
        self._iterables = iterables
        self._flattened = leaves(iterables)
        self._skeleton = _skeleton(iterables, count())
        self._limits: list[int | float] | None = None
        self._triples: Iterator[Triple] | None = None

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
            raise ValueError(f"A list of {len(flattened)} cannot replace {len(self._flattened)} iterables.")
        self._iterables = _fill(self._skeleton, flattened)
        self._flattened = list(flattened)

    @property
    def sampler(self) -> Any:
        """The samplers of the iterables (None for those without), in the shape of ``iterables``."""
        return _fill(self._skeleton, [getattr(loader, "sampler", None) for loader in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers of the iterables (None for those without), in the shape of ``iterables``."""
        return _fill(self._skeleton, [getattr(loader, "batch_sampler", None) for loader in self._flattened])

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches are counted at most for each iterable; assign one number for all, or one for each."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None and len(limits) != len(self._flattened):
            raise ValueError(f"{len(limits)} limits for {len(self._flattened)} iterables: give one, or one for each.")
        self._limits = limits

    def lengths(self) -> list[int | float]:
        """The number of batches of each iterable, limits applied; infinite where neither length nor limit is known."""
        limits = self._limits or [math.inf] * len(self._flattened)
        return [min(sized(loader), limit) for loader, limit in zip(self._flattened, limits)]

    def num_batches(self) -> int | float:
        """The number of batches of one pass over everything, limits applied; infinite when unknown."""
        return _MODES[self.mode][1](self.lengths())

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
        opened = [self.open(position) for position in range(1 if in_turn else len(self._flattened))]
        triples = _MODES[self.mode][0](self, opened)
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

    def open(self, position: int) -> Iterator[Any]:
        """A new iterator over the iterable at this position of ``flattened``, in mode "sequential" up to its limit."""
        batches = iterate(self._flattened[position])
        limit = self._limits[position] if self._limits and self.mode == "sequential" else math.inf
        return batches if math.isinf(limit) else islice(batches, int(limit))

    def packer(self) -> Callable[[Sequence[Any]], Any]:
        """A function that gives a list with a batch of each iterable the shape of ``iterables``."""
        return itemgetter(0) if self._skeleton == 0 else partial(_fill, self._skeleton)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of those iterables that have one."""
        return [loader.state_dict() for loader in self._flattened if isinstance(loader, Stateful)]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Hand each iterable that has a state its own, in the order `state_dict` collected them."""
        stateful = [loader for loader in self._flattened if isinstance(loader, Stateful)]
        if len(stateful) != len(states):
            raise RuntimeError(
                f"The checkpoint has the states of {len(states)} loaders, but {len(stateful)} of the present loaders "
                "take a state. Resume with the loaders that were in use when the checkpoint was saved."
            )
        for loader, state in zip(stateful, states):
            loader.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_triples": None}


def _is_named_tuple(tree: Any) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def _map_items(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """A container of the same kind with ``fn`` of each item."""
    if isinstance(tree, dict):
        pairs = {key: fn(item) for key, item in tree.items()}
        return defaultdict(tree.default_factory, pairs) if isinstance(tree, defaultdict) else type(tree)(pairs)
    items = map(fn, tree)
    return type(tree)(*items) if _is_named_tuple(tree) else type(tree)(items)


def _skeleton(tree: Any, positions: Iterator[int]) -> Any:
    """The container with the position of each loader in its place."""
    return next(positions) if is_leaf(tree) else _map_items(tree, lambda item: _skeleton(item, positions))


def _fill(skeleton: Any, values: Sequence[Any]) -> Any:
    return values[skeleton] if type(skeleton) is int else _map_items(skeleton, lambda item: _fill(item, values))


def _side_by_side(together: Callable, combined: CombinedLoader, iterators: list[Iterator]) -> Iterator[Triple]:
    pack = combined.packer()
    for batch_idx, batches in enumerate(together(*iterators)):
        yield pack(batches), batch_idx, 0


def _cycling(combined: CombinedLoader, iterators: list[Iterator]) -> Iterator[Triple]:
    pack, running = combined.packer(), set(range(len(iterators)))
    for batch_idx in count():
        batches = []
        for position, iterator in enumerate(iterators):
            batch = next(iterator, _END)
            if batch is _END:
                running.discard(position)
                if not running:
                    return
                iterators[position] = combined.open(position)
                batch = next(iterators[position], _END)
                if batch is _END:
                    return
            batches.append(batch)
        yield pack(batches), batch_idx, 0


def _sequential(combined: CombinedLoader, iterators: list[Iterator]) -> Iterator[Triple]:
    for dataloader_idx in range(len(combined.flattened)):
        # No other name for the iterator: it is gone, and its workers with it, before the next one is opened.
        for batch_idx, batch in enumerate(iterators.pop() if iterators else combined.open(dataloader_idx)):
            yield batch, batch_idx, dataloader_idx


# Mode -> how the open iterators are read, and the number of batches from the lengths of all.
_MODES: dict[str, tuple[Callable[..., Iterator[Triple]], Callable[[list[int | float]], int | float]]] = {
    "min_size": (partial(_side_by_side, zip), min),
    "max_size_cycle": (_cycling, max),
    "max_size": (partial(_side_by_side, zip_longest), max),
    "sequential": (_sequential, sum),
}
