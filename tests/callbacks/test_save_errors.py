"""A checkpoint that cannot be written: loud, the one before it still loads, and the policy decides about the run."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import Callback, ModelCheckpoint
from fulmen.plugins import TorchCheckpointIO
from fulmen.utilities.errors import MisconfigurationException

resource = pytest.importorskip("resource", reason="needs POSIX")
ROOM = 600_000  # bytes of a file of `Large`, roughly


class Large(Regression):
    def __init__(self):
        super().__init__()
        self.ballast = torch.nn.Parameter(torch.rand(ROOM // 4))


class Breaks(Callback):
    """Breaks something at the start of epoch 2, and mends it at the start of epoch 4."""

    def __init__(self, broken, mended=lambda: None):
        self.broken, self.mended = broken, mended

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in (2, 4):
            (self.broken if trainer.current_epoch == 2 else self.mended)()


def command(*words):
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not command("mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)):
        pytest.skip("NOT CHECKED: a full and a read-only file system, because nothing may be mounted here")
    yield folder
    command("umount", "-l", str(folder))


def full(folder):
    """Nothing but a few bytes is left."""
    filler = folder / "filler"

    def fill():
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"0" * 4096)

    return fill, filler.unlink


def read_only(folder):
    how = lambda mode: lambda: command("mount", "-o", f"remount,{mode}", str(folder)) or pytest.fail("cannot remount")  # noqa: E731
    return how("ro"), how("rw")


def too_large(folder):
    """The system refuses files above a size, in the middle of writing them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    lower = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM // 2, before[1]))  # noqa: E731
    return lower, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def forbidden(folder):
    """Entries can be neither made nor removed."""
    if os.geteuid():
        return lambda: folder.chmod(0o500), lambda: folder.chmod(0o700)
    if not command("chattr", "+i", str(folder)) or not command("chattr", "-i", str(folder)):
        pytest.skip("NOT CHECKED: lost permissions, because root ignores them and this file system has no `chattr +i`")
    return lambda: command("chattr", "+i", str(folder)), lambda: command("chattr", "-i", str(folder))


def gone(folder):
    """Where the folder was, there is a file."""

    def remove():
        shutil.move(folder, f"{folder}.moved")
        folder.touch()

    def bring_back():
        folder.unlink()
        shutil.move(f"{folder}.moved", folder)

    return remove, bring_back


BREAKS = {"full": full, "read only": read_only, "too large": too_large, "forbidden": forbidden, "gone": gone}


@pytest.fixture(params=BREAKS)
def broken(request, tmp_path):
    """The folder, how it breaks and how it is mended."""
    needs_disk = request.param in ("full", "read only")
    folder = (request.getfixturevalue("disk") if needs_disk else tmp_path) / "checkpoints"
    folder.mkdir()
    how, mend = BREAKS[request.param](folder.parent if needs_disk else folder)
    mended = []
    yield folder, how, lambda: mended.append(mend())
    if not mended:
        mend()


def run(folder, how, mend, **arguments):
    callback = ModelCheckpoint(folder, filename="{epoch}", **arguments)
    callbacks = [Breaks(how, mend), callback]
    trainer = make_trainer(max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.fit(Large(), make_loader(), make_loader())
        except OSError as error:
            trainer.error = error
    return trainer, callback, [str(w.message) for w in told if "was not written" in str(w.message)]


def named(callback):
    names = {callback.best_model_path, callback.last_model_path, callback.kth_best_model_path, *callback.best_k_models}
    return {Path(name).name for name in names if name}


def test_by_default_the_run_ends_and_the_checkpoint_before_still_loads(broken):
    folder, how, mend = broken
    trainer, callback, _ = run(folder, how, lambda: None, save_last=True)
    assert isinstance(trainer.error, OSError) and trainer.current_epoch == 2
    assert named(callback) == {"epoch=1.ckpt", "last.ckpt"}
    mend()
    assert {path.name for path in folder.iterdir()} >= named(callback)
    for path in folder.glob("*.ckpt"):
        assert torch.load(path)["epoch"] == 1
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("kept", [{}, {"save_last": True}, {"monitor": "val_loss", "save_top_k": 2}])
def test_a_run_that_may_goes_on_and_says_so(broken, kept):
    folder, how, mend = broken
    trainer, callback, told = run(folder, how, mend, on_save_error="warn", **kept)
    assert trainer.global_step == 18 and len(told) >= 2
    newest = "last.ckpt" if "save_last" in kept else "epoch=1.ckpt"
    assert told[0].startswith("Step 9: ") and "epoch=2.ckpt' was not" in told[0] and told[0].endswith(f"{newest}.")
    left = {path.name for path in folder.glob("*")}
    assert left == named(callback) and left >= {"epoch=5.ckpt"}
    for path in folder.glob("*.ckpt"):
        TorchCheckpointIO().verify_checkpoint(path)
        state = torch.load(path)["callbacks"][callback.state_key]
        assert "epoch=2.ckpt" not in str(state) and "epoch=3.ckpt" not in str(state)


def test_nothing_is_forgotten_or_removed_while_nothing_can_be_written(tmp_path):
    how, mend = too_large(tmp_path)
    seen = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(sorted(named(trainer.checkpoint_callback)))

    callback = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=2, on_save_error="warn")
    trainer = make_trainer(max_epochs=5, callbacks=[Breaks(how, mend), Looks(), callback], enable_checkpointing=True)
    trainer.fit(Large(), make_loader(), make_loader())
    two = ["epoch=0.ckpt", "epoch=1.ckpt"]
    assert seen == [[], ["epoch=0.ckpt"], two, two, two]  # as of the end of the epoch before
    assert named(callback) == {"epoch=1.ckpt", "epoch=4.ckpt"}


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    folder = tmp_path / "checkpoints"
    trainer, _, told = run(folder, lambda: shutil.rmtree(folder), lambda: None, save_last=True)
    assert not told and trainer.current_epoch == 6
    assert {path.name for path in folder.iterdir()} == {"epoch=5.ckpt", "last.ckpt"}


def test_an_error_of_the_users_own_code_is_no_failed_write(tmp_path):
    class Own(Regression):
        def on_save_checkpoint(self, checkpoint):
            raise ValueError("on purpose")

    callback = ModelCheckpoint(tmp_path, on_save_error="warn")
    with pytest.raises(ValueError, match="on purpose"):
        make_trainer(callbacks=callback, enable_checkpointing=True).fit(Own(), make_loader())
    assert callback.best_model_path == ""


def test_an_error_of_a_logger_does_not_take_back_what_was_written(tmp_path):
    class Offline(pl.loggers.CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            raise ConnectionError("no network")

    callback = ModelCheckpoint(tmp_path / "saved", filename="x", on_save_error="warn")
    trainer = make_trainer(callbacks=callback, enable_checkpointing=True, logger=Offline(tmp_path))
    with pytest.raises(ConnectionError):
        trainer.fit(Regression(), make_loader())
    assert callback.best_model_path == str(tmp_path / "saved" / "x.ckpt") and os.path.exists(callback.best_model_path)


def test_the_policy_is_checked(tmp_path):
    with pytest.raises(MisconfigurationException, match="on_save_error='ignore'.*'raise' or 'warn'"):
        ModelCheckpoint(tmp_path, on_save_error="ignore")
    assert ModelCheckpoint(tmp_path).on_save_error == "raise"


@pytest.mark.parametrize("policy", ["warn", "raise"])
def test_processes_agree_when_only_one_of_them_writes(tmp_path, policy):
    class Tells(Regression):
        def on_train_end(self):
            callback = self.trainer.checkpoint_callback
            torch.save((self.trainer.global_step, sorted(named(callback))), tmp_path / f"rank-{self.global_rank}")

    class FullOnRank0(Breaks):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.is_global_zero:
                super().on_train_epoch_start(trainer, pl_module)

    folder = tmp_path / "checkpoints"
    callback = ModelCheckpoint(folder, filename="{epoch}", save_last=True, on_save_error=policy)
    trainer = make_trainer(
        devices=2, strategy="ddp_fork", max_epochs=5, callbacks=[FullOnRank0(*gone(folder)), callback],
        enable_checkpointing=True,
    )  # fmt: skip
    if policy == "raise":
        with pytest.raises(OSError, match="checkpoints"):
            trainer.fit(copy.deepcopy(Tells()), make_loader())
        return
    trainer.fit(copy.deepcopy(Tells()), make_loader())
    both = [torch.load(tmp_path / f"rank-{rank}") for rank in range(2)]
    assert both == [(10, ["epoch=4.ckpt", "last.ckpt"])] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=4.ckpt", "last.ckpt"]


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_what_could_not_be_written_in_the_background_is_taken_back_too(tmp_path, save_last):
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            if "step=2" in path or (checkpoint["global_step"] == 2 and save_last):
                listed.append(sorted(os.listdir(tmp_path)))
                raise OSError(errno.ENOSPC, "No space left on device", path)
            super().save_checkpoint(checkpoint, path, storage_options)

    listed = []
    options = {"every_n_train_steps": 1, "save_last": save_last, "async_save": True, "on_save_error": "warn"}
    callback = ModelCheckpoint(tmp_path, **options)
    with pytest.warns(UserWarning, match=r"step=2.ckpt' was not written: OSError.*newest checkpoint: .*step=1.ckpt"):
        make_trainer(callbacks=callback, plugins=Full(), enable_checkpointing=True).fit(
            Regression(), make_loader(32, 4)
        )
    kept = ["epoch=0-step=1.ckpt"] + ["last.ckpt"] * bool(save_last)
    assert listed[0] == kept  # nothing was removed for a file that did not come
    last = ["last.ckpt"] * bool(save_last)
    assert sorted(os.listdir(tmp_path)) == ["epoch=0-step=8.ckpt", *last]
    assert callback.best_model_path == str(tmp_path / "epoch=0-step=8.ckpt")
    assert torch.load(tmp_path / (last or ["epoch=0-step=8.ckpt"])[0])["global_step"] == 8


@pytest.mark.parametrize("policy", ["warn", "raise"])
@pytest.mark.parametrize("async_save", [False, True])
def test_the_file_that_says_that_training_is_over_follows_the_policy_too(tmp_path, policy, async_save):
    """With "auto", a run whose last step is in no checkpoint writes one more file when it is over."""

    class Fills(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.strategy.finish_saving()
            lower()

    lower, restore = too_large(tmp_path)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, on_save_error=policy, async_save=async_save)
    trainer = make_trainer(max_epochs=1, callbacks=[Fills(), saver], enable_checkpointing=True)
    try:
        if policy == "raise":
            with pytest.raises(OSError, match="File too large"):
                trainer.fit(Large(), make_loader(), make_loader(), ckpt_path="auto")
        else:
            with pytest.warns(UserWarning, match="Training is over, and no file in .* says so: .*File too large"):
                trainer.fit(Large(), make_loader(), make_loader(), ckpt_path="auto")
            assert (trainer.global_step, trainer.state.status) == (3, "finished")
    finally:
        restore()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=0-step=2.ckpt"]
    assert torch.load(tmp_path / "epoch=0-step=2.ckpt", weights_only=True)["global_step"] == 2
