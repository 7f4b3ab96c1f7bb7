"""Our progress <-> the loop counters that `.ckpt` files hold, so that either framework resumes the other's files.

A file counts four moments of each epoch and batch: ready, started, processed, completed. Where these differ tells where
in the story the file was written; for epoch number e and b batches finished in it:

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

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_MOMENTS = ("ready", "started", "processed", "completed")
# How far each moment is ahead of the number of finished epochs, or of finished batches.
_EPOCHS_AHEAD = {"EPOCH_START": (0, 0, 0, 0), "EPOCH_END": (1, 1, 1, 0)}
_BATCHES_AHEAD = {"IN_BATCH": (1, 1, 0, 0), "BATCH_DONE": (0, 0, 0, -1)}
_LEVEL, _INSIDE = (0, 0, 0, 0), (1, 1, 0, 0)
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
    automatic, stepped = progress.get("automatic", True), progress.get("stepped", True)
    auto_steps, manual_steps = (steps, 0) if automatic else (0, steps)
    # Gradients are cleared when a window opens, so inside one they were cleared once more than stepped on.
    cleared = auto_steps + (automatic and not stepped)
    optimizer = {
        "step": _tracker(auto_steps, min(auto_steps, batch), moments=_SHORT),
        "zero_grad": _tracker(cleared, min(cleared, batch), moments=("ready", "completed", "started")),
    }
    validating = position == "VALIDATING"
    counted = log_step - (position in LOG_STEP_PENDING and stepped and log_step > 0)
    is_last_batch = bool(progress.get("is_last_batch", False))
    fit_loop = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": counted},
        "epoch_loop.batch_progress": _tracker(
            batches, batch, _BATCHES_AHEAD.get(position, _LEVEL), is_last_batch=is_last_batch
        ),
        "epoch_loop.scheduler_progress": _tracker(0, 0, moments=_SHORT),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": _tracker(manual_steps, manual_steps, moments=_SHORT),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": _tracker(
            *(val_batches, val_batches, _INSIDE if validating else _LEVEL),
            is_last_batch=val_batches > 0 and not validating,
        ),
        "epoch_progress": _tracker(epochs, epochs, _EPOCHS_AHEAD.get(position, _INSIDE)),
    }
    idle = {"state_dict": {}, "batch_progress": _tracker(0, 0)}
    evaluation = {"state_dict": {}, "batch_progress": _tracker(0, 0, is_last_batch=False)}
    return {"fit_loop": fit_loop, "validate_loop": evaluation, "test_loop": dict(evaluation), "predict_loop": idle}


def from_loops(loops: Mapping[str, Any]) -> dict[str, Any]:
    """Our counters, with all the keys of `to_loops`, from the "loops" chapter of a file."""
    loop = loops.get("fit_loop", {})
    epoch, batch = loop.get("epoch_progress"), loop.get("epoch_loop.batch_progress", {})
    validation = loop.get("epoch_loop.val_loop.batch_progress")
    position = _position(_moments(epoch), _moments(batch), _moments(validation), _moments(validation, "total"))
    optimizer = loop.get("epoch_loop.automatic_optimization.optim_progress", {}).get("optimizer", {})
    manual_steps = _moments(loop.get("epoch_loop.manual_optimization.optim_step_progress"), "total")["completed"]
    auto_steps = _moments(optimizer.get("step"), "total")["completed"]
    steps = max(auto_steps, manual_steps)
    # An optimizer step ends a window; until then gradients were cleared once more than stepped on.
    stepped = position == "IN_BATCH" or _moments(optimizer.get("zero_grad"), "total")["ready"] <= auto_steps
    log_step = loop.get("epoch_loop.state_dict", {}).get("_batches_that_stepped")
    if log_step is not None and position in LOG_STEP_PENDING and stepped:
        log_step += 1
    # The batch of BATCH_DONE is finished for us: its step was made.
    finished = "processed" if position == "BATCH_DONE" else "completed"
    between_epochs = position == "EPOCH_START"
    return {
        "epochs": _moments(epoch)["completed"],
        "batch": 0 if between_epochs else _moments(batch)[finished],
        "batches": _moments(batch, "total")[finished],
        "steps": steps,
        "log_step": steps if log_step is None else log_step,
        "position": position,
        "is_last_batch": not between_epochs and bool(batch.get("is_last_batch", False)),
        "automatic": manual_steps == 0,
        "val_batches": _moments(validation, "total")["completed"],
        "stepped": stepped,
    }


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


def _position(epoch: dict, batch: dict, validation: dict, validated: dict) -> str:
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


def _tracker(
    total: int, current: int, ahead: tuple[int, ...] = _LEVEL, moments: tuple[str, ...] = _MOMENTS, **more: bool
) -> dict[str, Any]:
    offset = dict(zip(_MOMENTS, ahead))
    counts = {"total": total, "current": current}
    return {**{of: {at: count + offset[at] for at in moments} for of, count in counts.items()}, **more}


def _moments(tracker: Mapping[str, Any] | None, which: str = "current") -> dict[str, int]:
    """All four moments of a tracker; zero where an old or foreign file lacks them."""
    found = (tracker or {}).get(which, {})
    return {moment: int(found.get(moment, 0)) for moment in _MOMENTS}
