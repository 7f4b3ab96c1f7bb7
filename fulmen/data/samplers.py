"""Each process's part of the data: cut so that the parts together are what one process would have read."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from fulmen.data.combined import loader_length
from fulmen.data.loader_state import PeekedLoader, dataset_of, is_map_style
from fulmen.data.loaders import inner_sampler, rebuild_loader, shutdown_workers
from fulmen.data.sample_order import ForwardsAttributes, ShardedSampler, sampler_generators
from fulmen.data.tensor_batches import iterate_batches
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import generator_states


def order_seed(loader: object) -> int:
    """What the order of a loader's samples is drawn from: the seed of its own generator, else that of the run."""
    own = sampler_generators(inner_sampler(loader)) if is_map_style(loader) else []
    seed = own[0].initial_seed() if own else int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed())
    return seed % 2**62


def shard_samples(loader: Iterable[Any], *, num_replicas: int, rank: int, padded: bool, seed: int = 0) -> Iterable[Any]:
    """The loader with this process's part of the samples; unchanged if it has no indices, or splits them already.

    Padded (for training), every so-many-th sample is taken, so that a batch of each process, together, is the large
    batch that one process would see. Unpadded, the batches are those of one process, dealt out. So are the batches of
    a batch sampler of the user's own, which is wrapped, and never made again.
    """
    if not is_map_style(loader):
        return loader
    batches = loader.batch_sampler
    order = inner_sampler(loader)
    if any(isinstance(part, DistributedSampler) or _knows_its_rank(part) for part in (loader.sampler, batches, order)):
        return loader
    options: dict[str, Any] = {"num_replicas": num_replicas, "rank": rank, "padded": padded, "seed": seed}
    if type(batches) not in (BatchSampler, type(None)):
        return rebuild_loader(loader, batch_sampler=ShardedSampler(batches, **options, chunk_size=64))
    block_size = batches.batch_size if isinstance(batches, BatchSampler) and not padded else 1
    return rebuild_loader(loader, sampler=ShardedSampler(order, **options, block_size=block_size))


def shard_loader(loader: DataLoader[Any], num_replicas: int, rank: int) -> Iterable[Any]:
    """The loader as one would write it for a loop over torch's DDP: with a `DistributedSampler`, shuffled if it was.

    What that sampler cannot do (drawing with replacement, an order of the user's own) is cut into parts as it is.
    """
    order = inner_sampler(loader) if is_map_style(loader) else None
    shuffles = type(order) is RandomSampler and not order.replacement and order.num_samples == len(order.data_source)
    if type(loader.batch_sampler) is BatchSampler and (shuffles or type(order) is SequentialSampler):
        seed = int(os.environ.get("PL_GLOBAL_SEED") or 0)
        sampler: DistributedSampler[Any] = DistributedSampler(
            loader.dataset, num_replicas, rank, shuffle=shuffles, seed=seed
        )
        return rebuild_loader(loader, sampler=sampler)
    return shard_samples(loader, num_replicas=num_replicas, rank=rank, padded=True, seed=order_seed(loader))


def _knows_its_rank(sampler: object) -> bool:
    """Does a sampler that is not torch's give each process a part?"""
    return hasattr(sampler, "num_replicas") and hasattr(sampler, "rank")


class RoundRobinLoader(ForwardsAttributes, PeekedLoader):
    """A loader without indices, which every process reads in full, using one batch in ``num_replicas``.

    One that gives each process other batches has split its data itself, and all of them are used. What comes first
    tells: it is read when this is made, and compared by all processes together.

    Arguments:
        exchange: gives the objects of all processes, as a list.
    """

    _forwards_to = "loader"

    def __init__(
        self, loader: Iterable[Any], num_replicas: int, rank: int, exchange: Callable[[Any], list[Any]]
    ) -> None:
        self.loader = loader
        self.num_replicas = num_replicas
        self.rank = rank
        # A run that resumes inside this pass has to draw what is drawn here.
        self.rng_before_peek = generator_states(include_cuda=False)
        batches = iterate_batches(loader)
        first = list(islice(batches, 1))
        # Kept for the first pass: it may be the only one.
        self.peeked: Iterator[Any] | None = chain(first, batches)
        self.batches_are_shared = len(set(exchange(_digest_batches(first)))) == 1
        name = f"`{type(dataset_of(loader)).__name__}`"
        if self.batches_are_shared:
            what = f"Each of {num_replicas} processes reads all of the {name}, and uses one batch in {num_replicas}."
            rank_zero_info(f"{what} To read less, let it split its data by rank: that is noticed.")
        else:
            what = f"The {name} gives each process other batches: it is taken to split its data by rank itself."
            fix = "If it only shuffles, call `seed_everything` first: with the same seed, all processes get a part."
            rank_zero_warn(f"{what} {fix}")

    def __iter__(self) -> Iterator[Any]:
        batches = iterate_batches(self.loader) if self.peeked is None else self.peeked
        self.discard_peeked()
        return islice(batches, self.rank, None, self.num_replicas) if self.batches_are_shared else batches

    def __len__(self) -> int:
        length = loader_length(self.loader)
        if math.isinf(length):
            raise TypeError(f"`{type(self.loader).__name__}` has no length.")
        return len(range(self.rank, int(length), self.num_replicas)) if self.batches_are_shared else int(length)

    def __getattr__(self, name: str) -> Any:
        if name == "load_state_dict":  # it will begin elsewhere
            self.peeked = None
        return super().__getattr__(name)

    def discard_peeked(self) -> None:
        self.peeked = None
        self.rng_before_peek = None

    def _shutdown_workers(self) -> None:
        self.peeked = None
        shutdown_workers(self.loader)


def _digest_batches(batches: list[Any]) -> str:
    buffer = io.BytesIO()
    try:
        torch.save(batches, buffer)
    except Exception:  # whatever cannot be pickled says so in its own way
        return repr([type(batch) for batch in batches])
    return hashlib.blake2b(buffer.getvalue()).hexdigest()
