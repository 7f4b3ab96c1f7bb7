"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import ModelCheckpoint
from fulmen.plugins import AsyncCheckpointIO, TorchCheckpointIO


class Gated(TorchCheckpointIO):
    """Begins to write when told to, and keeps where the tensors were that it was given."""

    def __init__(self, is_open: bool = False) -> None:
        self.gate, self.places, self.written = threading.Event(), [], []
        if is_open:
            self.gate.set()

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        assert self.gate.wait(30)
        self.places.append([value.data_ptr() for value in checkpoint.get("state_dict", {}).values()])
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written.append(Path(path).name)


class Failing(TorchCheckpointIO):
    """The disk is full for files of these names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if Path(path).name in self.names:
            raise OSError(28, "No space left on device", str(path))
        super().save_checkpoint(checkpoint, path, storage_options)


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def trained(steps, layer, optimizer):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()


def test_the_file_is_that_of_the_moment_of_the_call_whatever_happens_meanwhile(tmp_path):
    torch.manual_seed(1)
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    trained(2, layer, optimizer)
    history = {"losses": [1.0, 2.0], "best": torch.tensor(3.0)}
    checkpoint = {"state_dict": layer.state_dict(), "optimizer_states": [optimizer.state_dict()], "callbacks": history}
    TorchCheckpointIO().save_checkpoint(checkpoint, tmp_path / "moment.ckpt")
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint(checkpoint, tmp_path / "later.ckpt")
    trained(50, layer, optimizer)
    history["losses"].append(4.0)
    history["best"].zero_()
    assert not (tmp_path / "later.ckpt").exists()
    inner.gate.set()
    trained(50, layer, optimizer)
    io.wait()
    assert sha(tmp_path / "later.ckpt") == sha(tmp_path / "moment.ckpt")
    io.save_checkpoint(checkpoint, tmp_path / "end.ckpt")
    assert sha(tmp_path / "moment.ckpt") != (io.wait(), sha(tmp_path / "end.ckpt"))[1]


def test_tensors_that_share_memory_share_it_in_the_file(tmp_path):
    io, base = AsyncCheckpointIO(), torch.arange(100_000.0)
    weight = torch.nn.Parameter(torch.ones(3))
    checkpoint = {"a": base, "same": base, "view": base[10:20].view(2, 5), "turned": base[:6].view(2, 3).t()}
    checkpoint |= {"parameter": weight, "short": torch.ones(3, dtype=torch.bfloat16), "empty": torch.empty(0)}
    checkpoint |= {"sparse": torch.eye(3).to_sparse(), "conj": torch.ones(2, dtype=torch.complex64).conj()}
    io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    found = io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert found.keys() == checkpoint.keys()
    for name, value in checkpoint.items():
        assert torch.equal(found[name].to_dense(), value.to_dense()) and found[name].dtype == value.dtype, name
    assert isinstance(found["parameter"], torch.nn.Parameter) and found["turned"].stride() == (1, 3)
    found["a"][10] = -1.0
    assert found["same"][10] == found["view"][0, 0] == -1.0
    assert (tmp_path / "a.ckpt").stat().st_size < 1.1 * base.nbytes + 10_000


def test_a_save_waits_for_the_one_before_and_takes_its_memory(tmp_path):
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    state = {"state_dict": {"a": torch.zeros(1000), "b": torch.zeros(10, dtype=torch.int64)}}
    io.save_checkpoint(state, tmp_path / "0")
    second = threading.Thread(target=io.save_checkpoint, args=(state, tmp_path / "1"))
    second.start()
    second.join(0.1)
    assert second.is_alive() and not inner.written
    inner.gate.set()
    second.join(30)
    for number in range(2, 6):
        io.save_checkpoint(state, tmp_path / str(number))
    io.teardown()
    assert inner.written == [str(number) for number in range(6)]
    assert inner.places == [inner.places[0]] * 6
    assert not [thread for thread in threading.enumerate() if "checkpoints" in thread.name]


@pytest.mark.parametrize("verb", ["save_checkpoint", "load_checkpoint", "wait", "teardown"])
def test_a_write_that_fails_is_raised_by_what_follows_and_what_it_would_replace_stays(tmp_path, caplog, verb):
    io = AsyncCheckpointIO(Failing("new"))
    io.save_checkpoint({"a": 1}, tmp_path / "old")
    io.wait()
    io.save_checkpoint({"a": 2}, tmp_path / "new")
    io.remove_checkpoint(tmp_path / "old")
    while io.is_writing:
        time.sleep(0.01)
    io.remove_checkpoint(tmp_path / "old")  # nor when the failure is not news any more
    arguments = {"save_checkpoint": ({"a": 3}, tmp_path / "third"), "load_checkpoint": (tmp_path / "new",)}
    with pytest.raises(OSError, match="No space left on device.*new"):
        getattr(io, verb)(*arguments.get(verb, ()))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert "new" in caplog.text and "No space left" in caplog.text
    io.save_checkpoint({"a": 3}, tmp_path / "third")  # the error was raised once
    io.remove_checkpoint(tmp_path / "old")
    io.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["third"]


def test_a_file_is_loaded_when_it_is_there_and_removed_in_its_turn(tmp_path):
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    (tmp_path / "old").write_text("")
    io.save_checkpoint({"a": 1}, tmp_path / "new")
    io.remove_checkpoint(tmp_path / "old")
    assert (tmp_path / "old").exists() and io.is_writing
    assert [io.will_exist(tmp_path / name) for name in ("old", "new", "other")] == [False, True, None]
    threading.Timer(0.05, inner.gate.set).start()
    assert io.load_checkpoint(tmp_path / "new") == {"a": 1}
    assert not (tmp_path / "old").exists() and not io.is_writing


def test_what_cannot_be_copied_is_said_by_who_writes_it(tmp_path):
    io = AsyncCheckpointIO()
    with pytest.warns(UserWarning, match="cannot be copied"), pytest.raises(TypeError, match=r"checkpoint\['lock'\]"):
        io.save_checkpoint({"lock": threading.Lock()}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_once_is_enough_and_it_travels_to_other_processes(tmp_path):
    with pytest.raises(TypeError, match="once is enough"):
        AsyncCheckpointIO(AsyncCheckpointIO())
    io = pickle.loads(pickle.dumps(AsyncCheckpointIO(Failing("x"))))
    assert isinstance(io.checkpoint_io, Failing)
    io.save_checkpoint({"a": 1}, tmp_path / "a")
    assert io.load_checkpoint(tmp_path / "a") == {"a": 1}


def save_and_leave(path):
    inner = Gated()
    AsyncCheckpointIO(inner).save_checkpoint({"a": 1}, path)
    threading.Timer(0.2, inner.gate.set).start()


def test_a_process_ends_when_all_is_written(tmp_path):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=save_and_leave, args=(tmp_path / "a",))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and torch.load(tmp_path / "a") == {"a": 1}


# ---------------------------------------------------------------------- in a run


class Model(Regression):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def on_train_epoch_end(self):
        self.log("epoch_loss", -float(self.current_epoch))


def run(folder, io=None, epochs=4, model=None, callbacks=(), **arguments):
    checkpoints = ModelCheckpoint(folder, **arguments)
    pl.seed_everything(3)
    given = {"callbacks": [*callbacks, checkpoints], "enable_checkpointing": True, "plugins": io}
    trainer = make_trainer(max_epochs=epochs, **given)
    trainer.fit(model or Model(), make_loader())
    return trainer, checkpoints


def contents(folder):
    keys = ("state_dict", "optimizer_states", "loops", "global_step")
    files = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.iterdir())}
    return {name: str({key: content[key] for key in keys}) for name, content in files.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": -1},
        {"monitor": "epoch_loss", "save_last": True},
        {"save_last": "link"},
        {"every_n_train_steps": 1},
    ],
    ids=str,
)
def test_files_are_those_that_are_written_at_once(tmp_path, arguments):
    run(tmp_path / "at_once", **arguments)
    _, callback = run(tmp_path / "later", async_save=True, **arguments)
    run(tmp_path / "plugin", AsyncCheckpointIO(), **arguments)
    expected = contents(tmp_path / "at_once")
    assert expected and contents(tmp_path / "later") == contents(tmp_path / "plugin") == expected
    assert Path(callback.best_model_path).exists()


class Watching(pl.loggers.CSVLogger):
    """What was in the folder when this logger was told of a new file."""

    def __init__(self, folder, checkpoints):
        super().__init__(folder)
        self.checkpoints, self.seen = checkpoints, []

    def after_save_checkpoint(self, checkpoint_callback):
        self.seen.append(sorted(path.name for path in self.checkpoints.glob("*.ckpt")))


def test_training_goes_on_while_a_file_is_written_and_loggers_hear_of_it_afterwards(tmp_path):
    inner, files = Gated(), tmp_path / "files"

    class Watched(Model):
        def training_step(self, batch, batch_idx):
            told.append(len(logger.seen))
            if batch_idx == 2:
                assert inner.written == []  # of the file after the second step
                inner.gate.set()
                deadline = time.monotonic() + 300
                while inner.written == [] and time.monotonic() < deadline:
                    time.sleep(0.01)
            return super().training_step(batch, batch_idx)

    told, logger = [], Watching(tmp_path, files)
    checkpoints = ModelCheckpoint(files, every_n_train_steps=2, async_save=True)
    given = {"callbacks": [checkpoints], "enable_checkpointing": True, "plugins": inner, "logger": logger}
    make_trainer(**given).fit(Watched(), make_loader(20))
    assert told[:4] == [0, 0, 0, 1] and inner.written == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]
    first, second = logger.seen  # the older file goes a moment later, where the write was quick
    assert first == ["epoch=0-step=2.ckpt"] and "epoch=0-step=4.ckpt" in second


def test_fit_returns_and_fails_when_all_is_written(tmp_path):
    class Breaking(Model):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                threading.Timer(0.2, inner.gate.set).start()
                raise KeyError("broken")

    inner = Gated()
    with pytest.raises(KeyError, match="broken"):
        run(tmp_path / "broken", inner, async_save=True, model=Breaking())
    assert inner.written == ["epoch=0-step=3.ckpt"]

    inner = Gated()
    threading.Timer(0.2, inner.gate.set).start()
    trainer, _ = run(tmp_path / "whole", inner, epochs=1, async_save=True)
    assert inner.written == ["epoch=0-step=3.ckpt"]
    assert trainer.validate(Model(), make_loader(), ckpt_path="best", verbose=False)


def test_a_save_of_ones_own_is_there_when_it_returns(tmp_path):
    class Saving(Model):
        def on_train_batch_end(self, *_):
            self.trainer.save_checkpoint(tmp_path / "own.ckpt")
            assert torch.load(tmp_path / "own.ckpt", weights_only=True)["global_step"] == self.global_step

    trainer, _ = run(tmp_path, epochs=1, async_save=True, model=Saving())
    trainer.strategy.checkpoint_io.always = True  # as with the plugin, where a run is what waits
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert (tmp_path / "after.ckpt").exists()


@pytest.mark.parametrize(("name", "steps"), [("epoch=0-step=3.ckpt", 6), ("epoch=3-step=12.ckpt", 12)])
def test_a_write_that_fails_ends_the_run_at_the_next_save_or_at_the_end(tmp_path, caplog, name, steps):
    model = Model()
    with pytest.raises(OSError, match=f"No space.*{name}"):
        run(tmp_path, Failing(name), async_save=True, model=model)
    assert model.trainer.global_step == steps and f"{name}' failed" in caplog.text
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([] if steps == 6 else ["epoch=2-step=9.ckpt"])  # what it would have replaced


def on_two_ranks(folder):
    """What is left of a good run, what a bad one raises, and what is said where shards are written."""
    results, said = [], []
    for name, io in (("good", None), ("bad", Failing("epoch=1-step=4.ckpt"))):
        checkpoints = ModelCheckpoint(Path(folder, name), async_save=True, save_last=True, monitor="epoch_loss")
        given = {"callbacks": [checkpoints], "enable_checkpointing": True, "plugins": io}
        trainer = make_trainer(devices=2, strategy="ddp", max_epochs=3, **given)
        try:
            trainer.fit(Model(), make_loader())
            results.append(Path(checkpoints.last_model_path).exists())
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("fulmen").addHandler(handler)
    strategy = pl.strategies.FSDPStrategy(state_dict_type="sharded")
    given = {"callbacks": [ModelCheckpoint(Path(folder, "shards"), async_save=True)], "enable_checkpointing": True}
    make_trainer(devices=2, strategy=strategy, **given).fit(Model(), make_loader())
    return [*results, "\n".join(said)]


def test_an_error_in_the_background_is_one_of_all_ranks_and_shards_are_written_at_once(tmp_path):
    (good, bad, said), (second_good, second_bad, _) = run_ranks(2, on_two_ranks, str(tmp_path))
    assert good is second_good is True
    assert (
        bad.startswith("OSError")
        and second_bad.startswith("OSError: Rank 0 could not")
        and "No space" in bad
        and second_bad
    )
    assert sorted(path.name for path in (tmp_path / "good").iterdir()) == ["epoch=2-step=6.ckpt", "last.ckpt"]
    assert said.count("Training waits while a checkpoint is written") == 1
    assert (tmp_path / "shards" / "epoch=0-step=2.ckpt" / "meta.pt").exists()
