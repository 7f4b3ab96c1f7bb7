"""`gluonts`: two estimators of its torch models, a forecast, and a predictor saved and loaded."""

import glob
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch import DeepAREstimator, SimpleFeedForwardEstimator
from recording import Recording, print_report


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


def main(folder: str) -> None:
    pl.seed_everything(1)
    series = [
        {"start": pd.Period("2020-01-01", freq="D"), "target": (10 + n + np.sin(np.arange(100) / 4)).astype("float32")}
        for n in range(3)
    ]
    data = ListDataset(series, freq="D")
    recorder = Recorder()
    common = {"accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False, "default_root_dir": folder}
    deepar = DeepAREstimator(
        freq="D",
        prediction_length=7,
        num_layers=1,
        hidden_size=8,
        num_batches_per_epoch=15,
        trainer_kwargs={**common, "callbacks": [recorder], "logger": True},
    )
    predictor = deepar.train(data, validation_data=data)
    feed_forward = SimpleFeedForwardEstimator(
        prediction_length=7, num_batches_per_epoch=10, trainer_kwargs={**common, "logger": False}
    )
    plain = feed_forward.train(data)
    means = np.concatenate([forecast.mean for forecast in plain.predict(data)])
    where = Path(folder) / "predictor"
    where.mkdir()
    plain.serialize(where)
    again = np.concatenate([forecast.mean for forecast in Predictor.deserialize(where).predict(data)])
    samples = next(iter(predictor.predict(data))).samples.shape
    checkpoints = glob.glob(os.path.join(folder, "**", "*.ckpt"), recursive=True)
    reloaded = means.shape == again.shape and samples == (100, 7)
    print_report(pl, recorder, checkpoints, reloaded, recorder.losses)


main(sys.argv[1])
