from __future__ import annotations

import glob
import os
import pickle
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.loggers import TensorBoardLogger
from fulmen.utilities.rank_zero import rank_zero_only

pytest.importorskip("tensorboard")


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars_of(folder):
    events = events_of(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hparam_summaries_of(folder):
    from tensorboard.plugins.hparams import plugin_data_pb2

    metadata = events_of(folder).summary_metadata
    return {
        tag: plugin_data_pb2.HParamsPluginData.FromString(summary.plugin_data.content)
        for tag, summary in metadata.items()
        if summary.plugin_data.plugin_name == "hparams"
    }


def test_directories_follow_name_version_and_sub_dir(tmp_path):
    logger = TensorBoardLogger(tmp_path, sub_dir="sub", version=3)
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_3" / "sub")
    assert (logger.root_dir, logger.sub_dir) == (str(tmp_path / "lightning_logs"), "sub")
    assert TensorBoardLogger(tmp_path, name=None).log_dir == str(tmp_path / "version_0")
    assert TensorBoardLogger(tmp_path, name="", version="x").log_dir == str(tmp_path / "x")


def test_home_and_environment_variables_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs")
    logger = TensorBoardLogger("~/$RUNS")
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert logger.log_dir == str(tmp_path / "runs" / "lightning_logs" / "version_0")
    assert scalars_of(logger.log_dir) == {"a": [(0, 1.0)]}
    assert TensorBoardLogger("~/$RUNS").version == 1


def test_metrics_reach_the_event_file(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="p")
    logger.log_metrics({"a": 1.0, "b": torch.tensor(2.0)}, step=3)
    logger.log_metrics({"a": 4, "several": {"x": 1.0, "y": 2.0}}, step=5)
    logger.save()
    logger.finalize("success")
    assert scalars_of(logger.log_dir) == {"p-a": [(3, 1.0), (5, 4.0)], "p-b": [(3, 2.0)]}
    assert scalars_of(os.path.join(logger.log_dir, "p-several_x")) == {"p-several": [(5, 1.0)]}


def test_what_cannot_be_drawn_is_an_error_that_names_it(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(ValueError, match="`word` is a `str`"):
        logger.log_metrics({"word": "text"}, 0)


def test_metrics_logged_after_the_end_are_kept_too(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"a": 2.0}, 1)
    logger.finalize("success")
    values = [pair for file in glob.glob(f"{logger.log_dir}/events*") for pair in scalars_of(file)["a"]]
    assert sorted(values) == [(0, 1.0), (1, 2.0)]


def test_events_are_visible_soon_after_the_first_save(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert scalars_of(logger.log_dir) == {"a": [(0, 1.0)]}
    logger.finalize("success")


def test_hyper_parameters_make_a_table_and_a_file(tmp_path):
    yaml = pytest.importorskip("yaml")
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"layers": [1, 2], "act": torch.relu}, "none": None})
    logger.save()
    logger.finalize("success")
    start = hparam_summaries_of(logger.log_dir)["_hparams_/session_start_info"].session_start_info
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["net/layers"].string_value == "[1, 2]"
    assert start.hparams["none"].string_value == "None"
    assert scalars_of(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    with open(os.path.join(logger.log_dir, "hparams.yaml")) as file:
        stored = yaml.safe_load(file)
    assert stored["net"]["layers"] == [1, 2]
    assert logger.hparams["lr"] == 0.1


def test_the_metric_of_the_table_can_be_given_or_left_out(tmp_path):
    given = TensorBoardLogger(tmp_path, version="given")
    given.log_hyperparams({"a": 1}, metrics={"m": 0.5}, step=2)
    given.log_hyperparams({"b": 1}, metrics=0.7)
    given.finalize("success")
    assert scalars_of(given.log_dir) == {"m": [(2, 0.5)], "hp_metric": [(0, pytest.approx(0.7))]}
    assert given.hparams == {"a": 1, "b": 1}

    none = TensorBoardLogger(tmp_path, version="none", default_hp_metric=False)
    none.log_hyperparams({"a": 1})
    none.save()
    none.finalize("success")
    assert hparam_summaries_of(none.log_dir) == {}
    assert scalars_of(none.log_dir) == {}


def test_the_hparams_file_exists_even_when_empty_and_is_kept_when_resumed(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.save()
    file = os.path.join(logger.log_dir, "hparams.yaml")
    assert Path(file).read_text() == "{}\n"
    logger.log_hyperparams({"a": 1})
    logger.save()
    assert Path(file).read_text() == "a: 1\n"
    logger.finalize("success")

    again = TensorBoardLogger(tmp_path, version=0)
    again.save()
    again.finalize("success")
    assert Path(file).read_text() == "a: 1\n"


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_the_graph_is_drawn_from_the_example_input(tmp_path):
    model = torch.nn.Linear(2, 1)
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(UserWarning, match="graph of the model was not logged.*`NoneType`"):
        logger.log_graph(model)
    logger.log_graph(model, torch.ones(1, 2))
    logger.finalize("success")
    assert events_of(logger.log_dir).Tags()["graph"]

    off = TensorBoardLogger(tmp_path)
    off.log_graph(model, torch.ones(1, 2))
    assert not os.path.exists(off.log_dir)


def test_writer_options_are_passed_on_and_the_logger_pickles(tmp_path):
    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine")
    logger.experiment.add_text("note", "hello")
    copy = pickle.loads(pickle.dumps(logger))
    assert copy.log_dir == logger.log_dir
    logger.finalize("success")
    assert [name for name in os.listdir(logger.log_dir) if name.endswith(".mine")]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    logger.experiment.add_image("x", None)
    logger.save()
    logger.finalize("success")
    assert not any(tmp_path.iterdir())


def test_the_metric_of_the_table_stays_when_other_verbs_run_and_when_the_run_is_opened_again(tmp_path):
    class Model(Regression):
        def on_train_epoch_end(self):
            self.log("hp_metric", 0.25)

    for _ in range(2):
        logger, model = TensorBoardLogger(tmp_path, version=0), Model()
        trainer = make_trainer(max_epochs=1, logger=logger)
        trainer.fit(model, make_loader())
        trainer.test(model, make_loader(), verbose=False)
        assert scalars_of(logger.log_dir)["hp_metric"][-1][1] == 0.25
    again = TensorBoardLogger(tmp_path, version=0)
    make_trainer(logger=again).test(model, make_loader(), verbose=False)
    assert scalars_of(again.log_dir)["hp_metric"][-1][1] == 0.25
