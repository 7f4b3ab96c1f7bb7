"""The order of samples that all processes draw alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch

from fulmen.utilities.seed import generator_states, isolate_rng, seed_cpu, set_generator_states


def sampler_generators(order: Any) -> list[torch.Generator]:
    """The random generators that a sampler, or the one inside of a batch sampler, has for itself."""
    found = (getattr(part, "generator", None) for part in (order, getattr(order, "sampler", None)))
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def shared_order(order: Any, seed: int, ahead: int, begin: Callable[[], None] | None = None) -> Iterator[list[Any]]:
    """What ``iter(order)`` gives, in lists of ``ahead``; the random numbers drawn for it follow from the seed alone.

    Or from where ``begin`` sets the generators. Nobody else's random numbers are touched, nor the state of a generator that the order has for itself.
    """
    own, iterator, inside, own_inside = sampler_generators(order), None, {}, []
    while True:
        own_outside = [generator.get_state() for generator in own]
        with isolate_rng(include_cuda=False):
            if iterator is None:
                seed_cpu(seed)
                for generator in own:
                    generator.manual_seed(seed)
                if begin is not None:
                    begin()
                iterator = iter(order)
            else:
                set_generator_states(inside)
                for generator, state in zip(own, own_inside):
                    generator.set_state(state)
            items = list(islice(iterator, ahead))
            inside, own_inside = generator_states(include_cuda=False), [generator.get_state() for generator in own]
        for generator, state in zip(own, own_outside):
            generator.set_state(state)
        yield items
        if len(items) < ahead:
            return


class SharedOrder:
    """One pass over a sampler as several processes drew it, for one of them."""

    def __init__(self, order: Any, seed: int) -> None:
        self.order, self.seed = order, seed

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(shared_order(self.order, self.seed, 4096))

    def __len__(self) -> int:
        return len(self.order)
