"""Counters of loops under the names of the API, for loops of others: ready, started, processed and completed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class _BaseProgress:
    """What all counters share: a state of plain types."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        for name, value in state_dict.items():
            part = getattr(self, name)
            if isinstance(part, _BaseProgress):
                part.load_state_dict(value)
            else:
                setattr(self, name, value)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Self:
        """Counters made from a state."""
        made = cls()
        made.load_state_dict(state_dict)
        return made

    def reset(self) -> None:
        """All counters are zero."""
        self.load_state_dict(type(self)().state_dict())


@dataclass
class _ReadyCompletedTracker(_BaseProgress):
    ready: int = 0
    completed: int = 0

    def reset_on_restart(self) -> None:
        """What was begun and not completed did not happen."""
        for counter in fields(self):
            setattr(self, counter.name, self.completed)

    def increment_by(self, n: int) -> None:
        """All of them are further by n."""
        for counter in fields(self):
            setattr(self, counter.name, getattr(self, counter.name) + n)


@dataclass
class _StartedTracker(_ReadyCompletedTracker):
    started: int = 0


@dataclass
class _ProcessedTracker(_StartedTracker):
    processed: int = 0


@dataclass
class _Progress(_BaseProgress):
    """Counters of the whole run and of the part of it that runs, such as the epoch."""

    total: _ReadyCompletedTracker = field(default_factory=_ProcessedTracker)
    current: _ReadyCompletedTracker = field(default_factory=_ProcessedTracker)

    @classmethod
    def from_defaults(cls, tracker_cls: type[_ReadyCompletedTracker], **counts: int) -> Self:
        """Counters of that kind, both with these values."""
        return cls(total=tracker_cls(**counts), current=tracker_cls(**counts))

    def _increment_counter(self, name: str) -> None:
        for tracker in (self.total, self.current):
            if not hasattr(tracker, name):
                raise TypeError(f"`{type(tracker).__name__}` does not count {name!r}, only {list(asdict(tracker))}.")
            setattr(tracker, name, getattr(tracker, name) + 1)

    def increment_ready(self) -> None:
        """One more begins."""
        self._increment_counter("ready")

    def increment_started(self) -> None:
        """The hooks of its start have run."""
        self._increment_counter("started")

    def increment_processed(self) -> None:
        """Its work is done."""
        self._increment_counter("processed")

    def increment_completed(self) -> None:
        """The hooks of its end have run."""
        self._increment_counter("completed")

    def increment_by(self, n: int) -> None:
        """All counters are further by n."""
        self.total.increment_by(n)
        self.current.increment_by(n)

    def reset_on_run(self) -> None:
        """Another epoch begins."""
        self.current.reset()

    def reset_on_restart(self) -> None:
        """What was begun and not completed did not happen."""
        self.current.reset_on_restart()


@dataclass
class _BatchProgress(_Progress):
    is_last_batch: bool = False

    def reset_on_run(self) -> None:
        super().reset_on_run()
        self.is_last_batch = False

    def increment_by(self, n: int, is_last_batch: bool = False) -> None:
        super().increment_by(n)
        self.is_last_batch = is_last_batch


@dataclass
class _SchedulerProgress(_Progress):
    total: _ReadyCompletedTracker = field(default_factory=_ReadyCompletedTracker)
    current: _ReadyCompletedTracker = field(default_factory=_ReadyCompletedTracker)


@dataclass
class _ZeroGradProgress(_Progress):
    total: _ReadyCompletedTracker = field(default_factory=_StartedTracker)
    current: _ReadyCompletedTracker = field(default_factory=_StartedTracker)


@dataclass
class _OptimizerProgress(_BaseProgress):
    """Steps of an optimizer, and how often its gradients were cleared."""

    step: _Progress = field(default_factory=_SchedulerProgress)
    zero_grad: _Progress = field(default_factory=_ZeroGradProgress)

    def reset_on_run(self) -> None:
        """Another epoch begins."""
        self.step.reset_on_run()
        self.zero_grad.reset_on_run()

    def reset_on_restart(self) -> None:
        """What was begun and not completed did not happen."""
        self.step.reset_on_restart()
        self.zero_grad.reset_on_restart()


@dataclass
class _OptimizationProgress(_BaseProgress):
    optimizer: _OptimizerProgress = field(default_factory=_OptimizerProgress)

    @property
    def optimizer_steps(self) -> int:
        """Steps of the whole run."""
        return self.optimizer.step.total.completed

    def reset_on_run(self) -> None:
        """Another epoch begins."""
        self.optimizer.reset_on_run()

    def reset_on_restart(self) -> None:
        """What was begun and not completed did not happen."""
        self.optimizer.reset_on_restart()
