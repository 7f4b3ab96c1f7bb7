"""Runs that are told to end: they finish the step, save, tell everybody, and say in their exit code why."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from fulmen.engine.cluster import SLURMEnvironment
from fulmen.loggers import CSVLogger
from fulmen.storage.checkpoint_io import TorchCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*validation_step",
        "ignore:.*starts again",
        "ignore:.*is not empty",
        "ignore:.*shuffles",
        "ignore:.*same callbacks",
    ),
    pytest.mark.skipif(os.name != "posix", reason="needs signals"),
]


@pytest.fixture(autouse=True)
def interruptible():
    """Whatever started the tests may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Hit(Regression):
    """Gets signals at the n-th call of a hook or step, as from outside."""

    def __init__(self, where: str, at: int = 1, number: int = signal.SIGTERM, times: int = 1) -> None:
        number = int(number)  # a hyper-parameter, plain in the file
        super().__init__()
        inner, calls = getattr(self, where), [0]

        def wrapped(*args, **kwargs):
            result = inner(*args, **kwargs)
            calls[0] += 1
            for _ in range(times if calls[0] == at else 0):
                os.kill(os.getpid(), number)
            return result

        setattr(self, where, wrapped)


class Hears(pl.Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_exception(self, trainer, pl_module, exception):
        self.heard.append(type(exception).__name__)


class Statuses(CSVLogger):
    def finalize(self, status):
        self.status = status
        super().finalize(status)


def end(model, folder, code=143, callbacks=None, **kwargs):
    """Fits until the model's signal ends it. Returns the trainer and what was told."""
    hears = Hears()
    saver = [ModelCheckpoint(folder / "saved", every_n_train_steps=1000)] if callbacks is None else callbacks
    trainer = make_trainer(callbacks=[hears, *saver], enable_checkpointing=bool(saver), **{"max_epochs": 3, **kwargs})
    with pytest.raises(SystemExit) as ended:
        trainer.fit(model, make_loader(22), make_loader(16))
    assert ended.value.code == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return trainer, hears.heard


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("number", "code", "heard"),
    [(signal.SIGTERM, 143, ["SIGTERMException"]), (signal.SIGINT, 130, ["KeyboardInterrupt"])],
)
def test_the_step_is_finished_and_saved(tmp_path, number, code, heard):
    model = Hit("training_step", 2, number)
    trainer, told = end(model, tmp_path, code)
    saved = load(tmp_path / "saved" / "preempted.ckpt")
    assert saved["global_step"] == trainer.global_step == 2 and told == heard
    assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight)
    assert trainer.state.status == "interrupted"


def test_an_accumulation_window_is_finished(tmp_path):
    trainer, _ = end(Hit("training_step", 2), tmp_path, accumulate_grad_batches=4)
    assert (trainer.global_step, trainer.fit_loop.progress.batch) == (1, 4)
    assert load(tmp_path / "saved" / "preempted.ckpt")["global_step"] == 1
    trainer, _ = end(Hit("training_step", 6), tmp_path, accumulate_grad_batches=4)
    assert (trainer.global_step, trainer.fit_loop.progress.batch) == (2, 6)  # the epoch closes the window


@pytest.mark.parametrize(
    ("where", "at", "batches"),
    [
        ("validation_step", 1, 6),
        ("on_validation_epoch_end", 1, 6),
        ("on_train_epoch_end", 1, 7),
        ("on_train_start", 1, 1),
    ],
)
def test_a_signal_elsewhere_waits_for_the_next_boundary(tmp_path, where, at, batches):
    trainer, _ = end(Hit(where, at), tmp_path)
    assert trainer.fit_loop.progress.batches == trainer.global_step == batches
    assert load(tmp_path / "saved" / "preempted.ckpt")["global_step"] == batches


def test_in_validation_only_the_batch_at_hand_is_finished(tmp_path):
    model = Hit("validation_step", 2)
    seen = []
    model.on_validation_batch_end = lambda *args, **kwargs: seen.append(1)
    end(model, tmp_path)
    assert len(seen) == 2
    saved = load(tmp_path / "saved" / "preempted.ckpt")
    assert saved["fulmen"]["progress"]["position"] == "VALIDATING"


def test_validation_goes_on_where_an_accumulation_window_is_open(tmp_path):
    trainer, _ = end(Hit("validation_step"), tmp_path, accumulate_grad_batches=4, val_check_interval=3)
    assert (trainer.global_step, trainer.fit_loop.progress.batch) == (1, 4)


@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_what_was_saved_goes_on_in_the_same_bits(tmp_path, hook):
    """Random numbers of a validation that is begun again are those it began with."""

    class Draws(Hit):
        def forward(self, x):
            return self.layer(torch.nn.functional.dropout(x, 0.3, training=True))

    def fit(model, path=None):
        torch.manual_seed(5 if path is None else 6)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1000)
        trainer = make_trainer(max_epochs=2, callbacks=[saver], enable_checkpointing=True)
        same = [(torch.ones(2, 4), torch.ones(2, 1))] * 5
        loaders = (torch.utils.data.DataLoader(same, batch_size=None, shuffle=shuffle) for shuffle in (False, True))
        trainer.fit(model, *loaders, ckpt_path=path)
        return model.layer.weight

    torch.manual_seed(0)
    whole = fit(Draws("training_step", at=1000))
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        fit(Draws(hook, at=2))
    assert torch.equal(whole, fit(Draws("training_step", at=1000), tmp_path / "preempted.ckpt"))


@pytest.mark.parametrize(("hook", "number"), [("setup", signal.SIGTERM), ("configure_optimizers", signal.SIGTERM)])
def test_before_training_there_is_nothing_to_finish(tmp_path, hook, number):
    _, heard = end(Hit(hook, number=number), tmp_path, callbacks=[OnExceptionCheckpoint(tmp_path)])
    assert heard == ["SIGTERMException"] and not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_after_the_last_step_the_run_is_whole_and_the_script_ends(tmp_path, hook):
    logger = Statuses(tmp_path)
    trainer, heard = end(Hit(hook), tmp_path, logger=logger)
    assert (
        heard == [] and logger.status == "success" and trainer.state.status == "finished" and trainer.global_step == 18
    )


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    trainer, heard = end(Hit("training_step", 2, signal.SIGINT, times=2), tmp_path, 130)
    assert heard == ["KeyboardInterrupt"] and trainer.global_step == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_worker_that_the_terminal_interrupts_too_is_no_error_of_the_run(tmp_path):
    def batches():
        yield from make_loader(8)
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")  # as torch says it

    class Loader:
        def __iter__(self):
            return batches()

    hears = Hears()
    with pytest.raises(SystemExit) as ended:
        make_trainer(callbacks=[hears]).fit(Regression(), Loader())
    assert ended.value.code == 130 and hears.heard == ["KeyboardInterrupt"]


def test_who_types_gets_the_interrupt_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    trainer = make_trainer(max_epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Hit("training_step", 2, signal.SIGINT), make_loader())
    assert trainer.global_step == 2
    trainer.fit(Regression(), make_loader())
    assert trainer.state.status == "finished"


def test_a_run_without_checkpoints_writes_none(tmp_path):
    end(Hit("training_step", 2), tmp_path, callbacks=[], default_root_dir=tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_one_file_is_written_where_the_next_fit_looks(tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    end(Hit("training_step", 2), tmp_path, callbacks=[callback, ModelCheckpoint(tmp_path / "saved")])
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["on_exception.ckpt"]
    trainer = make_trainer(callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    trainer.fit(Regression(), make_loader(22))
    assert trainer.global_step == 6 and not list(tmp_path.rglob("*.ckpt"))


def test_a_later_file_takes_the_place_of_the_last_one(tmp_path):
    end(Hit("training_step", 2), tmp_path)
    preempted = tmp_path / "saved" / "preempted.ckpt"
    saver = ModelCheckpoint(preempted.parent, filename="{step}")
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True)
    trainer.fit(Regression(), make_loader(22), ckpt_path=preempted)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["step=6.ckpt"]


def test_a_file_that_cannot_be_written_is_said_and_the_run_ends_as_told(tmp_path):
    class Broken(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            raise OSError("No space left on device")

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1000)
    with pytest.warns(UserWarning, match="No space left"):
        end(Hit("training_step", 2), tmp_path, callbacks=[saver], plugins=[Broken()])


def test_slurm_requeues_the_job_which_goes_on(slurm):
    logger = Statuses(slurm)
    end(Hit("training_step", 2, signal.SIGUSR1), slurm, default_root_dir=slurm, logger=logger)
    assert (slurm / "told").read_text() == "requeue 77\n" and logger.status == "finished"
    assert load(slurm / "hpc_ckpt_1.ckpt")["global_step"] == 2
    assert not list(slurm.rglob("preempted.ckpt"))
    end(Hit("training_step", 2, signal.SIGUSR1), slurm, default_root_dir=slurm)
    assert load(slurm / "hpc_ckpt_2.ckpt")["global_step"] == 4  # it went on from the first one
    trainer = make_trainer(default_root_dir=slurm)
    trainer.fit(Regression(), make_loader(22))
    assert trainer.global_step == 6 and trainer.ckpt_path == str(slurm / "hpc_ckpt_2.ckpt")


def test_the_signal_of_slurm_is_the_users_choice(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    cluster = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    end(Hit("training_step", 2, signal.SIGUSR2), slurm, default_root_dir=slurm, plugins=[cluster])
    assert (slurm / "told").read_text() == "requeue 70_4\n"
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        trainer = make_trainer(default_root_dir=slurm / "other", plugins=[SLURMEnvironment(auto_requeue=False)])
        trainer.fit(Hit("training_step", 2, signal.SIGUSR1), make_loader())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [1] and trainer.state.status == "finished"


def test_slurm_without_its_tool_is_said(slurm, monkeypatch):
    monkeypatch.setenv("PATH", str(slurm))
    with pytest.warns(UserWarning, match="was not requeued"):
        end(Hit("training_step", 2, signal.SIGUSR1), slurm, default_root_dir=slurm)


def test_sigterm_saves_beside_the_other_files_also_under_slurm(slurm):
    end(Hit("training_step", 2), slurm, default_root_dir=slurm)
    assert [path.name for path in slurm.rglob("*.ckpt")] == ["preempted.ckpt"] and not (slurm / "told").exists()
