"""Runs whose checkpoints lie in an object store, which cannot rename, and which the same command starts again."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint
from fulmen.checkpoint.auto import read_outline
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.filesystem import atomic_write

fsspec = pytest.importorskip("fsspec")

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step", "ignore:.*is not empty")


class Killed(BaseException):
    """No handler may save anything after it."""


class DyingIO(TorchCheckpointIO):
    """Dies in the middle of what it sends for the n-th time."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.saves = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        self.saves += 1
        if self.saves == self.at:
            checkpoint = {**checkpoint, "heavy": torch.ones(100_000), "last": Dies()}
        super().save_checkpoint(checkpoint, path, storage_options)


class Dies:
    def __reduce__(self):
        raise Killed


def start(folder: str, dies_at: int | None = None) -> tuple[int, list[torch.Tensor]]:
    """The command, once: at which step it began, and the weights at its end. It may die in one of its saves."""
    began = []

    class Model(Regression):
        def on_train_start(self):
            began.append(self.global_step)

    torch.manual_seed(1)
    model = Model()
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    trainer = make_trainer(callbacks=[saver], plugins=[DyingIO(dies_at)], enable_checkpointing=True, max_epochs=4)
    if dies_at is None:
        trainer.fit(model, make_loader(20, shuffle=True), ckpt_path="auto")
    else:
        with pytest.raises(Killed):
            trainer.fit(model, make_loader(20, shuffle=True), ckpt_path="auto")
    return began[0], [weight.detach() for weight in model.parameters()]


def test_a_run_in_a_bucket_that_dies_while_it_saves_loses_nothing(tmp_path):
    url = "memory://bucket-of-test/run"
    files = fsspec.filesystem("memory")
    assert start(url, dies_at=1)[0] == 0
    assert not files.exists(url) or not files.ls(url)
    assert start(url, dies_at=3)[0] == 0  # the first file, its "last", and half of the next
    for path in files.ls(url, detail=False):
        TorchCheckpointIO().verify_checkpoint(f"memory://{path}")
    assert start(url, dies_at=4)[0] == 2  # one more file, its "last", one more file, and half of a "last"
    began, weights = start(url)
    assert began == 6
    assert all(map(torch.equal, weights, start(str(tmp_path / "straight"))[1]))
    assert start(url)[0] == 20  # it is over


@pytest.mark.filterwarnings("ignore:.*Passed over")
def test_objects_that_are_all_damaged_are_named_and_not_trained_over():
    url = "memory://bucket-of-test/damaged"
    files = fsspec.filesystem("memory")
    start(url, dies_at=5)
    for name in ("epoch=0-step=4.ckpt", "last.ckpt"):
        content = files.cat_file(f"{url}/{name}")
        files.pipe_file(f"{url}/{name}", content[: len(content) // 2])
    trainer = make_trainer(callbacks=[ModelCheckpoint(url)], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="None of the run's 2 checkpoints can be read"):
        trainer.fit(Regression(), make_loader(20), ckpt_path="auto")


def test_how_far_a_file_is_costs_a_few_kilobytes_however_large_it_is():
    url = "memory://bucket-of-test/large.ckpt"
    content = {"global_step": 3, "optimizer_states": [], "state_dict": {"weight": torch.ones(1_000_000)}}
    TorchCheckpointIO().save_checkpoint(content, url)

    def refuse(path):
        raise AssertionError(f"{path} was read as a whole")

    outline = read_outline(url, refuse)
    assert outline["global_step"] == 3 and outline["state_dict"]["weight"].shape == (1_000_000,)


def test_two_threads_store_their_objects_at_the_same_time():
    def store(name: str) -> None:
        def write(file) -> None:
            for part in range(5):
                file.write(bytes([part]) * 1000)
                time.sleep(0.002)

        atomic_write(f"memory://bucket-of-test/threads/{name}", write)

    threads = [threading.Thread(target=store, args=(f"{index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = [one["size"] for one in fsspec.filesystem("memory").ls("memory://bucket-of-test/threads")]
    assert sizes == [5000] * 8


def test_a_mounted_bucket_that_cannot_rename_holds_whole_files(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSYS, "Function not implemented", source, None, target)  # as such a file system says

    monkeypatch.setattr(os, "replace", refuse)
    io = TorchCheckpointIO()
    for value in (1, 2):
        io.save_checkpoint({"a": value}, tmp_path / "x.ckpt")
        assert io.load_checkpoint(tmp_path / "x.ckpt") == {"a": value}
    assert os.listdir(tmp_path) == ["x.ckpt"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    with pytest.raises(PermissionError):
        io.save_checkpoint({"a": 3}, tmp_path / "x.ckpt")
    assert io.load_checkpoint(tmp_path / "x.ckpt") == {"a": 2} and os.listdir(tmp_path) == ["x.ckpt"]
