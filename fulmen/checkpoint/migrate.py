"""Files of older versions, brought up to date in memory before anybody reads them."""

from __future__ import annotations

import re
from typing import Any

from fulmen.checkpoint.loop_counters import to_loops
from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

VERSION_KEY = "pytorch-lightning_version"
# The version whose file layout we write and whose interface we have.
API_VERSION = "2.6.6"
# Loop counters before 2.0 were named after a deeper nesting of loops, and some of them are of no use any more.
RENAMED = (
    (".batch_loop.optimizer_loop.", ".automatic_optimization."),
    (".batch_loop.manual_loop.", ".manual_optimization."),
    (".val_loop.epoch_loop.", ".val_loop."),
)
GONE = ("dataloader_progress", "batch_loop.state_dict", "_results")


def refuse_foreign(checkpoint: Any, path: Any = "") -> None:
    """Raises if this was not written by a trainer."""
    if not isinstance(checkpoint, dict):
        what = f"The file {path} holds a `{type(checkpoint).__name__}`, not the dict that a checkpoint is."
        raise TypeError(f"{what} Use one written by `trainer.save_checkpoint` or `ModelCheckpoint`.")
    if VERSION_KEY not in checkpoint:
        what = f"The file {path} has no key `{VERSION_KEY}`, only {sorted(map(str, checkpoint))[:10]}: no trainer wrote it."
        raise KeyError(f"{what} For plain weights, use `model.load_state_dict(torch.load(path))`.")


def migrate_checkpoint(checkpoint: dict[str, Any], path: Any = "") -> dict[str, Any]:
    """The same dict in today's layout; the version it was written by is kept under another key."""
    refuse_foreign(checkpoint, path)
    found = checkpoint[VERSION_KEY]
    ours, version = release(API_VERSION), release(found) or release(API_VERSION)
    if version > ours:
        what = f"The checkpoint is of version {found}, newer than {API_VERSION}: something in it may be ignored."
        rank_zero_warn(what, category=PossibleUserWarning)
    elif version < ours:
        checkpoint[f"legacy_{VERSION_KEY}"], checkpoint[VERSION_KEY] = found, API_VERSION
        for old in ("MixedPrecisionPlugin", "NativeMixedPrecisionPlugin"):
            if old in checkpoint:
                checkpoint["MixedPrecision"] = checkpoint.pop(old)
        if callbacks := checkpoint.get("callbacks"):
            # Once a part of `ModelCheckpoint.state_key`; it would keep the callback from finding its state.
            gone = r", 'save_on_train_epoch_end': \w+"
            checkpoint["callbacks"] = {
                re.sub(gone, "", key) if isinstance(key, str) else key: state for key, state in callbacks.items()
            }
        if version < (1, 6):
            what = f"The checkpoint is of version {found}: besides weights, only the numbers of epochs and steps are"
            rank_zero_warn(
                f"{what} surely read from it. Files from 1.6 on are read in full.", category=PossibleUserWarning
            )
            counters = {"epochs": checkpoint.get("epoch", 0), "steps": checkpoint.get("global_step", 0)}
            checkpoint["loops"] = to_loops(counters)
        elif version < (2, 0):
            loops = checkpoint.get("loops") or {}
            checkpoint["loops"] = {verb: _renamed(loop, verb == "fit_loop") for verb, loop in loops.items()}
            fix = f"`python -m fulmen upgrade {path or 'PATH'}` does it for the file."
            rank_zero_info(f"The checkpoint of version {found} was brought up to date in memory. {fix}")
    return checkpoint


def _renamed(loop: dict[str, Any], fit: bool) -> dict[str, Any]:
    """The counters of a loop under the names of 2.0."""
    renamed = {}
    for key, value in loop.items():
        if not key.endswith(GONE):
            for old, new in RENAMED:
                key = key.replace(old, new)
            if key.endswith("optim_progress"):
                value = {name: counts for name, counts in value.items() if name != "optimizer_position"}
            renamed[key if fit else key.removeprefix("epoch_loop.")] = value
    return renamed


def release(version: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:3])
