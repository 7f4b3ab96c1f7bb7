"""SIGTERM during a run: the handler only sets a flag, the loop reads it between batches."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from fulmen.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # the exit status of whoever was told to end, by convention


class Signals:
    """Installs our handler for the time of a run, and puts the user's back."""

    def __init__(self) -> None:
        self.received_sigterm = False
        self._before: Any = None
        self._installed = False

    def install(self) -> None:
        """Only the main thread may handle signals; a handler the user set is called after ours."""
        self.received_sigterm = False
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._installed = True

    def restore(self) -> None:
        """The handlers as they were before the run."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
            self._installed = False

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if not self.received_sigterm:
            rank_zero_info("Received SIGTERM: training stops after the current batch.")
        self.received_sigterm = True
        if callable(self._before):
            self._before(number, frame)
