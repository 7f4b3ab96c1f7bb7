"""A seeded order of samples that all processes draw identically, and the part of it that belongs to one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from fulmen.utilities.seed import generator_states, isolate_rng, seed_cpu, set_generator_states

CHUNK = 4096  # indices that are drawn at once


class ForwardsAttributes:
    """Has, beside its own attributes, those of the object that it wraps."""

    _forwards_to: str  # the name of the attribute that holds the object

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if self._forwards_to not in own:  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(own[self._forwards_to], name)


def sampler_of(owner: object) -> Any:
    """The sampler of a loader or of a batch sampler; None if it has none."""
    return getattr(owner, "sampler", None)


def batch_sampler_of(loader: object) -> Any:
    """The batch sampler of a loader; None if it has none."""
    return getattr(loader, "batch_sampler", None)


def sampler_generators(sampler: object) -> list[torch.Generator]:
    """The random generators that a sampler, or the one inside of a batch sampler, has for itself."""
    found = [part.generator for part in (sampler, sampler_of(sampler)) if hasattr(part, "generator")]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def tell_epoch(sampler: object, epoch: int) -> None:
    """Tells a sampler, if it cares, which epoch begins."""
    if hasattr(sampler, "set_epoch") and callable(sampler.set_epoch):
        sampler.set_epoch(epoch)


def shared_order(
    sampler: Iterable[Any], seed: int, chunk_size: int, restore_rng: Callable[[], None] | None = None
) -> Iterator[list[Any]]:
    """The items of ``iter(sampler)``, in lists of ``chunk_size``, drawn from random numbers that follow from the seed alone.

    With ``restore_rng``, they are drawn from where that sets the generators. The generators of the run, and those that
    the sampler has for itself, are left as they were found.
    """
    own = sampler_generators(sampler)
    iterator: Iterator[Any] | None = None
    inside: dict[str, Any] = {}
    own_inside: list[torch.Tensor] = []
    while True:
        own_outside = [generator.get_state() for generator in own]
        with isolate_rng(include_cuda=False):
            if iterator is None:
                seed_cpu(seed)
                for generator in own:
                    generator.manual_seed(seed)
                if restore_rng is not None:
                    restore_rng()
                iterator = iter(sampler)
            else:
                set_generator_states(inside)
                _set_states(own, own_inside)
            items = list(islice(iterator, chunk_size))
            inside = generator_states(include_cuda=False)
            own_inside = [generator.get_state() for generator in own]
        _set_states(own, own_outside)
        yield items
        if len(items) < chunk_size:
            return


def _set_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    for generator, state in zip(generators, states):
        generator.set_state(state)


class SharedOrder:
    """One pass over a sampler in the order that several processes drew, read by one of them."""

    def __init__(self, sampler: Collection[Any], seed: int) -> None:
        self.sampler = sampler
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(shared_order(self.sampler, self.seed, CHUNK))

    def __len__(self) -> int:
        return len(self.sampler)


class ShardedSampler(ForwardsAttributes, DistributedSampler[Any]):
    """This process's part of the order of a sampler or batch sampler, which all processes draw identically.

    Arguments:
        order: gives samples or batches; it may have no length, and no end.
        padded: begin again at the end, so that all processes get the same number.
        block_size: so many in a row belong to one process, the next ones to the next.
        seed: the random numbers that ``order`` draws follow from this and the epoch.
        chunk_size: how many are drawn at once.
    """

    _forwards_to = "order"

    def __init__(
        self, order: Any, num_replicas: int, rank: int, padded: bool, block_size: int = 1, seed: int = 0,
        chunk_size: int = CHUNK,
    ) -> None:  # fmt: skip
        # Not the constructor of the base: it wants a length.
        self.dataset = self.order = order
        self.num_replicas = num_replicas
        self.rank = rank
        self.padded = padded
        self.block_size = block_size
        self.seed = seed
        self.chunk_size = chunk_size
        self.epoch = 0
        self.shuffle = False
        self.drop_last = bool(order.drop_last) if hasattr(order, "drop_last") else False
        self.restore_rng: Callable[[], None] | None = None  # for the next pass, in place of the seed

    def resume_from(self, seed: int | None, restore_rng: Callable[[], None] | None) -> None:
        """Draws with this seed from now on, and the next pass from where ``restore_rng`` sets the generators."""
        self.seed = self.seed if seed is None else seed
        self.restore_rng = self.restore_rng if restore_rng is None else restore_rng

    def __iter__(self) -> Iterator[Any]:
        tell_epoch(self.order, self.epoch)
        round_size = self.num_replicas * self.block_size
        chunk_size = round_size * max(1, self.chunk_size // round_size)
        restore_rng = self.restore_rng
        self.restore_rng = None
        first: list[Any] = []
        for items in shared_order(self.order, self.seed + self.epoch, chunk_size, restore_rng):
            first = first or items[:round_size]
            if self.padded:
                items += islice(cycle(first), -len(items) % round_size)
            for start in range(self.rank * self.block_size, len(items), round_size):
                yield from items[start : start + self.block_size]

    def __len__(self) -> int:
        rounds, left = divmod(len(self.order), self.num_replicas * self.block_size)
        if self.padded and left:
            return (rounds + 1) * self.block_size
        return rounds * self.block_size + max(0, min(left - self.rank * self.block_size, self.block_size))


def samplers_of(loader: object) -> list[Any]:
    """The sampler and batch sampler of a loader, and the sampler inside of that, each once."""
    batch_sampler = batch_sampler_of(loader)
    found = (sampler_of(loader), batch_sampler, sampler_of(batch_sampler))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def sharded_samplers(loader: object) -> list[ShardedSampler]:
    """The samplers of a loader that give each process its part of an order."""
    return [sampler for sampler in samplers_of(loader) if isinstance(sampler, ShardedSampler)]
