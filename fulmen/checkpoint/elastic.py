"""A checkpoint's place in an epoch, checked against the data and the processes of the run that goes on from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulmen.data.loader_state import dataset_and_batch_size
from fulmen.metrics.logbook import KINDS
from fulmen.metrics.reduce import merged_state


def placed(
    kept: dict[str, Any], loaders: Any, before: int, world: int, num_batches: float
) -> tuple[dict[str, Any], str | None]:
    """The place of the training loaders for a run on `world` processes, saved on `before`; or why there is none.

    What counts is the number of samples that all processes together are through with.
    """
    readings, flattened = kept["readings"], loaders.flattened
    if len(readings) > len(flattened):
        return kept, f"it was reading {len(readings)} training loaders, and there are {len(flattened)}"
    done = {}
    for position, reading in readings.items():
        (samples, batch), (samples_now, batch_now) = (
            reading.get("size", (None, None)),
            dataset_and_batch_size(flattened[position]),
        )
        if samples != samples_now:
            return kept, f"its training data had {samples} samples, and has {samples_now}"
        if before == world and batch != batch_now:
            return kept, f"its batches had {batch} samples, and have {batch_now}"
        gone, turn = kept["done"] * before * (batch or 1), world * (batch_now or 1)
        done[position] = gone // turn
        if gone % turn:
            unit = "samples" if batch else "batches"
            what = f"{before} processes are through with {gone} {unit} of its epoch, which is no multiple of the {turn}"
            return kept, f"{what} that {world} read at a time"
    if before != world and (len(set(done.values())) > 1 or any(reading["at"] for reading in readings.values())):
        return kept, f"several loaders were read by {before} processes, and now by {world}"
    place = next(iter(done.values()), kept["done"])
    if place > num_batches:
        return kept, f"{place} batches of its epoch are done, and there are {num_batches}"
    if before == world:
        return kept, None
    readings = {position: _drawn(reading, before, world) for position, reading in readings.items()}
    return {**kept, "done": place, "readings": readings, "states": []}, None


def _drawn(reading: dict[str, Any], before: int, world: int) -> dict[str, Any]:
    """How the order was drawn: from the generators of one process, or by several from a seed."""
    alone = "alone" in reading or (before == 1 and "together" not in reading)
    reading = {key: value for key, value in reading.items() if key not in ("alone", "together", "workers")}
    if alone:
        return {**reading, "alone": True} if world > 1 else reading
    return {**reading, "together": reading["seed"] + reading["epoch"]} if world == 1 and "seed" in reading else reading


def regrouped(ranks: list[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """What a process takes over where there were more or fewer: its own part, or the parts of those that are gone."""
    parts = ranks[rank::world]
    if not parts:
        book = {"entries": [], "views": ranks[0]["book"]["views"]}
        return {**ranks[0], "generators": None, "book": book, "metrics": {}, "window": _mean(ranks)}
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in (entry for part in parts for entry in part["book"]["entries"]):
        key = tuple(entry["key"])
        entries[key] = _sum(entries[key], entry) if key in entries else entry
    book = {"entries": list(entries.values()), "views": parts[0]["book"]["views"]}
    seen: dict[str, list[dict[str, Any]]] = {}
    for name, state in (item for part in parts for item in part["metrics"].items()):
        seen.setdefault(name, []).append(state)
    return {**parts[0], "book": book, "metrics": seen, "window": _mean(ranks), "train": ranks[0].get("train")}


def _sum(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    (x, on_device), y = a["total"], b["total"][0]
    merge = getattr(KINDS.get(a["options"][4]), "merge", lambda total, value: total + value)
    total = x if y is None else y if x is None else merge(x, y)
    return {**a, "total": (total, on_device), "weight": a["weight"] + b["weight"]}


def merged_metric(metric: Any, states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of a metric from those of several processes."""
    weights = [state["updates"] for state in states]
    values = {
        name: merged_state([state["values"][name] for state in states], weights, reduction)
        for name, reduction in metric._reductions.items()
    }
    return {"values": values, "updates": sum(weights)}


def _mean(ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The open window, with the gradients that averaging over the processes would give."""
    windows = [part["window"] for part in ranks if part["window"] is not None]
    if not windows:
        return None
    names = {name for window in windows for name in window["gradients"]}
    found: dict[str, list[Tensor]] = {n: [w["gradients"][n] for w in windows if n in w["gradients"]] for n in names}
    return {**windows[0], "gradients": {name: torch.stack(all_).sum(0) / len(ranks) for name, all_ in found.items()}}
