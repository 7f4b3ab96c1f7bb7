"""Kubeflow Trainer 2: a `TrainJob` shows how far its training is, when it will end, and what it logged last."""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from datetime import datetime, timezone
from math import inf
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.timer import Timer
from fulmen.metrics.values import fetch_numbers
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

# The controller sets them in each container, if its feature `TrainJobStatus` is on.
URL = "KUBEFLOW_TRAINER_SERVER_URL"
CERTIFICATE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"
VARIABLES = {
    URL: "where reports go",
    CERTIFICATE: "the file of its certificate authority",
    TOKEN: "the file of a token",
}

SECONDS_BETWEEN_REPORTS = 5.0
TIMEOUT_S = 5.0  # of one request
LAST_REPORT_S = 2.0  # how long the end of a run may wait for the last one
# A report with more than that is refused by the server.
MAX_METRICS = 256
MAX_CHARACTERS = 64


class KubeflowProgress(Callback):
    """Reports progress, the time that is left and metrics to the controller of a Kubeflow `TrainJob`.

    The Trainer adds it where the three variables ``KUBEFLOW_TRAINER_SERVER_URL``, ``_CA_CERT`` and ``_TOKEN`` are set.
    A thread of rank 0 sends what is known anyway: once at the start, then at most every five seconds, and once at the
    end. Training never waits for it, and a server that does not answer changes nothing.

    Examples:
        >>> import fulmen as pl
        >>> trainer = pl.Trainer(callbacks=[KubeflowProgress()], logger=False, accelerator="cpu")
    """

    only_shows = True

    def __init__(self) -> None:
        self._reporter: _Reporter | None = None

    @staticmethod
    def is_configured() -> bool:
        """Are all three variables set? If only some are, one warning names the others."""
        missing = [f"{name} ({meaning})" for name, meaning in VARIABLES.items() if not os.environ.get(name)]
        if missing and len(missing) < len(VARIABLES):
            there = ", ".join(name for name in VARIABLES if os.environ.get(name))
            what = f"Kubeflow hears nothing of this run: {there} is set, but not {' and '.join(missing)}."
            rank_zero_warn(f"{what} Set all three, as the controller does, or none.")
        return not missing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.is_configured():
            self._reporter = _Reporter(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._reporter is not None:
            # sync: once per validation or epoch, where callbacks look at metrics anyway
            self._reporter.numbers = fetch_numbers(trainer.callback_metrics)

    on_train_epoch_end = on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_reporter(finished=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close_reporter(finished=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close_reporter(finished=False)

    def _close_reporter(self, finished: bool) -> None:
        reporter = self._reporter
        self._reporter = None
        if reporter is not None:
            reporter.close(finished)


class _Reporter:
    """The thread of one run. It reads plain attributes of the loop, and touches no device."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.numbers: Mapping[str, float] = {}  # what was logged when an epoch or a validation ended
        self._finished = False
        self._failed = False  # was the newest report refused, or not answered?
        self._complained = False
        self._sending_since: float | None = None
        self._started = time.monotonic()
        self._fraction_at_start = self._fraction_done() or 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send_reports, name="fulmen Kubeflow reports", daemon=True)
        self._thread.start()

    def close(self, finished: bool) -> None:
        """Lets the last report go out; nobody waits for a server that did not answer before."""
        self._finished = finished
        self._over.set()
        if not self._failed:
            now = time.monotonic()
            since = self._sending_since
            self._thread.join(max(0.0, (now if since is None else since) + LAST_REPORT_S - now))

    def _send_reports(self) -> None:
        self._send_report()
        while not self._over.wait(SECONDS_BETWEEN_REPORTS):
            self._send_report()
        if not self._failed:
            self._send_report()

    def _send_report(self) -> None:
        self._sending_since = time.monotonic()
        try:
            post_status(self._describe_status())
            self._failed = False
        except Exception as error:  # whatever is wrong with a server, training goes on
            self._failed = True
            if not self._complained:
                self._complained = True
                what = f"Kubeflow did not take a report of progress: {type(error).__name__}: {error}."
                rank_zero_info(f"{what} Training goes on, and later reports are sent as usual.")
        self._sending_since = None

    # ------------------------------------------------------------------ what is known

    def _describe_status(self) -> dict[str, Any]:
        status: dict[str, Any] = {"lastUpdatedTime": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        fraction = 1.0 if self._finished else self._fraction_done()
        if fraction is not None:
            status["progressPercentage"] = 100 if self._finished else min(int(100 * fraction), 99)
            progressed = fraction - self._fraction_at_start
            if progressed > 0:
                left = (1 - fraction) * (time.monotonic() - self._started) / progressed
                status["estimatedRemainingSeconds"] = min(int(left), 2**31 - 1)
        status["metrics"] = describe_metrics(self._newest_numbers())
        return status

    def _fraction_done(self) -> float | None:
        """The part of the run that is done, by the limit that ends it first; None if there is none."""
        loop = self.trainer.fit_loop
        progress = loop.progress
        parts = []
        if loop.max_steps > 0:
            parts.append(progress.steps / loop.max_steps)
        if loop.max_epochs is not None and loop.max_epochs > 0:
            in_epoch = progress.batch / loop.num_batches if 0 < loop.num_batches < inf else 0.0
            parts.append((progress.epochs + min(in_epoch, 1.0)) / loop.max_epochs)
        for timer in self.trainer.callbacks:
            if isinstance(timer, Timer) and (left_s := timer.time_remaining()) is not None:
                elapsed_s = timer.time_elapsed()
                parts.append(elapsed_s / max(elapsed_s + left_s, 1e-9))
        return min(max(parts), 1.0) if parts else None

    def _newest_numbers(self) -> dict[str, float]:
        """Metrics that are on the host: of the last epoch, sent to loggers or bars, and of the last step on a CPU."""
        book = self.trainer.book
        progress = self.trainer.fit_loop.progress
        found = {"epoch": progress.epochs, "global_step": progress.steps, **self.numbers}
        found |= book.sent_to_loggers | dict(book.metric_dicts.progress_bar)
        scope = book.scopes.get("train")
        for entry in list(scope.entries.values()) if scope is not None else ():
            value = entry.newest
            if entry.on_step and value is not None and not (isinstance(value, Tensor) and value.device.type != "cpu"):
                found[entry.step_name] = value.item() if isinstance(value, Tensor) else value
        return found


def describe_metrics(numbers: Mapping[str, float]) -> list[dict[str, str]]:
    """Metrics as a report has them: short texts, and not more than the server takes.

    Arguments:
        numbers: by name.

    Examples:
        >>> describe_metrics({"loss": 0.25, "global_step": 3})
        [{'name': 'loss', 'value': '0.25'}, {'name': 'global_step', 'value': '3'}]
    """
    texts = {name[:MAX_CHARACTERS]: f"{value:.10g}" for name, value in numbers.items() if name}
    return [{"name": name, "value": text} for name, text in list(texts.items())[:MAX_METRICS]]


def post_status(status: Mapping[str, Any]) -> None:
    """Sends one report. Token and certificate are read each time: they change while a job runs.

    Arguments:
        status: the fields of the `trainerStatus` of a `TrainJob`.

    Raises:
        OSError: a file cannot be read, the server does not answer, is another one, or refuses the report.
    """
    with open(os.environ[TOKEN], encoding="utf-8") as file:
        token = file.read().strip()
    content = json.dumps({"trainerStatus": status}).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ[URL], content, headers, method="POST")
    trusted = ssl.create_default_context(cafile=os.environ[CERTIFICATE])
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=trusted) as answer:
        answer.read()
