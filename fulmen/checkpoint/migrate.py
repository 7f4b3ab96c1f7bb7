"""Files of older 2.x versions, brought up to date in memory before anybody reads them."""

from __future__ import annotations

import re
from typing import Any

from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_warn

VERSION_KEY = "pytorch-lightning_version"
# The version whose file layout we write and whose interface we have.
API_VERSION = "2.6.6"


def migrate_checkpoint(checkpoint: dict[str, Any], path: Any = "") -> dict[str, Any]:
    """The same dict in today's layout; the version it was written by is kept under another key."""
    if not isinstance(checkpoint, dict):
        what = f"The file {path} holds a `{type(checkpoint).__name__}`, not the dict that a checkpoint is."
        raise TypeError(f"{what} Use one written by `trainer.save_checkpoint` or `ModelCheckpoint`.")
    if VERSION_KEY not in checkpoint:
        what = f"The file {path} has no key `{VERSION_KEY}`, only {sorted(map(str, checkpoint))[:10]}: no trainer wrote it."
        raise KeyError(f"{what} For plain weights, use `model.load_state_dict(torch.load(path))`.")
    found = checkpoint[VERSION_KEY]
    ours, version = _release(API_VERSION), _release(found) or _release(API_VERSION)
    if version > ours:
        what = f"The checkpoint is of version {found}, newer than {API_VERSION}: something in it may be ignored."
        rank_zero_warn(what, category=PossibleUserWarning)
    elif version < ours:
        checkpoint[f"legacy_{VERSION_KEY}"], checkpoint[VERSION_KEY] = found, API_VERSION
        if "MixedPrecisionPlugin" in checkpoint:
            checkpoint["MixedPrecision"] = checkpoint.pop("MixedPrecisionPlugin")
        if version < (2, 0):
            what = f"The checkpoint is of version {found}: only weights and arguments are surely read from it."
            rank_zero_warn(f"{what} Files from 2.0 on are read in full.", category=PossibleUserWarning)
        elif callbacks := checkpoint.get("callbacks"):
            # Once a part of `ModelCheckpoint.state_key`; it would keep the callback from finding its state.
            gone = r", 'save_on_train_epoch_end': \w+"
            checkpoint["callbacks"] = {re.sub(gone, "", key): state for key, state in callbacks.items()}
    return checkpoint


def _release(version: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:3])
