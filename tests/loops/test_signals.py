"""Runs that do not end well: exceptions, Ctrl-C and SIGTERM. What was logged and saved is kept, everybody is told."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.loggers import CSVLogger
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step", "ignore:Error detected in SqrtBackward0")
ROOT = Path(__file__).resolve().parents[2]

# A run that sends itself a signal in the middle of a batch, as a person or a scheduler would from outside.
SCRIPT = """
import os, signal, sys
import torch
import fulmen as pl
from fulmen.loggers import CSVLogger
from support import Regression, make_loader, make_trainer

number, place = getattr(signal, sys.argv[1]), sys.argv[2]

def hit(here, batch_idx):
    if here == place and batch_idx == 1:
        os.kill(os.getpid(), number)

class Model(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        hit("train", batch_idx)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        hit("validate", batch_idx)

    def predict_step(self, batch, batch_idx):
        hit("predict", batch_idx)

class Says(pl.Callback):
    def on_exception(self, trainer, pl_module, exception):
        print("exception", type(exception).__name__, trainer.state.status.value, trainer.received_sigterm, flush=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print("trained", batch_idx, flush=True)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        print("validated", batch_idx, flush=True)

    def on_fit_end(self, trainer, pl_module):
        print("fit end", flush=True)

    def teardown(self, trainer, pl_module, stage):
        print("teardown", flush=True)

trainer = make_trainer(
    logger=CSVLogger("logs", flush_logs_every_n_steps=1000), log_every_n_steps=1, callbacks=[Says()], max_epochs=2
)
if place == "predict":
    trainer.predict(Model(), make_loader(16))
else:
    trainer.fit(Model(), make_loader(16), make_loader(16))
"""


def run(signal_name: str, place: str, folder: Path) -> tuple[int, list[str], list[dict[str, str]]]:
    """(exit status, what was printed, rows of the CSV file)"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, signal_name, place],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=1200,
    )  # fmt: skip
    files = list(folder.rglob("metrics.csv"))
    return done.returncode, done.stdout.splitlines(), list(csv.DictReader(files[0].open())) if files else []


ENDS = [
    pytest.param(
        "SIGINT", "train", 130, ["trained 0", "trained 1", "exception KeyboardInterrupt interrupted False"], 2,
        id="Ctrl-C",
    ),
    pytest.param(
        "SIGTERM", "train", 143, ["trained 0", "trained 1", "exception SIGTERMException interrupted True"], 2,
        id="SIGTERM finishes the batch",
    ),
    pytest.param(
        "SIGTERM", "validate", 143,
        [*(f"trained {i}" for i in range(4)), "validated 0", "validated 1", "exception SIGTERMException interrupted True"],
        4, id="SIGTERM in validation",
    ),
    pytest.param("SIGTERM", "predict", 143, ["exception SIGTERMException interrupted True"], 0, id="SIGTERM in predict"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "status", "printed", "rows"), ENDS)
def test_a_signal_ends_the_run_and_keeps_what_was_logged(tmp_path, name, place, status, printed, rows):
    found = run(name, place, tmp_path)
    assert found[0] == status
    assert found[1] == printed
    assert len(found[2]) == rows


def test_ctrl_c_saves_a_checkpoint_if_that_was_asked_for(tmp_path):
    from fulmen.callbacks import OnExceptionCheckpoint

    class Interrupted(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    model = Interrupted()
    trainer = make_trainer(callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    with pytest.raises(SystemExit) as ended:
        trainer.fit(model, make_loader())
    assert ended.value.code == 130
    assert trainer.interrupted and trainer.state.status == "interrupted"
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight)


def test_a_second_ctrl_c_does_not_disturb_the_end():
    handlers = []

    class Looks(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            handlers.append(signal.getsignal(signal.SIGINT))

    class Interrupted(Regression):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        make_trainer(callbacks=[Looks()]).fit(Interrupted(), make_loader())
    assert handlers == [signal.SIG_IGN]


def test_handlers_of_the_user_are_called_and_put_back(tmp_path):
    """A scheduler's own handler on SIGTERM keeps working during a run."""
    calls = []

    def mine(number, frame):
        calls.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:

        class Model(Regression):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().training_step(batch, batch_idx)

        trainer = make_trainer()
        with pytest.raises(SystemExit):
            trainer.fit(Model(), make_loader())
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        make_trainer().fit(Regression(), make_loader())
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_in_another_thread_leaves_signals_alone():
    ends = []
    thread = threading.Thread(target=lambda: ends.append(make_trainer().fit(Regression(), make_loader())))
    thread.start()
    thread.join(60)
    assert ends == [None]


class Fails(Regression):
    """Raises in one hook, the third time it runs if it runs often."""

    def __init__(self, hook: str, at: int = 1) -> None:
        super().__init__()
        inner = getattr(self, hook)
        left = [at]

        def fail(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise ValueError(f"in {hook}")
            return inner(*args, **kwargs)

        setattr(self, hook, fail)


class Told(pl.Callback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_exception(self, trainer, pl_module, exception):
        self.events.append(f"exception {exception}")

    def on_fit_end(self, trainer, pl_module):
        self.events.append("fit end")

    def teardown(self, trainer, pl_module, stage):
        self.events.append("teardown")


@pytest.mark.parametrize(
    "hook",
    [
        "setup", "configure_optimizers", "on_fit_start", "on_train_start", "training_step", "on_before_backward",
        "on_train_batch_end", "validation_step", "on_validation_epoch_end", "on_train_epoch_end", "on_train_end",
    ],
)  # fmt: skip
def test_an_exception_is_told_to_callbacks_and_raised_again_without_teardown(hook):
    told = Told()
    trainer = make_trainer(callbacks=[told])
    with pytest.raises(ValueError, match=f"in {hook}"):
        trainer.fit(Fails(hook), make_loader(), make_loader())
    assert told.events == [f"exception in {hook}"]
    assert trainer.interrupted and trainer.state.stage is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("verb", "hook"), [("validate", "validation_step"), ("test", "test_step"), ("predict", "predict_step")]
)
def test_the_other_verbs_tell_it_as_well(verb, hook):
    told = Told()
    with pytest.raises(ValueError, match=hook):
        getattr(make_trainer(callbacks=[told]), verb)(Fails(hook), make_loader())
    assert told.events == [f"exception in {hook}"]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_trainer_can_be_used_again_after_an_exception():
    trainer = make_trainer()
    with pytest.raises(ValueError):
        trainer.fit(Fails("validation_step", at=2), make_loader(), make_loader())
    trainer.fit(Regression(), make_loader(), make_loader())
    assert trainer.state.status == "finished"
    assert trainer.global_step == 3 + 3
    assert "val_loss" in trainer.callback_metrics


def test_an_exception_closes_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1000)
    trainer = make_trainer(logger=logger, log_every_n_steps=1)
    with pytest.raises(ValueError):
        trainer.fit(Fails("training_step", at=3), make_loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1"]


def test_a_datamodule_is_told():
    errors = []

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

        def on_exception(self, exception):
            errors.append(exception)

    with pytest.raises(ValueError) as raised:
        make_trainer().fit(Fails("training_step"), datamodule=Data())
    assert errors == [raised.value]


def test_what_cannot_run_is_told_to_callbacks_too():
    """Misconfigurations that are found after the run began are exceptions like others."""
    told = Told()

    class Two(Regression):
        def configure_optimizers(self):
            return "nothing"

    with pytest.raises(MisconfigurationException):
        make_trainer(callbacks=[told]).fit(Two(), make_loader())
    assert len(told.events) == 1


def test_an_anomaly_is_found_where_it_is_made():
    class Model(Regression):
        def loss(self, batch):
            return torch.sqrt(super().loss(batch) * 0 - 1)

    with pytest.raises(RuntimeError, match="nan"):
        make_trainer(detect_anomaly=True).fit(Model(), make_loader())
    assert not torch.is_anomaly_enabled()
    make_trainer().fit(Model(), make_loader())


def test_the_traceback_of_a_training_step_fits_on_the_screen(tmp_path):
    script = """
    import fulmen as pl
    from support import Regression, make_loader, make_trainer

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            raise ValueError("here")

    make_trainer().fit(Model(), make_loader())
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=1200, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    frames = [line for line in done.stderr.splitlines() if line.lstrip().startswith("File ")]
    assert len(frames) <= 9, done.stderr
    assert done.stderr.rstrip().endswith("ValueError: here")
