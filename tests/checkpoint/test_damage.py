"""Whatever has happened to the newest checkpoint, a run continues from the newest good one, and names the other."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import socket
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint
from fulmen.engine.cluster import SLURMEnvironment
from fulmen.storage.checkpoint_io import DamagedCheckpointError
from fulmen.storage.integrity import save_with_digest
from fulmen.storage.sharded import CHECKSUMS, META, hash_own_parts, write_shards

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs pipes, links and sockets")
GOOD, BAD = "step=4.ckpt", "step=8.ckpt"


class Net(Regression):
    def __init__(self, width: int = 1):
        super().__init__()
        self.layer = torch.nn.Linear(4, width)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(folder, ckpt_path=None, steps=9, saver=None, **kwargs):
    torch.manual_seed(0)
    saver = saver or ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    model = Net()
    kwargs = {"default_root_dir": folder, "enable_checkpointing": True, "max_steps": steps, **kwargs}
    trainer = make_trainer(callbacks=[saver], max_epochs=3, limit_val_batches=0, **kwargs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model, make_loader(20), ckpt_path=ckpt_path)
    return model.state_dict(), trainer, [str(warning.message) for warning in said]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not disturbed, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    return folder, {name: value.clone() for name, value in fit(folder)[0].items()}


def as_folder(file, folder):
    """The same checkpoint in shards."""
    content = torch.load(file, weights_only=True)
    os.makedirs(folder)
    write_shards(content, str(folder))
    (folder / CHECKSUMS).write_text(json.dumps(hash_own_parts(str(folder), 0)))
    with open(folder / META, "wb") as meta:
        save_with_digest(content, meta)


# ---------------------------------------------------------------------- damages: functions of a path


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flip(draw, low=0.0, high=1.0):
    share, bit = low + (high - low) * draw.random(), draw.randrange(8)

    def change(raw):
        data = bytearray(raw)
        data[int(share * len(raw))] ^= 1 << bit
        return bytes(data)

    return rewrite(change)


def hole(draw):
    share, size = draw.random(), draw.choice([1, 64, 512, 4096])

    def change(raw):
        start = int(share * len(raw))
        data = raw[:start] + bytes(len(raw[start : start + size])) + raw[start + size :]
        return data if data != raw else raw[:-1]

    return rewrite(change)


def swap(draw):
    size, share = draw.choice([16, 128, 512]), draw.random()

    def change(raw):
        start = int(share * max(len(raw) - 2 * size, 0))
        one, two = raw[start : start + size], raw[start + size : start + 2 * size]
        data = raw[:start] + two + one + raw[start + 2 * size :]
        return data if data != raw else raw[1:]

    return rewrite(change)


def cut(draw):
    share = draw.random()
    return rewrite(lambda raw: raw[: int(share * len(raw))])


def add(draw):
    more, ahead = draw.randbytes(draw.choice([1, 22, 78, 4096])), draw.random() < 0.3
    return rewrite(lambda raw: more + raw if ahead else raw + more)


def noise(draw):
    seed = draw.random()
    return rewrite(lambda raw: random.Random(seed).randbytes(len(raw)))


RANDOM = (flip, partial(flip, low=0.0, high=0.2), partial(flip, low=0.8), hole, swap, cut, add, noise)


def replaced(make):
    def change(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def bind(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


class Alien:
    def __reduce__(self):
        return (print, ("run",))


def content(change):
    """A whole file, with a hash of its own, that holds something else."""

    def act(path):
        found = torch.load(path, weights_only=True) if path.is_file() else {}
        found = change(found)
        with open(path, "wb") as file:
            save_with_digest(found, file)

    return act


def without(*keys):
    return content(lambda found: {key: value for key, value in found.items() if key not in keys})


def with_(**values):
    return content(lambda found: {**found, **values})


PLACES = {
    "empty": rewrite(lambda raw: b""),
    "one byte": rewrite(lambda raw: raw[:1]),
    "zeros": rewrite(lambda raw: bytes(len(raw))),
    "doubled": rewrite(lambda raw: raw + raw),
    "backwards": rewrite(lambda raw: raw[::-1]),
    "text": rewrite(lambda raw: b"not a checkpoint\n"),
    "plain pickle": rewrite(lambda raw: pickle.dumps({"a": 1})),
    "a folder": replaced(lambda path: path.mkdir()),
    "a folder with a file": replaced(lambda path: (path.mkdir(), (path / "x.ckpt").write_bytes(b"x"))),
    "a link to nothing": replaced(lambda path: path.symlink_to("gone")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a link to a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a pipe": replaced(os.mkfifo),
    "a socket": replaced(bind),
}
CONTENTS = {
    "a list": content(lambda found: [1, 2, 3]),
    "nothing": content(lambda found: None),
    "a class": content(lambda found: Alien()),
    "a class inside": with_(alien=Alien()),
    "weights": content(lambda found: found["state_dict"]),
    "nested": content(lambda found: {"checkpoint": found}),
    "of no trainer": without("pytorch-lightning_version"),
    "without weights": without("state_dict"),
    "without schedulers": without("lr_schedulers"),
    "without counters": without("loops", "fulmen"),
    "counters of another kind": with_(fulmen={"progress": {"epochs": None}}),
    "steps that are no number": with_(global_step="many"),
    "weights of another kind": with_(state_dict=[1.0]),
    "loops of another kind": with_(loops=7),
    "optimizers of another kind": with_(optimizer_states=[1]),
    "schedulers of another kind": with_(lr_schedulers=[None]),
    "other shapes": content(lambda found: {**found, "state_dict": Net(3).state_dict()}),
    "other names": content(lambda found: {**found, "state_dict": {"other": torch.zeros(3)}}),
}


@contextmanager
def damaged_copy(whole, tmp_path, damage, sharded_part=None):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(whole / GOOD, folder / GOOD)
    if sharded_part is None:
        shutil.copy(whole / BAD, folder / BAD)
        damage(folder / BAD)
    else:
        as_folder(whole / BAD, folder / BAD)
        damage(folder / BAD / sharded_part)
    yield folder
    shutil.rmtree(folder)


def outcome(whole, tmp_path, damage, part=None, saw=None):
    """What a run with "auto" made of it: "good", or what was wrong."""
    folder, weights = whole
    with damaged_copy(folder, tmp_path, damage, part) as place:
        try:
            found, trainer, said = fit(place, "auto")
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if os.path.basename(str(trainer.ckpt_path)) != GOOD:
            return f"continued from {trainer.ckpt_path}"
        if not any(BAD in line and "Passed over" in line for line in said):
            return f"not named: {said}"
        same = trainer.global_step == 9 and all(torch.equal(value, weights[name]) for name, value in found.items())
        return "good" if same else "other weights"


# ---------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", [*PLACES, *CONTENTS])
def test_the_newest_good_one_is_used(whole, tmp_path, name):
    assert outcome(whole, tmp_path, {**PLACES, **CONTENTS}[name]) == "good"


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_changed_end_no_run(whole, tmp_path, seed):
    for kind in RANDOM:
        assert outcome(whole, tmp_path, kind(random.Random(seed))) == "good"


@pytest.mark.parametrize("part", ["__0_0.distcp", ".metadata", META, CHECKSUMS])
def test_every_part_of_a_folder_of_shards_is_covered(whole, tmp_path, part):
    for name in ("empty", "text", "a folder", "a link to itself", "a link to a device", "a pipe", "a socket"):
        assert outcome(whole, tmp_path, PLACES[name], part) == "good", name
    for kind in (flip, cut, add):
        assert outcome(whole, tmp_path, kind(random.Random(0)), part) == "good", kind


@pytest.mark.slow
def test_seven_hundred_damages(whole, tmp_path):
    """Of a file and of each part of a folder of shards; all have an older good checkpoint beside them."""
    found: Counter[str] = Counter()
    fixed = {**PLACES, **CONTENTS}
    parts = ["__0_0.distcp", ".metadata", META, CHECKSUMS]
    cases = [(damage, None) for damage in fixed.values()]
    cases += [(damage, part) for part in parts for damage in PLACES.values()]
    draw = random.Random(7)
    while len(cases) < 700:
        kind = draw.choice(RANDOM)
        cases.append((kind(draw), draw.choice([None, None, None, None, *parts])))
    for number, (damage, part) in enumerate(cases):
        result = outcome(whole, tmp_path, damage, part)
        found[result] += 1
        if result != "good":
            print(number, part, result)
    print(f"\n{sum(found.values())} damages: {dict(found)}")
    assert found == {"good": 700}


@pytest.mark.parametrize("kind", ["last", "best", "hpc"])
@pytest.mark.parametrize(
    "name", ["a link to itself", "a pipe", "a folder", "a class", "a list", "without schedulers", "other shapes", "cut"]
)
def test_names_lead_to_the_newest_good_one_too(whole, tmp_path, kind, name):
    damage = {**PLACES, **CONTENTS, "cut": rewrite(lambda raw: raw[:-100])}[name]
    folder, weights = whole
    file = tmp_path / {"last": "last.ckpt", "best": "best.ckpt", "hpc": "hpc_ckpt_2.ckpt"}[kind]
    shutil.copy(folder / GOOD, tmp_path / "hpc_ckpt_1.ckpt" if kind == "hpc" else tmp_path / GOOD)
    shutil.copy(folder / BAD, file)
    damage(file)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    saver.best_model_path = str(file)
    found, trainer, said = fit(tmp_path, kind, saver=saver)
    assert os.path.basename(trainer.ckpt_path) == ("hpc_ckpt_1.ckpt" if kind == "hpc" else GOOD)
    assert any(file.name in line and "instead" in line for line in said)
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_a_requeued_job_uses_the_file_before_a_damaged_one(whole, tmp_path):
    shutil.copy(whole[0] / GOOD, tmp_path / "hpc_ckpt_1.ckpt")
    (tmp_path / "hpc_ckpt_2.ckpt").write_bytes(b"")
    for ckpt_path in (None, "auto"):
        saver = ModelCheckpoint(tmp_path / "none")
        _, trainer, said = fit(tmp_path, ckpt_path, saver=saver, plugins=[SLURMEnvironment()])
        assert trainer.ckpt_path == str(tmp_path / "hpc_ckpt_1.ckpt")
        assert any("hpc_ckpt_2.ckpt" in line for line in said)
        shutil.rmtree(tmp_path / "none", ignore_errors=True)


def test_a_damage_that_hides_the_steps_or_the_optimizer_is_named(whole, tmp_path):
    """Read without its hash, such a file would look like an old one, or like one of weights alone."""
    for word in (b"optimizer_states", b"global_step"):
        damage = rewrite(lambda raw, word=word: raw.replace(word, word[:-1] + b"_"))
        assert outcome(whole, tmp_path, damage) == "good"


def test_if_no_file_fits_the_error_says_how_they_differ(whole, tmp_path):
    shutil.copy(whole[0] / BAD, tmp_path / BAD)
    CONTENTS["other shapes"](tmp_path / BAD)
    with pytest.raises(RuntimeError, match=r"does not fit Net.*of another shape: layer\.weight \(3, 4\)"):
        fit(tmp_path, "auto")


@pytest.mark.parametrize("name", ["a pipe", "a socket", "a link to a device"])
def test_only_regular_files_are_opened(whole, tmp_path, name):
    path = tmp_path / "x.ckpt"
    shutil.copy(whole[0] / GOOD, path)
    PLACES[name](path)
    with pytest.raises(DamagedCheckpointError, match="not a regular file"):
        Net.load_from_checkpoint(path)
    with pytest.raises(DamagedCheckpointError, match="not a regular file"):
        fit(tmp_path, path)
    PLACES[name](path)
    hparams = tmp_path / "hparams.csv"
    hparams.write_text("")
    PLACES[name](hparams)
    with pytest.raises(OSError, match="regular file"):
        Net.load_from_checkpoint(whole[0] / GOOD, hparams_file=hparams)


@pytest.mark.parametrize("listed", [True, False])
def test_parts_of_shards_are_regular_files_of_their_folder(whole, tmp_path, listed):
    as_folder(whole[0] / GOOD, tmp_path / "x.ckpt")
    assert Net.load_from_checkpoint(tmp_path / "x.ckpt").layer.weight.shape == (1, 4)
    sums = tmp_path / "x.ckpt" / CHECKSUMS
    if listed:
        for name in ("pipe", "../pipe", str(tmp_path / "pipe")):
            sums.write_text(json.dumps({name: [0, ""]}))
            (tmp_path / "pipe").exists() or os.mkfifo(tmp_path / "pipe")
            (tmp_path / "x.ckpt" / "pipe").exists() or os.mkfifo(tmp_path / "x.ckpt" / "pipe")
            with pytest.raises(DamagedCheckpointError, match="regular file|outside of the folder"):
                Net.load_from_checkpoint(tmp_path / "x.ckpt")
        return
    sums.unlink()  # as folders of others are
    for name in ("__0_0.distcp", ".metadata"):
        (tmp_path / "x.ckpt" / name).unlink()
        os.mkfifo(tmp_path / "x.ckpt" / name)
        for weights_only in (None, False):
            with pytest.raises((DamagedCheckpointError, OSError), match="regular file"):
                Net.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
