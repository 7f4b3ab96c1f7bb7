"""Files of older versions, brought up to date in memory before anybody reads them."""

from __future__ import annotations

import re
from typing import Any

from fulmen.checkpoint.loop_counters import to_loops
from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

VERSION_KEY = "pytorch-lightning_version"
LEGACY_VERSION_KEY = "legacy_pytorch-lightning_version"
# The version whose file layout we write and whose interface we have.
API_VERSION = "2.6.6"

# Loop counters before 2.0 were named after a deeper nesting of loops.
_LOOP_NAMES = (
    (".batch_loop.optimizer_loop.", ".automatic_optimization."),
    (".batch_loop.manual_loop.", ".manual_optimization."),
    (".val_loop.epoch_loop.", ".val_loop."),
)
_LOOP_PARTS_GONE = ("_results", "dataloader_progress", "batch_loop.state_dict")
_CHAPTER_NAMES = {"NativeMixedPrecisionPlugin": "MixedPrecision", "MixedPrecisionPlugin": "MixedPrecision"}


def migrate_checkpoint(checkpoint: dict[str, Any], path: Any = "") -> dict[str, Any]:
    """The same dict in today's layout; the version it was written by is kept under another key."""
    if VERSION_KEY not in checkpoint:
        raise KeyError(
            f"The file {path} has no key `{VERSION_KEY}`, only {sorted(map(str, checkpoint))[:10]}: no trainer wrote it."
            " For plain weights, use `model.load_state_dict(torch.load(path))`."
        )
    found = checkpoint[VERSION_KEY]
    version, ours = _release(found), _release(API_VERSION)
    if version > ours:
        rank_zero_warn(
            f"The checkpoint is of version {found}, newer than {API_VERSION}: something in it may be ignored.",
            category=PossibleUserWarning,
        )
    elif version < ours:
        checkpoint[LEGACY_VERSION_KEY], checkpoint[VERSION_KEY] = found, API_VERSION
        if version < (2, 1):
            _upgrade(checkpoint, version)
            rank_zero_info(f"The checkpoint of version {found} was brought up to date in memory.")
    return checkpoint


def _release(version: Any) -> tuple[int, ...]:
    """The leading numbers; what has none counts as our own version."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", str(version))[:3])
    return numbers or _release(API_VERSION)


def _upgrade(checkpoint: dict[str, Any], version: tuple[int, ...]) -> None:
    for old, new in _CHAPTER_NAMES.items():
        if old in checkpoint:
            checkpoint[new] = checkpoint.pop(old)
    if callbacks := checkpoint.get("callbacks"):
        # Once a part of `ModelCheckpoint.state_key`; it would keep the callback from finding its state.
        checkpoint["callbacks"] = {
            re.sub(r", 'save_on_train_epoch_end': \w+", "", key) if isinstance(key, str) else key: state
            for key, state in callbacks.items()
        }
    if version < (1, 6):
        # These counted at the top level only, and saved at the end of epochs.
        checkpoint["loops"] = to_loops(
            {"epochs": checkpoint.get("epoch", 0), "steps": checkpoint.get("global_step", 0)}
        )
    for verb, loop in checkpoint.get("loops", {}).items():
        renamed = {}
        for key, value in loop.items():
            for old, new in _LOOP_NAMES:
                key = key.replace(old, new)
            if not key.endswith(_LOOP_PARTS_GONE):
                renamed[key if verb == "fit_loop" else key.removeprefix("epoch_loop.")] = value
        checkpoint["loops"][verb] = renamed
