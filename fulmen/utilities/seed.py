"""Random numbers that come out the same: seeding, isolating, and storing the state of all generators."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import random
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fulmen.utilities.lazy import has_module
from fulmen.utilities.rank_zero import current_rank, rank_zero_info, rank_zero_warn

MAX_SEED = 2**32 - 1


@functools.cache
def _import_numpy() -> Any:
    return importlib.import_module("numpy") if has_module("numpy") else None


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python, numpy and torch (all devices), here and in the processes started from here; returns the seed.

    Args:
        seed: anything `int` understands, in 0 … 2**32 - 1; None takes ``PL_GLOBAL_SEED`` from the environment, or 0.
        workers: whether each dataloader worker of each rank gets its own stream (see `pl_worker_init_function`).
        verbose: whether to log the seed.

    Raises:
        ValueError: if the seed is not such a number.

    Examples:
        >>> seed_everything("42", verbose=False)
        42
    """
    given = os.environ.get("PL_GLOBAL_SEED") if seed is None else seed
    if given is None:
        rank_zero_warn("No seed found, seed set to 0")
        given = 0
    try:
        number = int(given)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        name = "PL_GLOBAL_SEED" if seed is None else "seed"
        raise ValueError(f"`{name}={given!r}` is not a seed. Use an integer from 0 to {MAX_SEED}.")
    if verbose:
        rank_zero_info(f"Seed set to {number}")
    os.environ["PL_GLOBAL_SEED"] = str(number)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    _seed_generators(number, number, number)
    return number


def _seed_generators(for_python: int, for_numpy: int, for_torch: int) -> None:
    random.seed(for_python)
    if numpy := _import_numpy():
        numpy.random.seed(for_numpy)
    torch.manual_seed(for_torch)


def seed_cpu(seed: int) -> None:
    """Seeds python, numpy and torch, but no other device."""
    random.seed(seed)
    if numpy := _import_numpy():
        numpy.random.seed(seed % (MAX_SEED + 1))
    torch.default_generator.manual_seed(seed)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """A ``worker_init_fn`` that gives python, numpy and torch different streams in every worker of every rank."""
    rank = current_rank() if rank is None else rank
    # torch seeds a worker with base + worker_id; the base is what all workers of an epoch share.
    base = torch.initial_seed() - worker_id
    digest = hashlib.blake2b(f"{base}/{worker_id}/{rank}".encode(), digest_size=32).digest()
    for_torch, for_python, for_numpy = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    _seed_generators(for_python, for_numpy % (MAX_SEED + 1), for_torch)


def cuda_is_in_use() -> bool:
    """Has this process used CUDA already? Asking does not start it."""
    return bool(torch.cuda.is_initialized())


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Random numbers drawn inside do not change those drawn afterwards, by python, numpy or torch.

    For whatever may import a package: some draw while they are imported.
    """
    python = random.getstate()
    cpu = torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    # Before CUDA is in use there is no state to keep, and asking would start it (which forbids forking later).
    devices = torch.cuda.get_rng_state_all() if include_cuda and cuda_is_in_use() else []
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(arrays)
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)


def generator_states(include_cuda: bool = True) -> dict[str, Any]:
    """The state of all random generators, as plain values that ``torch.load(weights_only=True)`` can read."""
    states: dict[str, Any] = {"python": python_state(random.getstate()), "torch": torch.get_rng_state()}
    if numpy := _import_numpy():
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        keys = torch.from_numpy(keys.astype("int64"))  # a list would cost a file more time than all of its weights
        states["numpy"] = (str(name), keys, int(position), int(has_gauss), float(cached))
    # Before CUDA is in use there is no state to keep, and asking would start it (which forbids forking later).
    if include_cuda and cuda_is_in_use():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def python_state(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """What ``getstate`` of a generator of python gave, with its numbers in one tensor; and back."""
    version, numbers, gauss = state
    if isinstance(numbers, torch.Tensor):
        return version, tuple(numbers.tolist()), gauss
    return version, torch.frombuffer(array("q", numbers), dtype=torch.int64).clone(), gauss


def set_generator_states(states: dict[str, Any]) -> None:
    """Put back what `generator_states` returned; generators missing here or there are left alone."""
    if "python" in states:
        version, numbers, gauss = states["python"]  # older files have a tuple of numbers
        random.setstate((version, tuple(torch.as_tensor(numbers).tolist()), gauss))
    if "torch" in states:
        torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states and (numpy := _import_numpy()):
        name, keys, *more = states["numpy"]
        numpy.random.set_state((name, torch.as_tensor(keys).tolist(), *more))
    if torch.cuda.is_available():
        for index, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), index)


def same_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Are these the same states of python, torch and numpy?"""
    pairs = [(a["torch"], b["torch"]), *zip(a["python"], b["python"]), *zip(a.get("numpy", ()), b.get("numpy", ()))]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
