"""Loggers of tracking services, against the real client libraries working on local files."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pickle
import sys

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CometLogger, LitLogger, MLFlowLogger, WandbLogger
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import is_installed
from fulmen.utilities.rank_zero import rank_zero_only


def installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def checkpoints(tmp_path):
    """What `ModelCheckpoint` knows after it kept two files."""
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(name.encode())
    best, other = str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")
    callback.best_k_models = {best: torch.tensor(0.25), other: torch.tensor(0.5)}
    callback.best_model_path, callback.best_model_score = best, torch.tensor(0.25)
    callback.last_model_path, callback.current_score = "", torch.tensor(0.5)
    return callback


@pytest.mark.parametrize(
    ("logger_class", "package", "line"),
    [
        (WandbLogger, "wandb", "pip install .*wandb"),
        (MLFlowLogger, "mlflow", "pip install .*mlflow"),
        (CometLogger, "comet_ml", "pip install .*comet-ml"),
        (LitLogger, "litlogger", "pip install .*litlogger"),
    ],
)
def test_without_the_client_the_error_says_what_to_install(logger_class, package, line):
    if installed(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ModuleNotFoundError, match=line):
        logger_class()


# ---------------------------------------------------------------------------------------------- Weights & Biases

needs_wandb = pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed: run `make test-services`")


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.chdir(tmp_path)
    yield wandb
    wandb.finish()


@needs_wandb
def test_a_wandb_run_keeps_metrics_and_configuration(offline_wandb, tmp_path):
    logger = WandbLogger(name="my run", project="p", save_dir=tmp_path / "w", offline=True, prefix="pre")
    assert (logger.name, logger.version, logger.save_dir) == ("p", None, str(tmp_path / "w"))
    logger.log_hyperparams(argparse.Namespace(lr=0.1, activation=torch.relu))
    logger.log_metrics({"loss": torch.tensor(0.5), "acc": 1.0}, step=7)
    run = logger.experiment
    assert run is logger.experiment
    assert run.settings.mode == "offline" or run.offline
    assert run.name == "my run"
    assert logger.version == run.id
    assert run.config["lr"] == 0.1
    assert run.config["activation"] == "relu"
    assert run.summary["pre-loss"] == 0.5
    assert run.summary["trainer/global_step"] == 7
    assert (tmp_path / "w" / "wandb").is_dir()
    logger.finalize("success")


@needs_wandb
def test_wandb_logs_tables_and_media_by_lists_of_equal_length(offline_wandb, tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.log_table("table", columns=["a", "b"], data=[[1, "x"]])
    logger.log_text("text", columns=["t"], data=[["hello"]], step=3)
    image = torch.zeros(4, 4, 3).byte().numpy()
    logger.log_image("images", [image, image], step=4, caption=["one", "two"])
    assert logger.experiment.summary["images"]["captions"] == ["one", "two"]
    assert logger.experiment.summary["table"]["_type"] == "table-file"
    with pytest.raises(TypeError, match="must be logged as a list, not as a `ndarray`"):
        logger.log_image("images", image)
    with pytest.raises(ValueError, match="`caption` has 1 entries for the 2 items"):
        logger.log_image("images", [image, image], caption=["one"])
    for log in (logger.log_audio, logger.log_video):
        with pytest.raises(TypeError, match="must be logged as a list"):
            log("x", image)


@needs_wandb
def test_wandb_uses_a_run_in_progress_and_continues_one_by_id(offline_wandb, tmp_path):
    run = offline_wandb.init(mode="offline", project="other", dir=str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    with pytest.warns(UserWarning, match="already in progress"):
        assert logger.experiment.id == run.id
    assert pickle.loads(pickle.dumps(logger)).version == run.id
    offline_wandb.finish()
    continued = WandbLogger(save_dir=tmp_path, offline=True, version="abc123")
    assert continued.version == "abc123"
    assert continued.experiment.id == "abc123"
    assert WandbLogger(id="xyz").version == "xyz"
    given = WandbLogger(experiment=continued.experiment)
    assert given.experiment is continued.experiment


@needs_wandb
def test_wandb_sends_checkpoints_when_asked(offline_wandb, tmp_path, checkpoints, monkeypatch):
    with pytest.raises(MisconfigurationException, match="offline=True"):
        WandbLogger(offline=True, log_model=True)
    sent = []
    monkeypatch.setattr(
        offline_wandb.sdk.wandb_run.Run,
        "log_artifact",
        lambda self, artifact, aliases: sent.append((artifact, aliases)),
    )
    at_end = WandbLogger(save_dir=tmp_path, log_model=True, mode="offline")
    at_end.log_metrics({"a": 1.0}, 0)
    at_end.after_save_checkpoint(checkpoints)
    at_end.finalize("failed")
    assert sent == []
    at_end.finalize("success")
    (best, best_aliases), (_, worse_aliases) = sorted(sent, key=lambda pair: pair[0].metadata["score"])
    assert best.name == f"model-{at_end.version}"
    assert best.metadata["score"] == 0.25
    assert best.metadata["original_filename"] == "a.ckpt"
    assert best.metadata["ModelCheckpoint"]["monitor"] == "val_loss"
    assert list(best.manifest.entries) == ["model.ckpt"]
    assert (best_aliases, worse_aliases) == (["latest", "best"], ["latest"])

    sent.clear()
    at_once = WandbLogger(experiment=at_end.experiment, log_model="all", checkpoint_name="mine")
    at_once.after_save_checkpoint(checkpoints)
    at_once.after_save_checkpoint(checkpoints)  # nothing new
    assert [artifact.name for artifact, _ in sent] == ["mine", "mine"]


@needs_wandb
def test_wandb_leaves_other_ranks_alone(offline_wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.log_metrics({"a": 1.0}, 0)
    logger.experiment.config.update({"a": 1})
    logger.log_image("x", "not even a list")
    logger.finalize("success")
    assert offline_wandb.run is None


# ---------------------------------------------------------------------------------------------------------- MLflow

needs_mlflow = pytest.mark.skipif(not installed("mlflow"), reason="mlflow is not installed: run `make test-services`")


@needs_mlflow
def test_mlflow_records_metrics_and_parameters_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("exp", run_name="r", save_dir=str(tmp_path / "ml"), tags={"team": "x"}, prefix="p")
    logger.log_hyperparams(
        {"lr": 0.1, "net": {"act": torch.relu}, "long": "x" * 1000, **{f"k{i}": i for i in range(120)}}
    )
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 1}, step=3)
    with pytest.warns(RuntimeWarning, match="recorded as `p-acc1`"):
        logger.log_metrics({"acc@1": 0.9})
    with pytest.warns(UserWarning, match="the text 'hello'"):
        logger.log_metrics({"word": "hello", "n": 1.0}, step=4)
    client, run_id = logger.experiment, logger.run_id
    run = client.get_run(run_id)
    assert (logger.name, logger.version) == (run.info.experiment_id, run.info.run_id)
    assert logger.save_dir == str(tmp_path / "ml")
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["net/act"].endswith("relu")
    assert len(run.data.params["long"]) == 250
    assert run.data.params["k119"] == "119"
    assert run.data.tags["team"] == "x"
    assert run.info.run_name == "r"
    assert dict(run.data.metrics) == {
        "p-loss": 0.5, "p-epoch": 1.0, "p-acc1": 0.9, "p-n": 1.0,
    }  # fmt: skip
    assert client.get_metric_history(run_id, "p-loss")[0].step == 3
    logger.finalize("success")
    assert client.get_run(run_id).info.status == "FINISHED"

    again = MLFlowLogger("exp", save_dir=str(tmp_path / "ml"))
    assert again.experiment_id == logger.experiment_id
    assert again.run_id != run_id
    again.finalize("failed")
    assert client.get_run(again.run_id).info.status == "FAILED"
    continued = MLFlowLogger(save_dir=str(tmp_path / "ml"), run_id=run_id)
    assert (continued.version, continued.name) == (run_id, logger.name)
    assert pickle.loads(pickle.dumps(logger)).version == run_id


@needs_mlflow
def test_mlflow_keeps_checkpoints_with_what_is_known_about_them(tmp_path, monkeypatch, checkpoints):
    yaml = pytest.importorskip("yaml")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("exp", save_dir=str(tmp_path / "ml"), log_model="all")
    logger.after_save_checkpoint(checkpoints)
    logger.finalize("success")
    folder = logger.experiment.download_artifacts(logger.run_id, "a", str(tmp_path))
    with open(f"{folder}/metadata.yaml") as file:
        about = yaml.safe_load(file)
        assert set(about) == {"Checkpoint", "original_filename", "score"}
    with open(f"{folder}/aliases.txt") as file:
        assert file.read() == "['latest', 'best']"
    assert about["score"] == 0.25
    with open(f"{folder}/a.ckpt", "rb") as file:
        assert file.read() == b"a.ckpt"


@needs_mlflow
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_keeps_the_first_value_of_a_parameter_and_training_goes_on(tmp_path, monkeypatch, store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", str(store == "file"))
    first = MLFlowLogger(save_dir=str(tmp_path / "ml"))
    first.log_hyperparams({"lr": 0.1, "net": {"a": 1}})
    continued = MLFlowLogger(save_dir=str(tmp_path / "ml"), run_id=first.run_id)
    for logger in (first, continued):
        with pytest.warns(UserWarning, match=r"keeps the first value.*lr=0.2 \(kept: 0.1\).*new run"):
            logger.log_hyperparams({"lr": 0.2, "net": {"a": 1}, "new": 3, "odd//name@": 1})
        logger.log_metrics({"loss": 1.0})
    params = first.experiment.get_run(first.run_id).data.params
    assert params == {"lr": "0.1", "net/a": "1", "new": "3", "odd/name": "1"}
    assert (tmp_path / "ml" / "mlflow.db").exists() == (store == "sqlite") and first.save_dir == str(tmp_path / "ml")
    if store == "file":
        with pytest.warns(UserWarning, match="net=None"):
            continued.log_hyperparams({"net": None})


@needs_mlflow
def test_mlflow_servers_have_no_local_folder(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert MLFlowLogger(tracking_uri="http://nowhere:1").save_dir is None
    assert MLFlowLogger(save_dir="/x/y").save_dir == "/x/y"
    MLFlowLogger(tracking_uri="http://nowhere:1").finalize("success")  # never used: no connection is made


# ----------------------------------------------------------------------------------------------------------- Comet

needs_comet = pytest.mark.skipif(
    not installed("comet_ml"), reason="comet_ml is not installed: run `make test-services`"
)


@needs_comet
def test_comet_records_into_an_offline_file(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    logger = CometLogger(project="p", online=False, offline_directory=str(tmp_path), prefix="pre", name="mine")
    assert (logger.name, logger.version, logger.save_dir) == ("p", None, str(tmp_path))
    logger.log_hyperparams({"lr": 0.1, "net": {"layers": 2}})
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 3}, step=7)
    assert logger.version == logger.experiment.get_key()
    logger.finalize("success")
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        lines = [json.loads(line) for line in file.read("messages.json").decode().splitlines()]
    metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
    (loss,) = [metric for metric in metrics if metric["metricName"] == "pre-loss"]
    assert (float(loss["metricValue"]), loss["step"], loss["epoch"]) == (0.5, 7, 3)
    assert '"lr"' in json.dumps(lines)


@needs_comet
def test_comet_knows_its_earlier_argument_names(caplog, tmp_path):
    logger = CometLogger(project_name="p", experiment_name="e", offline=True, save_dir=tmp_path)
    assert (logger.name, logger.save_dir) == ("p", str(tmp_path))
    assert "is now called `project`" in caplog.text


# ---------------------------------------------------------------------------------------------------- Lightning AI

# The client needs an account for anything: this one has the functions that are called, and writes down what it is told.
CLIENT = """
class Experiment:
    url = "https://lightning.example/run"

    def __init__(self, options):
        self.calls = [("init", options)]

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, kwargs)) or "path"


opened = []


def init(**options):
    opened.append(Experiment(options))
    return opened[-1]
"""


@pytest.fixture
def litlogger(tmp_path, monkeypatch):
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "litlogger.py").write_text(CLIENT)
    monkeypatch.syspath_prepend(str(tmp_path / "client"))
    monkeypatch.delitem(sys.modules, "litlogger", raising=False)
    is_installed.cache_clear()
    yield importlib.import_module("litlogger")
    sys.modules.pop("litlogger")
    is_installed.cache_clear()


def test_lightning_ai_is_told_numbers_descriptions_files_and_models(litlogger, tmp_path, checkpoints):
    logger = LitLogger(tmp_path / "logs", "trial", "team", {"data": "mnist"}, log_model=True, save_logs=False)
    assert (logger.name, logger.save_dir, logger.root_dir) == ("trial", str(tmp_path / "logs"), str(tmp_path / "logs"))
    assert logger.log_dir == str(tmp_path / "logs" / "trial") and logger.sub_dir is None and logger.version
    assert not litlogger.opened  # nothing is started before it is used
    logger.log_metrics({"loss": torch.tensor(0.5)}, step=3)
    logger.log_hyperparams({"optimizer": {"lr": 0.1}, "layers": [1, 2]}, metrics={"best": 1.0})
    logger.log_metadata(argparse.Namespace(host="here"))
    logger.log_file(tmp_path / "a.txt")
    assert logger.get_file("a.txt", verbose=False) == "path" and logger.url == "https://lightning.example/run"
    with pytest.warns(UserWarning, match="cannot show the graph"):
        logger.log_graph(torch.nn.Linear(1, 1))
    model = torch.nn.Linear(1, 1)
    logger.log_model(model, version="v1")
    logger.save()
    logger.after_save_checkpoint(checkpoints)
    logger.finalize("success")
    [experiment] = litlogger.opened
    start, *calls = experiment.calls
    described = {"data": "mnist", "optimizer/lr": "0.1", "layers": "[1, 2]", "host": "here"}
    options = {"name": "trial", "root_dir": str(tmp_path / "logs"), "teamspace": "team", "metadata": described}
    assert start == ("init", {**options, "store_step": True, "save_logs": False})
    assert calls[0] == ("log_metrics", {"loss": 0.5}, {"step": 3})
    assert calls[1] == ("log_metadata", {"optimizer/lr": "0.1", "layers": "[1, 2]"}, {})
    assert calls[2:4] == [("log_metrics", {"best": 1.0}, {"step": None}), ("log_metadata", {"host": "here"}, {})]
    assert calls[4:6] == [("log_file", str(tmp_path / "a.txt"), {}), ("get_file", "a.txt", {"verbose": False})]
    assert calls[6] == ("log_model", model, {"staging_dir": None, "verbose": False, "version": "v1", "metadata": None})
    sent = {call[1]: call[2]["version"] for call in calls[7:-1]}
    assert sent == {str(tmp_path / "a.ckpt"): "a-best", str(tmp_path / "b.ckpt"): "b"}
    assert calls[-1] == ("finalize", "success", {})


def test_a_run_is_logged_to_lightning_ai(litlogger, tmp_path):
    logger = pickle.loads(pickle.dumps(LitLogger(tmp_path)))
    make_trainer(logger=logger, log_every_n_steps=1, limit_val_batches=0).fit(Regression(), make_loader())
    [experiment] = litlogger.opened
    steps = [call[2]["step"] for call in experiment.calls if call[0] == "log_metrics" and "train_loss" in call[1]]
    assert steps == [0, 1, 2] and experiment.calls[-1][:2] == ("finalize", "success")
    assert ("log_metadata", {"lr": "0.1"}, {}) in experiment.calls
