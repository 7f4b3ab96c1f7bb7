"""Each process's part of the data: cut so that the parts together are what one process would have read."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler

from fulmen.data.combined import loader_length
from fulmen.data.loaders import inner_sampler, is_map_style, rebuild_loader, shutdown_workers
from fulmen.data.sample_order import sampler_generators, shared_order
from fulmen.data.tensor_batches import iterate_batches
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import generator_states


def order_seed(loader: Any) -> int:
    """What the order of a loader's samples is drawn from: the seed of its own generator, else that of the run."""
    own = sampler_generators(inner_sampler(loader)) if is_map_style(loader) else []
    seed = own[0].initial_seed() if own else int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed())
    return seed % 2**62


class ShardedSampler(DistributedSampler):
    """This process's part of the order of a sampler or batch sampler, which all processes draw alike.

    Arguments:
        order: gives samples or batches; it may have no length, and no end.
        padded: begin again at the end, so that all processes get the same number.
        block: so many in a row belong to one process, the next ones to the next.
        seed: the random numbers that ``order`` draws follow from this and the epoch.
        ahead: how many are drawn at once.
    """

    def __init__(
        self, order: Any, num_replicas: int, rank: int, padded: bool, block: int = 1, seed: int = 0, ahead: int = 4096
    ) -> None:
        # Not the constructor of the base: it wants a length.
        self.dataset = self.order = order
        self.num_replicas, self.rank, self.padded, self.block = num_replicas, rank, padded, block
        self.seed, self.ahead, self.epoch, self.shuffle = seed, ahead, 0, False
        self.drop_last = getattr(order, "drop_last", False)
        self.begin: Callable[[], None] | None = None  # sets the generators for the next pass, in place of the seed

    def __iter__(self) -> Iterator[Any]:
        if callable(announce := getattr(self.order, "set_epoch", None)):
            announce(self.epoch)
        turn = self.num_replicas * self.block
        first: list[Any] = []
        begin, self.begin = self.begin, None
        for items in shared_order(self.order, self.seed + self.epoch, turn * max(1, self.ahead // turn), begin):
            first = first or items[:turn]
            if self.padded:
                items += islice(cycle(first), -len(items) % turn)
            for start in range(self.rank * self.block, len(items), turn):
                yield from items[start : start + self.block]

    def __len__(self) -> int:
        turns, left = divmod(len(self.order), self.num_replicas * self.block)
        if self.padded and left:
            return (turns + 1) * self.block
        return turns * self.block + max(0, min(left - self.rank * self.block, self.block))

    def __getattr__(self, name: str) -> Any:
        if name == "order":  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(self.order, name)


def shard_samples(loader: Any, *, num_replicas: int, rank: int, padded: bool, seed: int = 0) -> Any:
    """The loader with this process's part of the samples; unchanged if it has no indices, or splits them already.

    Padded (for training), every so-many-th sample is taken, so that a batch of each process, together, is the large
    batch that one process would see. Unpadded, the batches are those of one process, dealt out. So are the batches of
    a batch sampler of the user's own, which is wrapped, and never made again.
    """
    if not is_map_style(loader):
        return loader
    batches, order = loader.batch_sampler, inner_sampler(loader)
    if any(isinstance(part, DistributedSampler) or _splits(part) for part in (loader.sampler, batches, order)):
        return loader
    place: dict[str, Any] = {"num_replicas": num_replicas, "rank": rank, "padded": padded, "seed": seed}
    if type(batches) not in (BatchSampler, type(None)):
        return rebuild_loader(loader, batch_sampler=ShardedSampler(batches, **place, ahead=64))
    block = batches.batch_size if batches is not None and not padded else 1
    return rebuild_loader(loader, sampler=ShardedSampler(order, **place, block=block))


def _splits(sampler: Any) -> bool:
    """Does a sampler that is not torch's know its place among others?"""
    return hasattr(sampler, "num_replicas") and hasattr(sampler, "rank")


class RoundRobinLoader:
    """A loader without indices, read by all processes alike; each keeps every so-many-th batch.

    One that gives each process other batches has split its data itself, and is left as it is. What comes first tells,
    compared when this is made, by all processes together.

    Arguments:
        exchange: gives the objects of all processes, as a list.
    """

    def __init__(self, loader: Any, num_replicas: int, rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        self.loader, self.num_replicas, self.rank = loader, num_replicas, rank
        # A run that resumes inside this pass has to draw what is drawn here.
        self.began: dict[str, Any] | None = generator_states(include_cuda=False)
        batches = iterate_batches(loader)
        first = list(islice(batches, 1))
        # Kept for the first pass: it may be the only one.
        self.opened: Iterator[Any] | None = chain(first, batches)
        self.alike = len(set(exchange(_fingerprint(first)))) == 1
        name = f"`{type(getattr(loader, 'dataset', loader)).__name__}`"
        if self.alike:
            what = f"Each of {num_replicas} processes reads all of the {name}, and uses one batch in {num_replicas}."
            rank_zero_info(f"{what} To read less, let it split its data by rank: that is noticed.")
        else:
            what = f"The {name} gives each process other batches: it is taken to split its data by rank itself."
            fix = "If it only shuffles, call `seed_everything` first: with the same seed, all processes get a part."
            rank_zero_warn(f"{what} {fix}")

    def __iter__(self) -> Iterator[Any]:
        opened, self.opened, self.began = self.opened, None, None
        batches = iterate_batches(self.loader) if opened is None else opened
        return islice(batches, self.rank, None, self.num_replicas) if self.alike else batches

    def __len__(self) -> int:
        length = loader_length(self.loader)
        if math.isinf(length):
            raise TypeError(f"`{type(self.loader).__name__}` has no length.")
        return len(range(self.rank, int(length), self.num_replicas)) if self.alike else int(length)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # asked for while a copy is being made
            raise AttributeError(name)
        if name == "load_state_dict":  # it will begin elsewhere
            self.opened = None
        return getattr(self.loader, name)

    def reopen(self) -> None:
        """What was read to compare is not where a resumed pass begins."""
        self.opened = self.began = None

    def _shutdown_workers(self) -> None:
        self.opened = None
        shutdown_workers(self.loader)


def read_round_robin(loader: Any, *, num_replicas: int, rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
    """A loader without indices, split; unchanged with them."""
    return loader if is_map_style(loader) else RoundRobinLoader(loader, num_replicas, rank, exchange)


def _fingerprint(batches: list[Any]) -> str:
    buffer = io.BytesIO()
    try:
        torch.save(batches, buffer)
    except Exception:  # whatever cannot be pickled says so in its own way
        return repr([type(batch) for batch in batches])
    return hashlib.blake2b(buffer.getvalue()).hexdigest()
