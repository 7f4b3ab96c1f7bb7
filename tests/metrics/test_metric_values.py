"""Metrics that do not give one number, or were never updated: the message names the key, the metric and the way out."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import Regression, make_loader, make_trainer

torchmetrics = pytest.importorskip("torchmetrics")

LABELS = torch.tensor([0, 1]), torch.tensor([0, 2])


class Logs(Regression):
    """Updates one metric per validation batch and logs it."""

    def __init__(self, metric, update, how="log", in_training=False):
        super().__init__()
        self.metric, self.update, self.how, self.in_training = metric, update, how, in_training

    def training_step(self, batch, batch_idx):
        if self.in_training:
            self.update(self.metric)
            self.log("c", self.metric)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if not self.in_training:
            self.update(self.metric)
            self.log("c", self.metric) if self.how == "log" else self.log_dict(self.metric)


def fit(*args, **kwargs):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Logs(*args, **kwargs), make_loader(), make_loader())
    return trainer


def matrix():
    return torchmetrics.classification.MulticlassConfusionMatrix(3)


def per_class():
    return torchmetrics.wrappers.ClasswiseWrapper(torchmetrics.classification.MulticlassAccuracy(3, average=None))


@pytest.mark.parametrize(
    "make, returned",
    [
        (matrix, r"MulticlassConfusionMatrix, must be one number.*tensor of shape \(3, 3\)"),
        (per_class, "ClasswiseWrapper, must be one number.*a dict"),
        (lambda: torchmetrics.classification.MulticlassROC(3, thresholds=2), "MulticlassROC, must be.*a tuple"),
    ],
)
def test_a_metric_of_several_numbers_is_refused_by_its_name_and_shape(make, returned):
    def update(metric):
        labels = LABELS if "ROC" not in type(metric).__name__ else (torch.eye(3)[:2], LABELS[1])
        metric.update(*labels)

    with pytest.raises(ValueError, match=rf"`.compute\(\)` return.*logged as `c`, a {returned}.*self.log_dict"):
        fit(make(), update)


def test_the_same_for_the_value_of_a_step():
    with pytest.raises(ValueError, match="`forward` return of the metric logged as `c`.*must be one number"):
        fit(matrix(), lambda metric: metric(*LABELS), in_training=True)


def test_a_collection_is_for_log_dict_and_a_single_metric_is_not():
    def collection():
        return torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])

    with pytest.raises(ValueError, match=r"self.log\('c', ...\)` received MetricCollection.*self.log_dict"):
        fit(collection(), lambda metric: metric.update(1.0))
    assert fit(collection(), lambda metric: metric.update(1.0), how="log_dict").callback_metrics["SumMetric"] == 3
    with pytest.raises(TypeError, match="`self.log_dict` received ClasswiseWrapper.*mapping from names"):
        fit(per_class(), lambda metric: metric.update(*LABELS), how="log_dict")
    with pytest.raises(ValueError, match=r"received the class `MeanMetric`.*pass `MeanMetric\(...\)`"):
        fit(torchmetrics.MeanMetric, lambda metric: None)


def test_a_metric_without_data_is_named():
    with pytest.warns(UserWarning, match="logged as `c`, a MeanMetric, was never updated"):
        assert fit(torchmetrics.MeanMetric(), lambda metric: None).callback_metrics["c"].isnan()
    with pytest.raises(ValueError, match="logged as `c`, a CatMean, was never updated.*Call `update"):
        fit(CatMean(), lambda metric: None)


class CatMean(torchmetrics.Metric):
    """Fails without data."""

    def __init__(self):
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx="cat")

    def update(self, value):
        self.seen.append(value)

    def compute(self):
        return torch.stack(self.seen).mean()


def test_a_metric_that_was_only_updated_has_no_value_of_the_step():
    with pytest.warns(UserWarning, match="the SumMetric has no value of this step"):
        trainer = fit(torchmetrics.SumMetric(), lambda metric: metric.update(1.0), in_training=True)
    assert "c" not in trainer.callback_metrics and "train_loss" in trainer.callback_metrics


def test_metrics_of_one_number_are_logged_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*workers|The hyper-parameter")
        assert fit(torchmetrics.SumMetric(), lambda m: m(2.0), in_training=True).callback_metrics["c"] == 2
        assert fit(torchmetrics.SumMetric(), lambda m: m.update(2.0)).callback_metrics["c"] == 6
