"""Resuming on another number of processes: the position in an epoch, and the states of ranks, resharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulmen.data.loader_state import dataset_and_batch_size
from fulmen.metrics.entries import ENTRY_TYPES, Entry


class Misfit(Exception):
    """Why a run cannot continue at the place that a checkpoint names; the message is the end of a sentence."""


def locate_in_epoch(
    kept: dict[str, Any], loaders: Any, before: int, world: int, num_batches: float
) -> tuple[dict[str, Any], str | None]:
    """Where the training loaders of a run on `world` processes continue, saved on `before`; or why they cannot.

    What counts is the number of samples that all processes together have consumed.
    """
    passes = kept["readings"]
    try:
        if len(passes) > len(loaders.flattened):
            raise Misfit(f"it was reading {len(passes)} training loaders, and there are {len(loaders.flattened)}")
        done = {
            index: _batches_done(kept["done"], state, loaders.flattened[index], before, world)
            for index, state in passes.items()
        }
        if before != world and (len(set(done.values())) > 1 or any(state["at"] for state in passes.values())):
            raise Misfit(f"several loaders were read by {before} processes, and now by {world}")
        batch = next(iter(done.values()), kept["done"])
        if batch > num_batches:
            raise Misfit(f"{batch} batches of its epoch are done, and there are {num_batches}")
    except Misfit as misfit:
        return kept, str(misfit)
    if before == world:
        return kept, None
    passes = {index: _reshard_pass(state, before, world) for index, state in passes.items()}
    return {**kept, "done": batch, "readings": passes, "states": []}, None


def _batches_done(done: int, state: dict[str, Any], loader: Any, before: int, world: int) -> int:
    """After how many batches of each process `world` of them have consumed what `before` had after `done` batches."""
    samples, batch_size = state.get("size", (None, None))
    samples_now, batch_size_now = dataset_and_batch_size(loader)
    if samples != samples_now:
        raise Misfit(f"its training data had {samples} samples, and has {samples_now}")
    if before == world and batch_size != batch_size_now:
        raise Misfit(f"its batches had {batch_size} samples, and have {batch_size_now}")
    consumed = done * before * (batch_size or 1)
    per_batch = world * (batch_size_now or 1)
    if consumed % per_batch:
        unit = "samples" if batch_size else "batches"
        what = f"{before} processes have consumed {consumed} {unit} of its epoch, which is not a multiple of"
        raise Misfit(f"{what} the {per_batch} that {world} read at a time")
    return consumed // per_batch


def _reshard_pass(state: dict[str, Any], before: int, world: int) -> dict[str, Any]:
    """How the order was drawn: from the generators of one process, or by several from a seed."""
    alone = "alone" in state or (before == 1 and "together" not in state)
    state = {key: value for key, value in state.items() if key not in ("alone", "together", "workers")}
    if alone:
        return {**state, "alone": True} if world > 1 else state
    return {**state, "together": state["seed"] + state["epoch"]} if world == 1 and "seed" in state else state


def reshard_rank_states(ranks: list[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The state of one rank of `world`, from those of more or fewer: its own, and those of ranks that are gone."""
    parts = ranks[rank::world]
    if not parts:
        book = {"entries": [], "views": ranks[0]["book"]["views"]}
        return {**ranks[0], "generators": None, "book": book, "metrics": {}, "window": _average_windows(ranks)}
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in (entry for part in parts for entry in part["book"]["entries"]):
        key = tuple(entry["key"])
        entries[key] = _merge_entries(entries[key], entry) if key in entries else entry
    book = {"entries": list(entries.values()), "views": parts[0]["book"]["views"]}
    seen: dict[str, list[dict[str, Any]]] = {}
    for name, state in (item for part in parts for item in part["metrics"].items()):
        seen.setdefault(name, []).append(state)
    return {
        **parts[0],
        "book": book,
        "metrics": seen,
        "window": _average_windows(ranks),
        "train": ranks[0].get("train"),
    }


def _merge_entries(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    total, on_device = a["total"]
    other = b["total"][0]
    if total is None or other is None:
        total = other if total is None else total
    else:
        total = ENTRY_TYPES.get(a["options"][4], Entry).merge_totals(total, other)
    return {**a, "total": (total, on_device), "weight": a["weight"] + b["weight"]}


def _average_windows(ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The open window, with the gradients that averaging over the processes would give."""
    windows = [part["window"] for part in ranks if part["window"] is not None]
    if not windows:
        return None
    names = {name for window in windows for name in window["gradients"]}
    found: dict[str, list[Tensor]] = {n: [w["gradients"][n] for w in windows if n in w["gradients"]] for n in names}
    return {**windows[0], "gradients": {name: torch.stack(all_).sum(0) / len(ranks) for name, all_ in found.items()}}
