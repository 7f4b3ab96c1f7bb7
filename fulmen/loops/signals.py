"""Signals during a run: the first one is noted, and the run saves and exits at the next boundary of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from fulmen.checkpoint import paths
from fulmen.engine.cluster import ClusterEnvironment, SLURMEnvironment
from fulmen.utilities.console import is_interactive
from fulmen.utilities.errors import INTERRUPTED, SIGTERMException
from fulmen.utilities.rank_zero import current_rank, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import FrameType

    from fulmen.loops.evaluate import EvaluationLoop
    from fulmen.loops.fit import FitLoop
    from fulmen.trainer import Trainer

TERMINATED = 128 + signal.SIGTERM  # the exit status of whoever was told to end, by convention
AFTER_VALIDATION = 1 << 60  # sorts behind all validation batches


class Signals:
    """Installs our handlers for the time of a run, and puts the user's back."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._clear_run()

    def _clear_run(self) -> None:
        """As before a run."""
        self.received_sigterm = False
        self.pending: int | None = None  # the signal because of which the run ends at the next boundary
        self.saving = False  # is the file being written with which the run ends?
        self.saved = ""  # that file
        self.cluster: SLURMEnvironment | None = None  # who gives the job another turn
        self._interrupted = False  # was Ctrl-C pressed in this process?
        self._looping = False  # does a loop run that looks at `pending`?
        self._postponed = False  # do trials run, whose steps are none of the run?
        self._process = os.getpid()

    def install_handlers(self, cluster: ClusterEnvironment | None = None) -> None:
        """Before the loop begins SIGTERM ends the run at once: there is nothing to finish. Main thread only.

        Arguments:
            cluster: an environment that can requeue the job; its signal is heard as well.
        """
        self._clear_run()
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue and cluster.requeue_signal is not None:
            self.cluster = cluster
        for number in (signal.SIGTERM, self.cluster.requeue_signal if self.cluster else None):
            self._set_handler(number, self._on_signal)

    def enable_deferred(self) -> None:
        """A loop begins: from now on the run ends at a boundary. So it does after Ctrl-C, unless the user handles that."""
        self._looping = True
        if self.pending is not None:  # another process was told, or an `except:` of somebody's caught the exception
            raise self.make_exception()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._set_handler(signal.SIGINT, self._on_interrupt)

    def restore_handlers(self) -> None:
        """The handlers as they were before the run."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def ignore_interrupts(self) -> None:
        """A second Ctrl-C would tear what is being closed now."""
        self._set_handler(signal.SIGINT, signal.SIG_IGN)

    @property
    def is_requeueing(self) -> bool:
        """Does the run end because the job gets another turn?"""
        return self.cluster is not None and self.pending == self.cluster.requeue_signal

    def requeue_job(self) -> None:
        """The last thing a run does: its job may be killed for it."""
        if self.cluster is not None and self.is_requeueing:
            self.cluster.requeue()

    def request_stop(self, number: int) -> bool:
        """The run ends at the next boundary because of this signal; False if it does because of another."""
        if self.pending is not None:
            return False
        self.pending = number
        return True

    def make_exception(self) -> BaseException:
        """What ends the run."""
        return KeyboardInterrupt() if self.pending == signal.SIGINT else SIGTERMException(TERMINATED)

    @contextlib.contextmanager
    def postpone_exit(self) -> Generator[None]:
        """Inside, steps are no boundary at which the run ends and saves."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def cause_of(self, error: BaseException) -> BaseException:
        """The interrupt, if that is why a loader's worker ended before the step did: a terminal tells it to all."""
        worker = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        return self.make_exception() if worker and self.pending == signal.SIGINT else error

    def exit_if_pending(self) -> None:
        """Everything is closed: a signal that came too late to stop anything still ends the script."""
        if self.pending == signal.SIGINT and not is_interactive():
            sys.exit(INTERRUPTED)
        if self.pending is not None:
            raise self.make_exception()

    def handles(self, number: int) -> bool:
        """Does the run end by itself when this signal comes?"""
        handler = signal.getsignal(number)
        return handler in (self._on_signal, self._on_interrupt, signal.default_int_handler)

    # ------------------------------------------------------------------ ending at a boundary

    def exit_after_step(self, loop: FitLoop) -> None:
        """A signal is pending: ends the run if an accumulation window is complete, and all processes end here."""
        if self._postponed:
            return
        if not _window_is_open(loop) and loop.trainer.strategy.agree_to_stop((loop.progress.batches, AFTER_VALIDATION)):
            self._save_and_exit(loop.trainer)

    def exit_after_evaluation_batch(self, loop: EvaluationLoop, batch_idx: int, dataloader_idx: int) -> None:
        """A signal is pending: ends the run here; inside fit if all processes do, which takes a batch that all have."""
        if not loop.inside_fit:
            raise self.make_exception()
        if self._postponed:
            return
        fit_loop = loop.trainer.fit_loop
        boundary = (fit_loop.progress.batches, (dataloader_idx << 40) + batch_idx)
        everywhere = loop.join.have_all(batch_idx, dataloader_idx)
        if everywhere and not _window_is_open(fit_loop) and loop.trainer.strategy.agree_to_stop(boundary):
            self._save_and_exit(loop.trainer)

    def _save_and_exit(self, trainer: Trainer) -> NoReturn:
        """Saves, if something was trained and the run writes checkpoints, and raises what ends the run."""
        self.pending = trainer.strategy.broadcast(self.pending)  # all end because of what the first rank was told
        self.received_sigterm = self.received_sigterm or self.pending == signal.SIGTERM
        training = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run
        folder = trainer.default_root_dir if self.is_requeueing else None
        path = trainer.strategy.broadcast(paths.preemption_path(trainer.callbacks, folder)) if training else None
        if path is not None:
            self.saving = True
            try:
                trainer.save_checkpoint(path)
                trainer.strategy.finish_saving()
                self.saved = path
                rank_zero_info(f"Saved a checkpoint to {path}: `Trainer.fit(ckpt_path='auto')` continues from there.")
            except Exception as error:
                what = f"The run was told to end, and its last checkpoint {path!r} could not be written:"
                rank_zero_warn(f"{what} {type(error).__name__}: {error} Resume from the one before.")
            finally:
                self.saving = False
        raise self.make_exception()

    # ------------------------------------------------------------------ handlers

    def _set_handler(self, number: int | None, handler: Callable[..., Any] | int) -> None:
        if number is not None and threading.current_thread() is threading.main_thread():
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if os.getpid() != self._process:  # a child that inherited the handler: not its run
            signal.signal(number, before if before is not None else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received_sigterm = self.received_sigterm or number == signal.SIGTERM
        if self.request_stop(number):
            self._write_line(f"Received {signal.Signals(number).name}: the run ends after the current step.")
        if callable(before):
            before(number, frame)
        if not self._looping:
            raise self.make_exception()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker in the terminal's group: the step needs its batches
            return
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self.request_stop(number)
        self._write_line("Ctrl-C: the run ends after the current step. Press it again to stop at once.")

    def _write_line(self, text: str) -> None:
        if current_rank() == 0:
            with contextlib.suppress(OSError):  # there may be no stderr
                os.write(2, f"{text}\n".encode())  # a logger may be in the middle of a line, and is not entered twice


def _window_is_open(loop: FitLoop) -> bool:
    """Do gradients wait for more batches before there is a step?"""
    return bool(loop.progress.batch % loop.trainer.accumulate_grad_batches) and not loop.progress.is_last_batch
