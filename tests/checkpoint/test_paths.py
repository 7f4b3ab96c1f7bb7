"""What "best", "last", "hpc" and no `ckpt_path` at all mean."""

from __future__ import annotations

import os
import signal
import warnings

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from fulmen.checkpoint import paths
from fulmen.plugins import CheckpointIO, TorchCheckpointIO
from fulmen.storage.checkpoint_io import DamagedCheckpointError
from fulmen.storage.filesystem import atomic_write


def find(ckpt_path, callbacks=(), verb="fit", root_dir=".", model_given=True, **kwargs):
    return paths.resolve_path(
        ckpt_path, verb=verb, callbacks=callbacks, root_dir=root_dir, model_given=model_given, **kwargs
    )


def write(folder, *names):
    """Files of increasing age, the last one being the newest."""
    folder.mkdir(exist_ok=True)
    for age, name in enumerate(names):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1000 + age, 1000 + age))


def best(path):
    callback = ModelCheckpoint()
    callback.best_model_path = path
    return callback


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_path_is_what_it_is(tmp_path):
    assert find("some/file.ckpt") == "some/file.ckpt"
    assert find(tmp_path / "file.ckpt") == tmp_path / "file.ckpt"
    with pytest.raises(ValueError, match="empty path"):
        find("")


def test_best_is_that_of_the_first_checkpoint_callback():
    assert find("best", [best("a.ckpt")], "test") == "a.ckpt"
    with pytest.warns(UserWarning, match="first one"):
        assert find("best", [best("a.ckpt"), best("b.ckpt")], "test") == "a.ckpt"


def test_best_without_candidates_says_why(tmp_path):
    with pytest.raises(ValueError, match="no `ModelCheckpoint`"):
        find("best", [OnExceptionCheckpoint(tmp_path)], "test")
    with pytest.raises(ValueError, match="not saved anything"):
        find("best", [best("")], "fit")
    with pytest.raises(ValueError, match="fast_dev_run"):
        find("best", [best("a.ckpt")], "test", fast_dev_run=True)


def test_without_a_model_the_best_one_is_used_with_a_warning():
    with pytest.warns(UserWarning, match="without a model"):
        assert find(None, [best("a.ckpt")], "validate", model_given=False) == "a.ckpt"
    assert find(None, [best("a.ckpt")], "validate") is None


def test_last_is_the_newest_file_of_that_name(tmp_path):
    write(tmp_path / "a", "last.ckpt", "last-v1.ckpt", "epoch=1.ckpt", "mylast.ckpt", "last.txt")
    write(tmp_path / "b", "last.ckpt")
    callbacks = [ModelCheckpoint(tmp_path / "b"), ModelCheckpoint(tmp_path / "a")]
    assert find("last", callbacks) == str(tmp_path / "a" / "last-v1.ckpt")


def test_last_may_have_a_name_with_values(tmp_path):
    class Renamed(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-final"

    write(tmp_path, "epoch=1-final.ckpt", "epoch=2-final.ckpt", "last.ckpt")
    assert find("last", [Renamed(tmp_path)]) == str(tmp_path / "epoch=2-final.ckpt")


def test_last_looks_where_a_callback_without_folder_is_going_to_write(tmp_path):
    write(tmp_path, "last.ckpt")
    assert find("last", [ModelCheckpoint()], folder_of=lambda _: str(tmp_path)) == str(tmp_path / "last.ckpt")


def test_last_without_a_file_loads_nothing_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="save_last=True"):
        assert find("last", [ModelCheckpoint(tmp_path / "missing"), ModelCheckpoint()]) is None


def test_fit_resumes_what_an_exception_has_broken(tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    assert find(None, [callback]) is None
    write(tmp_path, "on_exception.ckpt")
    assert find(None, [callback]) == find("last", [callback]) == str(tmp_path / "on_exception.ckpt")
    assert find(None, [callback], "test") is None


def test_hpc_is_the_file_with_the_highest_number(tmp_path):
    with pytest.raises(ValueError, match="hpc_ckpt_N"):
        find("hpc", root_dir=tmp_path)
    write(tmp_path, "hpc_ckpt_10.ckpt", "hpc_ckpt_9.ckpt", "hpc_ckpt_11.txt")
    assert find("hpc", root_dir=tmp_path) == str(tmp_path / "hpc_ckpt_10.ckpt")


@pytest.mark.parametrize("name", ["registry", "registry:model:version:2"])
def test_the_model_registry_is_not_reached(name):
    with pytest.raises(ValueError, match="hosted service"):
        find(name)
    assert find("registry_of_mine/file.ckpt") == "registry_of_mine/file.ckpt"


# ---------------------------------------------------------------------- damaged files


def save(folder, *names):
    """Checkpoints of increasing age, the last one being the newest; each holds its name."""
    for age, name in enumerate(names):
        TorchCheckpointIO().save_checkpoint({"name": name}, folder / name)
        os.utime(folder / name, (1000 + age, 1000 + age))


def damage(path):
    times = (path.stat().st_mtime,) * 2
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, times)


def test_the_newest_good_one_is_found_and_each_damaged_one_named(tmp_path):
    save(tmp_path, "a.ckpt", "b.ckpt", "c.ckpt", "d.ckpt")
    every = [str(path) for path in tmp_path.glob("*.ckpt")]
    assert paths.find_newest_good(every) == str(tmp_path / "d.ckpt")
    damage(tmp_path / "d.ckpt")
    damage(tmp_path / "c.ckpt")
    with pytest.warns() as told:
        assert paths.find_newest_good(every) == str(tmp_path / "b.ckpt")
    assert len(told) == 2
    for warning, damaged in zip(told, ("d.ckpt", "c.ckpt"), strict=True):
        assert damaged in str(warning.message) and "b.ckpt" in str(warning.message)


def test_none_is_good_or_none_is_there(tmp_path):
    save(tmp_path, "a.ckpt", "b.ckpt")
    damage(tmp_path / "a.ckpt")
    damage(tmp_path / "b.ckpt")
    with pytest.raises(DamagedCheckpointError, match=r"(?s)b\.ckpt.*a\.ckpt"):
        paths.find_newest_good(str(path) for path in tmp_path.glob("*.ckpt"))
    assert paths.find_newest_good([]) is None


@pytest.mark.parametrize("name", ["last", "best"])
def test_last_and_best_are_replaced_with_a_warning_naming_both(tmp_path, name):
    save(tmp_path, "epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt", ".hidden.ckpt")
    callback = ModelCheckpoint(tmp_path)
    callback.best_model_path = str(tmp_path / "last.ckpt")
    look = {"verify": TorchCheckpointIO().verify_checkpoint}
    assert find(name, [callback], **look) == str(tmp_path / "last.ckpt")
    damage(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt.*cut off.*instead: .*epoch=1\.ckpt"):
        assert find(name, [callback], **look) == str(tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt.*link to a file that is gone.*instead: .*epoch=1\.ckpt"):
        assert find(name, [callback], **look) == str(tmp_path / "epoch=1.ckpt")
    damage(tmp_path / "epoch=0.ckpt")
    damage(tmp_path / "epoch=1.ckpt")
    with pytest.raises(DamagedCheckpointError, match=r"(?s)epoch=1\.ckpt.*epoch=0\.ckpt"):
        find(name, [callback], **look)


def test_a_run_goes_on_from_the_newest_good_checkpoint(tmp_path):
    callback = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1)
    trainer = make_trainer(max_epochs=2, callbacks=callback, enable_checkpointing=True)
    trainer.fit(Regression(), make_loader(), make_loader())
    damage(tmp_path / "last.ckpt")
    second = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1)
    again = make_trainer(max_epochs=3, callbacks=second, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again.fit(Regression(), make_loader(), make_loader(), ckpt_path="last")
    assert any("last.ckpt" in str(w.message) and "epoch=1-step=6.ckpt" in str(w.message) for w in told)
    assert again.global_step == 9 and again.ckpt_path == str(tmp_path / "epoch=1-step=6.ckpt")


def test_files_of_a_storage_of_ones_own_are_not_judged(tmp_path):
    class Text(CheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            with open(path, "w") as file:
                file.write(str(checkpoint["epoch"]))

        def load_checkpoint(self, path, map_location=None, weights_only=None):
            raise LookupError(path)

        def remove_checkpoint(self, path):
            os.remove(path)

    callback = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(callbacks=callback, enable_checkpointing=True, plugins=Text())
    trainer.fit(Regression(), make_loader(), make_loader())
    with pytest.raises(LookupError, match=r"last\.ckpt"):
        trainer.validate(Regression(), make_loader(), ckpt_path="last")


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_looking_for_a_checkpoint_removes_what_a_killed_save_left(tmp_path):
    save(tmp_path, "last.ckpt")
    child = os.fork()
    if child == 0:
        try:
            atomic_write(tmp_path / "last.ckpt", lambda file: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 2
    assert find("last", [ModelCheckpoint(tmp_path)]) == str(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
