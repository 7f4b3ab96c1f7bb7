"""What "best", "last", "hpc" and no `ckpt_path` at all mean."""

from __future__ import annotations

import os
import warnings

import pytest

from fulmen.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from fulmen.checkpoint import paths


def find(ckpt_path, callbacks=(), verb="fit", root_dir=".", model_given=True, **kwargs):
    return paths.find(ckpt_path, verb=verb, callbacks=callbacks, root_dir=root_dir, model_given=model_given, **kwargs)


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
