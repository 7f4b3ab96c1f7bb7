import argparse
import gzip
import os
import pickle
import zipfile

import pytest
import torch

from fulmen.plugins import CheckpointIO, TorchCheckpointIO
from fulmen.storage.checkpoint_io import DamagedCheckpointError


@pytest.fixture
def io():
    return TorchCheckpointIO()


@pytest.fixture
def saved(io, tmp_path):
    path = tmp_path / "good.ckpt"
    io.save_checkpoint({"weight": torch.arange(1000.0), "epoch": 3}, path)
    return path


def test_what_was_saved_is_loaded(io, saved):
    checkpoint = io.load_checkpoint(saved)
    assert checkpoint["epoch"] == 3 and torch.equal(checkpoint["weight"], torch.arange(1000.0))


def test_folders_are_made_and_nothing_else_is_left(io, tmp_path):
    io.save_checkpoint({"a": 1}, tmp_path / "new" / "deep" / "x.ckpt")
    assert os.listdir(tmp_path / "new" / "deep") == ["x.ckpt"]


def test_a_path_in_the_current_folder(io, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.save_checkpoint({"a": 1}, "x.ckpt")
    assert io.load_checkpoint("x.ckpt") == {"a": 1}


def test_a_url_of_a_file_system(io):
    pytest.importorskip("fsspec")
    io.save_checkpoint({"a": 1}, "memory://box/x.ckpt")
    assert io.load_checkpoint("memory://box/x.ckpt") == {"a": 1}
    with pytest.raises(FileNotFoundError, match=r"Did you mean `x.ckpt`"):
        io.load_checkpoint("memory://box/y.ckpt")
    io.remove_checkpoint("memory://box/x.ckpt")
    io.remove_checkpoint("memory://box/x.ckpt")


def test_there_are_no_storage_options(io, tmp_path):
    with pytest.raises(TypeError, match=r"storage_options=\{\}"):
        io.save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})
    assert not os.listdir(tmp_path)


def test_a_failed_save_keeps_the_old_file_and_names_the_culprit(io, saved):
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"checkpoint\['hyper_parameters'\]\['f'\]"):
        io.save_checkpoint({"weight": torch.ones(1), "hyper_parameters": {"lr": 1, "f": lambda x: x}}, saved)
    assert io.load_checkpoint(saved)["epoch"] == 3
    assert os.listdir(saved.parent) == ["good.ckpt"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_while_saving_leaves_the_old_file(io, saved, run_python):
    code = f"""
import os, signal, torch
from fulmen.plugins import TorchCheckpointIO
class Deadly:
    def __reduce__(self): os.kill(os.getpid(), signal.SIGKILL)
TorchCheckpointIO().save_checkpoint({{"weight": torch.ones(100_000), "last": Deadly()}}, {str(saved)!r})
"""
    assert run_python(code) < 0
    assert io.load_checkpoint(saved)["epoch"] == 3


def test_removing_files_folders_and_what_is_gone(io, saved):
    folder = saved.parent / "sharded"
    (folder / "part").mkdir(parents=True)
    for path in (saved, folder, saved):
        io.remove_checkpoint(path)
    assert not os.listdir(saved.parent)


def test_removing_a_link_keeps_what_it_points_to(io, saved):
    (saved.parent / "last.ckpt").symlink_to(saved)
    io.remove_checkpoint(saved.parent / "last.ckpt")
    assert os.listdir(saved.parent) == ["good.ckpt"]


def test_a_missing_file_says_what_is_there(io, saved):
    with pytest.raises(FileNotFoundError, match=r"Did you mean `good.ckpt`\?"):
        io.load_checkpoint(saved.parent / "god.ckpt")
    with pytest.raises(FileNotFoundError, match=r"The folder has good.ckpt"):
        io.load_checkpoint(saved.parent / "epoch=1-step=2.ckpt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        io.load_checkpoint(saved.parent / "nowhere" / "x.ckpt")


def test_a_folder_is_not_a_file(io, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        io.load_checkpoint(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_cut_off_file(io, saved, part):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DamagedCheckpointError, match=r"good.ckpt.*cut off after \d"):
        io.load_checkpoint(saved)


def test_a_flipped_bit_in_a_weight_is_noticed(io, saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"checksum of its part '.*data/0'"):
        io.load_checkpoint(saved)


def test_no_changed_byte_of_a_file_goes_unnoticed(io, tmp_path):
    path, checkpoint = tmp_path / "x.ckpt", {"weight": torch.arange(8.0), "epoch": 3}
    io.save_checkpoint(checkpoint, path)
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            loaded = io.load_checkpoint(path)
        except DamagedCheckpointError:
            continue
        # A byte that nobody reads, such as padding between the parts.
        assert loaded["epoch"] == 3 and torch.equal(loaded["weight"], checkpoint["weight"]), position


def test_a_file_saved_without_checksums_still_loads(io, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        io.save_checkpoint({"a": torch.ones(3)}, tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert io.load_checkpoint(tmp_path / "x.ckpt")["a"].sum() == 3


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html></html>", "<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
        (gzip.compress(b"abc", mtime=0), "`torch.save` does not write"),
        (b"hello world", "11 bytes begin with b'hello world', which `torch.save`"),
        (pickle.dumps({"a": 1}), "does not continue like one"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_is(io, tmp_path, content, words):
    (tmp_path / "x.ckpt").write_bytes(content)
    for weights_only in (None, False):
        with pytest.raises(RuntimeError, match=words):
            io.load_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)


def test_a_zip_archive_of_something_else(io, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("a.txt", "b")
    with pytest.raises(DamagedCheckpointError, match="did not write"):
        io.load_checkpoint(tmp_path / "x.ckpt")


def test_the_older_format_of_torch_loads_and_is_noticed_when_cut(io, tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=False)
    assert io.load_checkpoint(path)["a"].sum() == 100
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DamagedCheckpointError, match="does not continue"):
        io.load_checkpoint(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_class_that_is_not_allowed_is_named(io, tmp_path, new_format):
    path = tmp_path / "x.ckpt"
    torch.save({"a": argparse.Namespace(b=1)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse.Namespace.*`weights_only=False`.*add_safe_globals"):
        io.load_checkpoint(path)
    assert io.load_checkpoint(path, weights_only=False) == {"a": argparse.Namespace(b=1)}
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert io.load_checkpoint(path) == {"a": argparse.Namespace(b=1)}


def test_all_classes_that_are_not_allowed_are_named_at_once(io, tmp_path):
    io.save_checkpoint({"a": argparse.Namespace(), "b": argparse.ArgumentError(None, "")}, tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError) as error:
        io.load_checkpoint(tmp_path / "x.ckpt")
    assert "argparse.Namespace" in str(error.value) and "argparse.ArgumentError" in str(error.value)


def test_loading_takes_a_device(io, saved):
    assert io.load_checkpoint(saved, map_location="meta")["weight"].device.type == "meta"
    assert io.load_checkpoint(saved, map_location=lambda storage, location: storage)["weight"].device.type == "cpu"


def test_a_device_that_is_not_there_is_no_damage(io, saved):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(RuntimeError, match="CUDA") as error:
        io.load_checkpoint(saved, map_location="cuda")
    assert not isinstance(error.value, DamagedCheckpointError)


def test_local_checkpoints_need_no_fsspec(saved, run_python):
    code = f"""
import sys
from fulmen.plugins import TorchCheckpointIO
TorchCheckpointIO().load_checkpoint({str(saved)!r})
assert "fsspec" not in sys.modules
"""
    assert run_python(code) == 0


def test_a_storage_of_ones_own_must_define_three_verbs():
    class Incomplete(CheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None): ...

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()
