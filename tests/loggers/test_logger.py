from __future__ import annotations

import argparse
import copy
import enum
import math
import pickle

import pytest
import torch

from fulmen.loggers import Logger
from fulmen.loggers.logger import (
    DummyLogger,
    as_dict,
    flatten_params,
    merge_dicts,
    plain_value,
    rank_zero_experiment,
    write_yaml,
)  # fmt: skip
from fulmen.utilities.rank_zero import rank_zero_only


class ListLogger(Logger):
    """The least that a logger of one's own needs."""

    name, version = "mine", 3

    def __init__(self):
        self.rows, self.saves = [], 0

    @property
    @rank_zero_experiment
    def experiment(self):
        """What users reach for."""
        return self.rows

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.experiment.append((step, metrics))

    def log_hyperparams(self, params):
        pass

    def save(self):
        self.saves += 1


class Color(enum.Enum):
    RED = 1


def test_a_logger_needs_only_its_four_abstract_members():
    assert Logger.__abstractmethods__ == {"name", "version", "log_metrics", "log_hyperparams"}
    logger = ListLogger()
    assert (logger.root_dir, logger.log_dir, logger.save_dir, logger.group_separator) == (None, None, None, "/")
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.after_save_checkpoint(None)
    logger.finalize("success")
    assert logger.saves == 1  # finalize saves


def test_other_ranks_get_an_experiment_that_ignores_everything(monkeypatch):
    logger = ListLogger()
    assert logger.experiment is logger.rows
    assert ListLogger.experiment.__doc__ == "What users reach for."
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert logger.experiment.add_image("x", 1, step=2) is None
    logger.experiment.config["a"] = 1
    assert logger.experiment.config.update({"a": 1}) is None
    logger.experiment["key"] = 1
    logger.experiment[0].anything()
    logger.log_metrics({"a": 1.0}, step=0)
    assert logger.rows == []


def test_the_dummy_logger_swallows_any_call_and_can_be_copied():
    for logger in (DummyLogger(), copy.deepcopy(DummyLogger()), pickle.loads(pickle.dumps(DummyLogger()))):
        logger.log_metrics({"a": 1}, step=1)
        logger.log_hyperparams({"a": 1}, more=2)
        assert logger.log_image("x", [1]) is None
        assert logger.experiment.add_scalar("a", 1) is None
        assert logger[0] is logger
        assert (logger.name, logger.version, logger.save_dir) == ("", "", None)


def test_hyper_parameters_come_as_dictionary_namespace_or_nothing():
    assert as_dict(None) == {}
    assert as_dict(argparse.Namespace(a=1)) == {"a": 1}
    nested = {"a": {"b": 1, "c": argparse.Namespace(d=2)}, 5: [1, {"x": 2}], "empty": {}}
    assert flatten_params(nested) == {"a/b": 1, "a/c/d": 2, "5": [1, {"x": 2}]}


def test_plain_values_keep_numbers_and_name_the_rest():
    assert plain_value(torch.tensor([2.5])) == 2.5
    assert plain_value(Color.RED) == "RED"
    assert plain_value(torch.nn.Linear) == "torch.nn.modules.linear.Linear"
    assert plain_value(torch.nn.functional.gelu).endswith("gelu")
    assert plain_value([1, 2]) == "[1, 2]"
    assert plain_value(torch.ones(2)) == "tensor([1., 1.])"
    assert plain_value(True) is True


def test_hyper_parameters_survive_yaml(tmp_path):
    yaml = pytest.importorskip("yaml")
    np = pytest.importorskip("numpy")
    values = {
        "lr": 1e-5, "big": 1e20, "third": 1 / 3, "whole": 2.0, "inf": math.inf, "minus": -math.inf, "n": -3, "t": True,
        "none": None, "text": "x y: z", "number as text": "1.0", "on": "off", "no": "no", "null text": "null",
        "lines": 'a\n"b"\\ \x07 \u2028 \U0001f600', "unicode": "größe", "empty": "", "tilde": "~", "dash": "-", "date": "2020-01-01",
        "path": "/data/a_b-c.txt", "relative": "./x", "star": "*a", "hash": "a # b", "colon": "a: b", "space": " a ",
        "nested": {"a": 1, "list": [1, [2, 3], {"q": {"r": []}}, "x"], "none": {}}, "list": [], "dict": {},
    }  # fmt: skip
    write_yaml(str(tmp_path / "f.yaml"), values)
    assert yaml.safe_load((tmp_path / "f.yaml").read_text(encoding="utf-8")) == values

    other = {
        "tuple": (1, 2), "set": {1}, "enum": Color.RED, "tensor": torch.tensor(1.5), "class": torch.nn.Linear,
        "np": np.float64(0.1), "npi": np.int64(3), "space": argparse.Namespace(a=1), "dtype": torch.float32,
        "nan": math.nan, 3: "key",
    }  # fmt: skip
    write_yaml(str(tmp_path / "g.yaml"), other)
    read = yaml.safe_load((tmp_path / "g.yaml").read_text(encoding="utf-8"))
    assert math.isnan(read.pop("nan"))
    assert read == {
        "tuple": [1, 2], "set": [1], "enum": "RED", "tensor": 1.5, "class": "torch.nn.modules.linear.Linear",
        "np": 0.1, "npi": 3, "space": {"a": 1}, "dtype": "torch.float32", "3": "key",
    }  # fmt: skip

    write_yaml(str(tmp_path / "h.yaml"), {})
    assert yaml.safe_load((tmp_path / "h.yaml").read_text()) == {}


def test_dictionaries_of_metrics_are_merged_by_name():
    first = {"a": 1.5, "b": 2, "deep": {"x": 1, "y": 3}}
    second = {"a": 0.5, "c": 7, "deep": {"x": 2, "z": 4}}
    merged = merge_dicts([first, second], agg_key_funcs={"a": min, "deep": {"x": sum}})
    assert merged == {"a": 0.5, "b": 2, "c": 7, "deep": {"x": 3, "y": 3, "z": 4}}
    assert merge_dicts([first, second], default_func=max) == {
        **first,
        **second,
        "a": 1.5,
        "deep": {"x": 2, "y": 3, "z": 4},
    }
    assert merge_dicts([{"a": 1}, {"a": 2}]) == {"a": 1.5}
    assert first == {"a": 1.5, "b": 2, "deep": {"x": 1, "y": 3}}


def test_the_experiment_of_a_dummy_accepts_anything():
    experiment = DummyLogger().experiment
    assert experiment.add_scalar("a", 1) is None and experiment[0].anything() is None
