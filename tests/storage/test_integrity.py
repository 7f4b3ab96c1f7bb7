"""Files that know their own SHA-256."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import zipfile

import pytest
import torch

from fulmen.plugins import TorchCheckpointIO
from fulmen.storage.checkpoint_io import DamagedCheckpointError


@pytest.fixture
def saved(tmp_path):
    TorchCheckpointIO().save_checkpoint({"weight": torch.arange(1000.0), "epoch": 3}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_the_hash_of_all_before_it_ends_the_file(saved):
    content = saved.read_bytes()
    comment = zipfile.ZipFile(saved).comment
    assert re.fullmatch(rb"fulmen sha256 [0-9a-f]{64}", comment) and content.endswith(comment)
    assert comment[-64:].decode() == hashlib.sha256(content[: -len(comment) - 2]).hexdigest()


def test_without_it_the_file_is_that_of_torch(saved):
    plain = io.BytesIO()
    torch.save({"weight": torch.arange(1000.0), "epoch": 3}, plain)
    parts = zipfile.ZipFile(plain).infolist()
    assert [(part.CRC, part.file_size) for part in zipfile.ZipFile(saved).infolist()] == [
        (part.CRC, part.file_size) for part in parts
    ]
    assert saved.stat().st_size == len(plain.getvalue()) + 78


@pytest.mark.parametrize("how", [{}, {"weights_only": True}, {"mmap": True}, {"map_location": "meta"}])
def test_torch_reads_it_as_any_other(saved, how):
    assert torch.load(saved, **how)["epoch"] == 3


def test_every_changed_byte_is_noticed(saved):
    content = saved.read_bytes()
    for position in [*range(0, len(content), 61), *range(len(content) - 78, len(content))]:
        saved.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(DamagedCheckpointError, match=r"x\.ckpt"):
            TorchCheckpointIO().verify_checkpoint(saved)


def test_every_missing_end_is_noticed(saved):
    content = saved.read_bytes()
    for missing in [*range(1, 160), 500, 1000, len(content) - 2]:
        saved.write_bytes(content[:-missing])
        with pytest.raises(DamagedCheckpointError, match="cut off"):
            TorchCheckpointIO().verify_checkpoint(saved)


def test_it_is_copied_moved_and_replaced_with_the_file(saved, tmp_path):
    """A file of the user at the same place is not mistaken for a damaged one of ours."""
    shutil.copy(saved, tmp_path / "copy.ckpt")
    os.replace(tmp_path / "copy.ckpt", tmp_path / "moved.ckpt")
    TorchCheckpointIO().verify_checkpoint(tmp_path / "moved.ckpt")
    torch.save({"epoch": 4}, saved)
    assert TorchCheckpointIO().load_checkpoint(saved) == {"epoch": 4}


def test_a_changed_file_in_a_store_is_noticed():
    fsspec = pytest.importorskip("fsspec")
    url, store = "memory://sealed/x.ckpt", fsspec.filesystem("memory")
    TorchCheckpointIO().save_checkpoint({"weight": torch.ones(100)}, url)
    content = bytearray(store.cat("/sealed/x.ckpt"))
    content[len(content) // 2] ^= 1
    store.pipe("/sealed/x.ckpt", bytes(content))
    for look in (TorchCheckpointIO().load_checkpoint, TorchCheckpointIO().verify_checkpoint):
        with pytest.raises(DamagedCheckpointError, match=url):
            look(url)


def test_a_store_that_kept_only_a_part_is_an_error(monkeypatch):
    """Some stores have no atomic upload; what they say about the size is compared."""
    fsspec = pytest.importorskip("fsspec")
    memory = type(fsspec.filesystem("memory"))
    whole = memory.size
    monkeypatch.setattr(memory, "size", lambda self, path: whole(self, path) - 1)
    with pytest.raises(OSError, match="of the .* bytes that were written"):
        TorchCheckpointIO().save_checkpoint({"weight": torch.ones(100)}, "memory://sealed/y.ckpt")


def test_an_error_of_a_store_is_one_of_writing(monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def refuse(*_, **__):
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", refuse)
    with pytest.raises(OSError, match="z.ckpt.*403 Forbidden"):
        TorchCheckpointIO().save_checkpoint({}, "memory://sealed/z.ckpt")


def test_a_damaged_file_names_the_newest_good_one_beside_it(saved, tmp_path):
    io = TorchCheckpointIO()
    for age, name in enumerate(["older.ckpt", "newer.ckpt", "newest but cut.ckpt", "newest.txt"]):
        io.save_checkpoint({"epoch": age}, tmp_path / name)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    os.truncate(tmp_path / "newest but cut.ckpt", 300)
    os.truncate(saved, 300)
    (tmp_path / "leads nowhere.ckpt").symlink_to("gone")
    with pytest.raises(DamagedCheckpointError, match=r"x\.ckpt.*beside it is .*newer\.ckpt"):
        io.load_checkpoint(saved)
