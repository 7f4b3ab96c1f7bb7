"""Pure functions: is validation, logging or stopping due now? No trainer is needed to read or test them."""

from __future__ import annotations

from math import inf


def validation_epoch_due(epoch: int, every_n_epochs: int | None) -> bool:
    """Whether epoch number `epoch` (from 0) is one that validates; `None` means batches are counted across epochs."""
    return every_n_epochs is None or (epoch + 1) % every_n_epochs == 0


def validation_interval(interval: int | float, num_batches: float) -> float:
    """`val_check_interval` in batches: ints as they are, fractions of the epoch rounded down, but at least one.

    0 is accepted where nothing is trained or validated, and means never.
    """
    if isinstance(interval, int):
        return interval or inf
    return inf if num_batches == inf else max(1, int(num_batches * interval))


def steps_in(num_batches: float, accumulate: int) -> float:
    """Optimizer steps in an epoch: full accumulation windows and a shorter last one."""
    return inf if num_batches == inf else -(-int(num_batches) // accumulate)


def early_stop_allowed(epochs: int, steps: int, min_epochs: int | None, min_steps: int | None) -> bool:
    """Whether `should_stop` may end training already."""
    return (not min_epochs or epochs >= min_epochs) and (not min_steps or steps >= min_steps)
