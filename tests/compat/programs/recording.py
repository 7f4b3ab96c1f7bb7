"""What the programs beside this file share: they say what came of a training as one line of JSON."""

import json
import time
from pathlib import Path

STARTED = time.monotonic()


class Recording:
    """A callback, together with the class `Callback` of whatever package: keeps each loss, and the time spent in `fit`."""

    def __init__(self):
        self.losses = []
        self.seconds = 0.0
        self.started = 0.0

    def on_fit_start(self, trainer, pl_module):
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

    def on_fit_end(self, trainer, pl_module):
        self.seconds += time.monotonic() - self.started


def print_report(package, recorder, saved, reloaded, result):
    """Prints the last line of a program.

    Args:
        package: the module that served as Lightning; where its Trainer stands says whose it was.
        recorder: the callback.
        saved: paths of the checkpoints that were written.
        reloaded: whether what was loaded from one of them computes what was saved.
        result: numbers to compare between two packages.
    """
    missing = [str(path) for path in saved if not Path(path).exists()]
    report = {
        "package": package.__name__,
        "version": package.__version__,
        "trainer": package.Trainer.__module__,
        "losses": recorder.losses,
        "fit_s": recorder.seconds,
        "saved": len(saved),
        "missing": missing,
        "reloaded": bool(reloaded),
        "result": [float(value) for value in result],
        "seconds": time.monotonic() - STARTED,
    }
    print(json.dumps(report), flush=True)
