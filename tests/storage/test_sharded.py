"""Checkpoints that are folders: written whole or not at all, and refused by name if a part was changed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint
from fulmen.checkpoint.consolidate import consolidate
from fulmen.checkpoint.paths import find_newest_good
from fulmen.storage.checkpoint_io import DamagedCheckpointError
from fulmen.strategies import FSDPStrategy

resource = pytest.importorskip("resource", reason="needs POSIX")


class Net(Regression):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(4, 1000)

    def forward(self, x):
        return self.layer(x) + self.wide(x).mean()


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def fit(folder, epochs=1, **arguments):
    strategy = FSDPStrategy(state_dict_type="sharded", process_group_backend="gloo")
    callback = ModelCheckpoint(folder, filename="{epoch}", **arguments.pop("keep", {}))
    trainer = make_trainer(
        strategy=strategy, devices=2, max_epochs=epochs, callbacks=callback, enable_checkpointing=True
    )
    trainer.fit(Net(), make_loader(16), **arguments)
    return trainer, callback


def write_and_read(folder):
    """A run, one that goes on from a damaged folder, and runs that cannot write; each process tells what it saw."""
    folder, told = Path(folder), {}
    fit(folder / "saved", epochs=2, keep={"save_top_k": -1})
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "saved" / "epoch=1.ckpt", folder / "changed.ckpt")
        flip(folder / "changed.ckpt" / "__1_0.distcp")
    torch.distributed.barrier()
    with pytest.raises(DamagedCheckpointError) as refused:
        fit(folder / "other", epochs=3, ckpt_path=folder / "changed.ckpt")
    told["changed"] = str(refused.value)
    if torch.distributed.get_rank() == 0:
        (folder / "a file").touch()
    torch.distributed.barrier()
    with pytest.raises(OSError, match="a file") as refused:
        fit(folder / "a file" / "below")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer, callback = fit(folder / "a file" / "below", epochs=2, keep={"on_save_error": "warn"})
    told["warned"] = sum("was not written" in str(warning.message) for warning in said)
    told["steps"], told["named"] = trainer.global_step, callback.best_model_path
    if torch.distributed.get_rank() == 1:  # as if the disk were full for one of them
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"Rank 1 could not write .*epoch=0\.ckpt"):
        fit(folder / "full")
    told["left"] = os.listdir(folder / "full")
    return told


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, run_ranks(2, write_and_read, str(folder))


def test_all_processes_refuse_a_folder_of_which_one_part_was_changed(written):
    for told in written[1]:
        assert "changed.ckpt" in told["changed"] and "'__1_0.distcp' has another SHA-256" in told["changed"]


def test_all_processes_learn_that_a_folder_cannot_be_written(written):
    for rank, told in enumerate(written[1]):
        assert (told["steps"], told["named"]) == (4, "")
        assert told["warned"] == (2 if rank == 0 else 0)
        assert told["left"] == []
    assert sorted(os.listdir(written[0])) == ["a file", "changed.ckpt", "full", "saved"]


def test_a_folder_lists_what_it_holds(written):
    path = written[0] / "saved" / "epoch=1.ckpt"
    listed = json.loads((path / "checksums.json").read_text())
    assert set(os.listdir(path)) == {*listed, "checksums.json", "meta.pt"}
    assert len(listed) == 3 and all(size == (path / name).stat().st_size for name, (size, _) in listed.items())
    assert sorted(os.listdir(path.parent)) == ["epoch=0.ckpt", "epoch=1.ckpt"]


@pytest.mark.parametrize("part", ["__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "checksums.json"])
@pytest.mark.parametrize("how", ["changed", "cut off", "gone"])
def test_every_part_is_checked(written, tmp_path, part, how):
    for epoch in (0, 1):
        shutil.copytree(written[0] / "saved" / f"epoch={epoch}.ckpt", tmp_path / f"epoch={epoch}.ckpt")
        os.utime(tmp_path / f"epoch={epoch}.ckpt", (epoch, epoch))
    bad, good = tmp_path / "epoch=1.ckpt", tmp_path / "epoch=0.ckpt"
    content = (bad / part).read_bytes()
    if how == "gone":
        (bad / part).unlink()
    else:
        flip(bad / part) if how == "changed" else os.truncate(bad / part, len(content) // 2)
    os.utime(bad, (1, 1))
    if (part, how) == ("meta.pt", "gone"):
        with pytest.raises(IsADirectoryError, match=r"meta\.pt"):
            Net.load_from_checkpoint(bad)
        with pytest.warns(UserWarning, match=r"epoch=1\.ckpt.*instead: .*epoch=0\.ckpt"):
            assert find_newest_good([str(bad), str(good)]) == str(good)
        return
    if (part, how) == ("checksums.json", "gone"):  # as written by others
        assert Net.load_from_checkpoint(bad).wide.weight.shape == (1000, 4)
        return
    for load in (Net.load_from_checkpoint, consolidate):
        with pytest.raises(DamagedCheckpointError, match=r"epoch=1\.ckpt.*good one beside it is .*epoch=0\.ckpt"):
            load(bad)
    with pytest.warns(UserWarning, match=r"epoch=1\.ckpt.*instead: .*epoch=0\.ckpt"):
        assert find_newest_good([str(bad), str(good)]) == str(good)
