"""No code of a file runs when it is loaded, and whatever is written can be loaded that way."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import tarfile
import threading
import warnings

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen import callbacks
from fulmen.checkpoint.consolidate import consolidate, main
from fulmen.checkpoint.load import load_hparams_from_yaml
from fulmen.checkpoint.upgrade import upgrade
from fulmen.plugins import TorchCheckpointIO
from fulmen.storage.sharded import META, write_shards


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "the payload was here"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A checkpoint as it should be."""
    trainer = make_trainer()
    trainer.fit(Regression(), make_loader(), make_loader())
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer.save_checkpoint(path)
    return torch.load(path)


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_sharded(content, path):
    os.makedirs(path)
    write_shards(content, str(path))
    torch.save(content, path / META)


FORMATS = {"zip": as_zip, "legacy": as_legacy, "pickle": as_pickle, "sharded": as_sharded}
PLACES = {
    "hyper-parameters": lambda content, payload: content["hyper_parameters"].update(lr=payload),
    "a callback's state": lambda content, payload: content["callbacks"].update(x=payload),
    "the whole": None,
}


@pytest.fixture(
    params=[(form, place) for form in FORMATS for place in PLACES if (form, place) != ("sharded", "the whole")]
)
def malicious(request, content, mark, tmp_path):
    """A file with the payload somewhere, and that it works."""
    form, place = request.param
    path = tmp_path / "bad.ckpt"
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    if PLACES[place]:
        PLACES[place](changed, Payload(mark))
    FORMATS[form](changed if PLACES[place] else Payload(mark), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(
            path / META if form == "sharded" else path, weights_only=False
        ) if form != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()
    mark.unlink()
    return path


def ways_to_load(path):
    """Every door through which a file comes in."""
    trainer, loader = make_trainer(max_epochs=2), make_loader()
    yield "fit", lambda: trainer.fit(Regression(), loader, loader, ckpt_path=path)
    for verb in ("validate", "test", "predict"):
        yield verb, functools.partial(getattr(trainer, verb), Regression(), loader, ckpt_path=path)
    last = callbacks.ModelCheckpoint(path.parent)
    last.CHECKPOINT_NAME_LAST = path.stem
    resumed = make_trainer(callbacks=last, enable_checkpointing=True)
    yield "last", lambda: resumed.fit(Regression(), loader, loader, ckpt_path="last")
    yield "module", lambda: Regression.load_from_checkpoint(path)
    yield "datamodule", lambda: pl.LightningDataModule.load_from_checkpoint(path)
    yield "upgrade", lambda: upgrade(path)
    if path.is_dir():
        yield "consolidate", lambda: consolidate(path)
        return
    yield "file", lambda: Regression.load_from_checkpoint(open(path, "rb"))  # noqa: SIM115
    yield "mapped", lambda: Regression.load_from_checkpoint(path, map_location="cpu")


@pytest.mark.filterwarnings("ignore")
def test_no_way_of_loading_runs_code_of_a_file(malicious, mark):
    for name, load in ways_to_load(malicious):
        with pytest.raises((pickle.UnpicklingError, RuntimeError)) as refused:
            load()
        assert not mark.exists(), name
        assert "weights_only" in str(refused.value) or "bad.ckpt" in str(refused.value), name


@pytest.mark.filterwarnings("ignore")
def test_a_url_is_no_more_trusted_than_a_file(mark, tmp_path, monkeypatch, content):
    (tmp_path / "served").mkdir()
    as_zip({**content, "callbacks": {"x": Payload(mark)}}, tmp_path / "served" / "bad.ckpt")
    as_zip(content, tmp_path / "served" / "good.ckpt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert Regression.load_from_checkpoint(f"{url}/good.ckpt").hparams.lr == 0.1
        with pytest.raises(pickle.UnpicklingError, match=r"system.*weights_only=False"):
            Regression.load_from_checkpoint(f"{url}/bad.ckpt")
        assert not mark.exists()
        Regression.load_from_checkpoint(f"{url}/bad.ckpt", weights_only=False)
        assert mark.exists()
        server.shutdown()


@pytest.mark.parametrize("what", ["the description of the shards", "an object among the shards"])
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_shards_runs_no_code(mark, tmp_path, content, what, capsys):
    path = tmp_path / "bad.ckpt"
    inside = {"extra": Payload(mark)} if "object" in what else {}
    changed = {**content, "state_dict": {**content["state_dict"], **inside}}
    os.makedirs(path)
    write_shards(changed, str(path))
    torch.save(changed, path / META)
    if "description" in what:
        (path / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    for name, load in ways_to_load(path):
        with pytest.raises(pickle.UnpicklingError, match="weights_only=False"):
            load()
        assert not mark.exists(), name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["consolidate", str(path), "--trust"])
        try:
            main()
        except Exception:
            assert "description" in what  # it is nothing but the payload
    assert mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_archives_of_programs_are_refused(mark, tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    with pytest.raises(RuntimeError, match="TorchScript"):
        TorchCheckpointIO().load_checkpoint(path)
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "pickle")
    with pytest.raises(RuntimeError, match="bad.ckpt"):
        TorchCheckpointIO().load_checkpoint(path)


def test_a_file_of_hyper_parameters_runs_no_code(mark, tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "hparams.yaml"
    for tag in ("object/apply:os.system", "object/new:os.system", "object:subprocess.Popen"):
        path.write_text(f"lr: !!python/{tag} [\"touch '{mark}'\"]\n")
        with pytest.raises(ValueError, match=r"hparams.yaml.*names an object"):
            load_hparams_from_yaml(path)
    path.write_text("lr: !!python/name:os.system\n")
    with pytest.raises(ValueError, match=r"(?s)os.system.*pass that argument"):
        load_hparams_from_yaml(path)
    assert not mark.exists()
    path.write_text("sizes: !!python/tuple [1, 2]\nlr: 1e-3\nname: x\n")
    assert load_hparams_from_yaml(path) == {"sizes": (1, 2), "lr": "1e-3", "name": "x"}


# ---------------------------------------------------------------------- what we write


@pytest.mark.filterwarnings("ignore")
def test_all_that_is_built_in_writes_files_that_load_without_code(tmp_path):
    every = [
        callbacks.EarlyStopping("val_loss"), callbacks.LearningRateMonitor(), callbacks.Timer(duration={"hours": 1}),
        callbacks.GradientAccumulationScheduler({0: 1, 1: 2}), callbacks.DeviceStatsMonitor(),
        callbacks.EMAWeightAveraging(), callbacks.ModelCheckpoint(tmp_path / "a", monitor="val_loss", save_last=True),
        callbacks.ModelCheckpoint(tmp_path / "b", every_n_train_steps=1, save_top_k=-1),
    ]  # fmt: skip

    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            warm = torch.optim.lr_scheduler.LinearLR(optimizer)
            return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, warm], [2])]

    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(
        max_epochs=3, callbacks=every, enable_checkpointing=True, precision="bf16-mixed", logger=logger
    )
    trainer.fit(Scheduled(), make_loader(), make_loader())
    written = [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]
    assert len(written) >= 6
    for path in written:
        assert torch.load(path, weights_only=True)["global_step"] > 0


def test_what_cannot_be_pickled_is_named_by_its_key(tmp_path):
    class Own(Regression):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = {"list": [1, {"open": open(os.devnull)}]}  # noqa: SIM115

    trainer = make_trainer()
    trainer.fit(Own(), make_loader())
    with pytest.raises(TypeError, match=r"`checkpoint\['mine'\]\['list'\]\[1\]\['open'\]` cannot be pickled"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert not os.listdir(tmp_path)
