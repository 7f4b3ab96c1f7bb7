"""Tensor datasets cut into batches at memory speed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map


def iterate_batches(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of ``iter(loader)``, bit for bit, found faster where the data already lies in memory.

    A plain `DataLoader` over a `TensorDataset`, or a `Subset` of one, picks samples one by one and stacks them again.
    Here each tensor is indexed once per batch. The samplers are read, and random numbers drawn, as always.
    """
    source = in_memory_dataset(loader)
    if source is None:
        return iter(loader)
    assert isinstance(loader, DataLoader)
    dataset: Any = loader.dataset
    subsets = []
    while dataset is not source:
        subsets.append(_compact_indices(dataset.indices))
        dataset = dataset.dataset
    batches = iter(loader.batch_sampler)  # type: ignore[arg-type]
    # The DataLoader draws a seed for its workers even when it has none.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    return _cut_batches(batches, loader.dataset, subsets, source.tensors)


def in_memory_dataset(loader: object) -> TensorDataset | None:
    """The tensors behind a loader whose batches are found by indexing them, or None."""
    dataset: Any = loader.dataset if _is_plain(loader) else None
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset if type(dataset) is TensorDataset and all(map(_is_sliceable, dataset.tensors)) else None


def _cut_batches(
    batches: Iterator[list[int]], dataset: Dataset[Any], subsets: list[Sequence[int]], tensors: tuple[Tensor, ...]
) -> Iterator[list[Tensor]]:
    for indices in batches:
        rows = _select_rows(indices, subsets, len(tensors[0]))
        if rows is None:  # anything unusual, wrong indices included, is left to the dataset
            yield default_collate(_read_samples(dataset, indices))
        elif isinstance(rows, slice):
            yield [tensor[rows].clone() for tensor in tensors]
        else:
            # Twice as fast as `torch.tensor(rows)`.
            where = torch.frombuffer(array("q", rows), dtype=torch.int64)
            yield [tensor.index_select(0, where.to(tensor.device)) for tensor in tensors]


def _read_samples(dataset: Dataset[Any], indices: list[int]) -> list[Any]:
    """As the `DataLoader` does it: together, where the dataset can."""
    if hasattr(dataset, "__getitems__") and dataset.__getitems__:
        return list(dataset.__getitems__(indices))
    return [dataset[index] for index in indices]


def _select_rows(indices: object, subsets: list[Sequence[int]], size: int) -> list[int] | slice | None:
    """The rows of the tensors behind a batch of indices; a slice if they follow each other, None if in doubt."""
    if type(indices) is not list or not indices:
        return None
    for subset in subsets:
        indices = list(map(subset.__getitem__, indices))
    if set(map(type, indices)) != {int} or min(indices) < 0 or max(indices) >= size:
        return None
    first = indices[0]
    last = indices[-1]
    if last - first == len(indices) - 1 and indices == list(range(first, last + 1)):
        return slice(first, last + 1)
    return indices


def _is_plain(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Does this loader fetch, collate and yield in the one way that is reproduced here?"""
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not (loader.num_workers or loader.pin_memory or loader.timeout)
        and loader.collate_fn is default_collate
        # The table behind `default_collate` may be extended by anybody.
        and default_collate_fn_map.get(Tensor) is collate_tensor_fn
        and not any(map(issubclass, repeat(tuple), default_collate_fn_map))
    )


def _is_sliceable(tensor: Tensor) -> bool:
    """Does indexing this tensor give what stacking its rows gives, memory layout and autograd included?"""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous()
    special = tensor.requires_grad or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg()
    return plain and not special


def _compact_indices(indices: Any) -> Sequence[int]:
    """The indices of a subset side by side in memory, where random access is several times faster than in a list."""
    if hasattr(indices, "ndim") and indices.ndim == 1 and str(indices.dtype).rpartition(".")[-1] in ("int32", "int64"):
        indices = indices.tolist()
    plain = type(indices) in (list, tuple, range) and set(map(type, indices)) == {int}
    return array("q", indices) if plain else indices
