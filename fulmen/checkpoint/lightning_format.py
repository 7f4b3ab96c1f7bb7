"""Files in Lightning's layout: the loop counters that they hold, and older layouts brought up to date.

Either framework resumes the other's files: our progress becomes their counters and the other way round.

A file counts four phases of each epoch and batch: ready, started, processed, completed. Where these differ tells where
in training the file was written; for epoch number e and b batches finished in it:

| position    | epoch               | batch in the epoch | validation            |
|-------------|---------------------|--------------------|-----------------------|
| EPOCH_START | e, e, e, e          | any                | any                   |
| IN_BATCH    | e+1, e+1, e, e      | b+1, b+1, b, b     | any                   |
| BATCH_DONE  | e+1, e+1, e, e      | b, b, b, b-1       | any                   |
| VALIDATING  | e+1, e+1, e, e      | b, b, b, b         | ready above completed |
| VALIDATED   | e+1, e+1, e, e      | b, b, b, b         | all equal, not zero   |
| EPOCH_END   | e+1, e+1, e+1, e    | b, b, b, b         | any                   |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

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

_PHASES = ("ready", "started", "processed", "completed")
# How far each phase is ahead of the number of finished epochs, or of finished batches.
_EPOCHS_AHEAD = {"EPOCH_START": (0, 0, 0, 0), "EPOCH_END": (1, 1, 1, 0)}
_BATCHES_AHEAD = {"IN_BATCH": (1, 1, 0, 0), "BATCH_DONE": (0, 0, 0, -1)}
_LEVEL = (0, 0, 0, 0)
_INSIDE = (1, 1, 0, 0)
_SHORT = ("ready", "completed")
# Files count a batch that stepped only after its validation; we count it at once.
LOG_STEP_PENDING = ("BATCH_DONE", "VALIDATING", "VALIDATED")


def to_loops(progress: Mapping[str, Any]) -> dict[str, Any]:
    """The "loops" chapter of a file, from the counters of `Progress`; what is left out is zero.

    Besides those of `Progress` there are "automatic" (optimization), "val_batches" (evaluated so far) and "stepped": did
    the newest finished batch end in an optimizer step, as it does not inside an accumulation window?
    """
    position = progress.get("position", "EPOCH_START")
    epochs, batch, batches, steps, log_step, val_batches = (
        int(progress.get(name, 0)) for name in ("epochs", "batch", "batches", "steps", "log_step", "val_batches")
    )
    automatic = progress.get("automatic", True)
    stepped = progress.get("stepped", True)
    auto_steps, manual_steps = (steps, 0) if automatic else (0, steps)
    # Gradients are cleared when a window opens, so inside one they were cleared once more than stepped on.
    cleared = auto_steps + (automatic and not stepped)
    optimizer = {
        "step": _make_tracker(auto_steps, min(auto_steps, batch), phases=_SHORT),
        "zero_grad": _make_tracker(cleared, min(cleared, batch), phases=("ready", "completed", "started")),
    }
    validating = position == "VALIDATING"
    counted = log_step - (position in LOG_STEP_PENDING and stepped and log_step > 0)
    is_last_batch = bool(progress.get("is_last_batch", False))
    fit_loop = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": counted},
        "epoch_loop.batch_progress": _make_tracker(
            batches, batch, _BATCHES_AHEAD.get(position, _LEVEL), is_last_batch=is_last_batch
        ),
        "epoch_loop.scheduler_progress": _make_tracker(0, 0, phases=_SHORT),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": _make_tracker(manual_steps, manual_steps, phases=_SHORT),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": _make_tracker(
            *(val_batches, val_batches, _INSIDE if validating else _LEVEL),
            is_last_batch=val_batches > 0 and not validating,
        ),
        "epoch_progress": _make_tracker(epochs, epochs, _EPOCHS_AHEAD.get(position, _INSIDE)),
    }
    idle = {"state_dict": {}, "batch_progress": _make_tracker(0, 0)}
    evaluation = {"state_dict": {}, "batch_progress": _make_tracker(0, 0, is_last_batch=False)}
    return {"fit_loop": fit_loop, "validate_loop": evaluation, "test_loop": dict(evaluation), "predict_loop": idle}


def from_loops(loops: Mapping[str, Any]) -> dict[str, Any]:
    """Our counters, with all the keys of `to_loops`, from the "loops" chapter of a file."""
    loop = loops.get("fit_loop", {})
    epoch = loop.get("epoch_progress")
    batch = loop.get("epoch_loop.batch_progress", {})
    validation = loop.get("epoch_loop.val_loop.batch_progress")
    position = _read_position(
        _read_phases(epoch), _read_phases(batch), _read_phases(validation), _read_phases(validation, "total")
    )
    optimizer = loop.get("epoch_loop.automatic_optimization.optim_progress", {}).get("optimizer", {})
    manual_steps = _read_phases(loop.get("epoch_loop.manual_optimization.optim_step_progress"), "total")["completed"]
    auto_steps = _read_phases(optimizer.get("step"), "total")["completed"]
    steps = max(auto_steps, manual_steps)
    # An optimizer step ends a window; until then gradients were cleared once more than stepped on.
    stepped = position == "IN_BATCH" or _read_phases(optimizer.get("zero_grad"), "total")["ready"] <= auto_steps
    log_step = loop.get("epoch_loop.state_dict", {}).get("_batches_that_stepped")
    if log_step is not None and position in LOG_STEP_PENDING and stepped:
        log_step += 1
    # The batch of BATCH_DONE is finished for us: its step was made.
    finished = "processed" if position == "BATCH_DONE" else "completed"
    between_epochs = position == "EPOCH_START"
    return {
        "epochs": _read_phases(epoch)["completed"],
        "batch": 0 if between_epochs else _read_phases(batch)[finished],
        "batches": _read_phases(batch, "total")[finished],
        "steps": steps,
        "log_step": steps if log_step is None else log_step,
        "position": position,
        "is_last_batch": not between_epochs and bool(batch.get("is_last_batch", False)),
        "automatic": manual_steps == 0,
        "val_batches": _read_phases(validation, "total")["completed"],
        "stepped": stepped,
    }


def api_counters(progress: Mapping[str, Any], global_step: int, val_loop: object) -> SimpleNamespace:
    """The counters of the API's fit loop, as attributes, from those of `Progress`."""
    counters = as_attributes(to_loops(progress)["fit_loop"])
    batches = counters.epoch_loop.batch_progress
    vars(counters.epoch_loop).update(
        batch_idx=batches.current.ready - 1,
        total_batch_idx=batches.total.ready - 1,
        global_step=global_step,
        val_loop=val_loop,
    )
    return counters


def as_attributes(loop: Mapping[str, Any]) -> SimpleNamespace:
    """The counters of one loop of a file, as attributes: ``epoch_loop.batch_progress.current.ready``."""
    root = SimpleNamespace()
    for path, value in loop.items():
        *parents, name = path.split(".")
        owner = root
        for parent in parents:
            owner = vars(owner).setdefault(parent, SimpleNamespace())
        content = {name: value} if name != "state_dict" else value
        for key, part in content.items():
            setattr(owner, key, as_attributes(part) if isinstance(part, Mapping) else part)
    return root


def _read_position(
    epoch: dict[str, int], batch: dict[str, int], validation: dict[str, int], validated: dict[str, int]
) -> str:
    if epoch["started"] == epoch["completed"]:
        return "EPOCH_START"
    if epoch["processed"] > epoch["completed"]:
        return "EPOCH_END"
    if batch["ready"] > batch["processed"] or batch["ready"] == 0:
        return "IN_BATCH"
    if batch["processed"] > batch["completed"]:
        return "BATCH_DONE"
    if validation["ready"] > validation["completed"]:
        return "VALIDATING"
    # All zeros: the file was written before a validation began, or there is none; whether one is due can be computed.
    return "VALIDATED" if validation["completed"] and validated["completed"] else "BATCH_DONE"


def _make_tracker(
    total: int, current: int, ahead: tuple[int, ...] = _LEVEL, phases: tuple[str, ...] = _PHASES, **more: bool
) -> dict[str, Any]:
    offset = dict(zip(_PHASES, ahead))
    counts = {"total": total, "current": current}
    return {**{of: {at: count + offset[at] for at in phases} for of, count in counts.items()}, **more}


def _read_phases(tracker: Mapping[str, Any] | None, which: str = "current") -> dict[str, int]:
    """All four phases of a tracker; zero where an old or foreign file lacks them."""
    found = (tracker or {}).get(which, {})
    return {phase: int(found.get(phase, 0)) for phase in _PHASES}


def refuse_foreign(checkpoint: object, path: object = "") -> None:
    """Raises if this was not written by a trainer."""
    if not isinstance(checkpoint, dict):
        what = f"The file {path} holds a `{type(checkpoint).__name__}`, not the dict that a checkpoint is."
        raise TypeError(f"{what} Use one written by `trainer.save_checkpoint` or `ModelCheckpoint`.")
    if VERSION_KEY not in checkpoint:
        what = f"The file {path} has no key `{VERSION_KEY}`, only {sorted(map(str, checkpoint))[:10]}: no trainer wrote it."
        raise KeyError(f"{what} For plain weights, use `model.load_state_dict(torch.load(path))`.")


def migrate_checkpoint(checkpoint: dict[str, Any], path: object = "") -> dict[str, Any]:
    """Brings the content of a file up to date, in place.

    Args:
        checkpoint: what the file holds.
        path: of the file, for messages.

    Returns:
        The same dict; the version that wrote it is kept under ``legacy_pytorch-lightning_version``.

    Raises:
        KeyError: it does not say which version wrote it, so no trainer did.

    Examples:
        >>> old = {"pytorch-lightning_version": "2.0.0", "MixedPrecisionPlugin": {"scale": 2.0}}
        >>> sorted(migrate_checkpoint(old))
        ['MixedPrecision', 'legacy_pytorch-lightning_version', 'pytorch-lightning_version']
    """
    refuse_foreign(checkpoint, path)
    found = checkpoint[VERSION_KEY]
    ours = parse_version(API_VERSION)
    version = parse_version(found) or ours
    if version > ours:
        what = f"The checkpoint is of version {found}, newer than {API_VERSION}: something in it may be ignored."
        rank_zero_warn(what, category=PossibleUserWarning)
    elif version < ours:
        checkpoint[f"legacy_{VERSION_KEY}"] = found
        checkpoint[VERSION_KEY] = API_VERSION
        _rename_states(checkpoint)
        _migrate_counters(checkpoint, version, path)
    return checkpoint


def _rename_states(checkpoint: dict[str, Any]) -> None:
    """Puts the states of precision and callbacks under their keys of today."""
    for old in ("MixedPrecisionPlugin", "NativeMixedPrecisionPlugin"):
        if old in checkpoint:
            checkpoint["MixedPrecision"] = checkpoint.pop(old)
    if callbacks := checkpoint.get("callbacks"):
        # Once a part of `ModelCheckpoint.state_key`; it would keep the callback from finding its state.
        gone = r", 'save_on_train_epoch_end': \w+"
        checkpoint["callbacks"] = {
            re.sub(gone, "", key) if isinstance(key, str) else key: state for key, state in callbacks.items()
        }


def _migrate_counters(checkpoint: dict[str, Any], version: tuple[int, ...], path: object) -> None:
    found = checkpoint[f"legacy_{VERSION_KEY}"]
    if version < (1, 6):
        what = f"The checkpoint is of version {found}: besides weights, only the numbers of epochs and steps are"
        rank_zero_warn(f"{what} surely read from it. Files from 1.6 on are read in full.", category=PossibleUserWarning)
        counters = {"epochs": checkpoint.get("epoch", 0), "steps": checkpoint.get("global_step", 0)}
        checkpoint["loops"] = to_loops(counters)
    elif version < (2, 0):
        loops = checkpoint.get("loops") or {}
        checkpoint["loops"] = {verb: _rename_counters(loop, verb == "fit_loop") for verb, loop in loops.items()}
        fix = f"`python -m fulmen upgrade {path or 'PATH'}` does it for the file."
        rank_zero_info(f"The checkpoint of version {found} was brought up to date in memory. {fix}")


def _rename_counters(loop: dict[str, Any], fit: bool) -> dict[str, Any]:
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


def parse_version(version: object) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:3])
