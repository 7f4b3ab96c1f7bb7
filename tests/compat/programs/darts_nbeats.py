"""`darts`: a model with early stopping and checkpoints of its own, loaded at its best and trained on."""

import glob
import os
import sys

import numpy as np
import pytorch_lightning as pl
from darts.models import NBEATSModel
from darts.utils.timeseries_generation import sine_timeseries
from recording import Recording, print_report


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


def main(folder: str) -> None:
    series = sine_timeseries(length=160, value_frequency=0.05).astype(np.float32)
    train, val = series.split_before(120)
    recorder = Recorder()
    stopping = pl.callbacks.EarlyStopping("val_loss", patience=3)
    model = NBEATSModel(
        input_chunk_length=16,
        output_chunk_length=4,
        num_stacks=2,
        num_blocks=1,
        layer_widths=16,
        n_epochs=4,
        batch_size=16,
        random_state=1,
        model_name="nbeats",
        work_dir=folder,
        save_checkpoints=True,
        force_reset=True,
        pl_trainer_kwargs={"accelerator": "cpu", "callbacks": [recorder, stopping], "enable_progress_bar": False},
    )
    model.fit(train, val_series=val)
    forecast = model.predict(8, series=train).values().flatten()
    best = NBEATSModel.load_from_checkpoint("nbeats", work_dir=folder, best=True, trusted=True)
    at_best = best.predict(8, series=train).values().flatten()
    last = NBEATSModel.load_from_checkpoint("nbeats", work_dir=folder, best=False, trusted=True)
    reloaded = np.allclose(last.predict(8, series=train).values().flatten(), forecast)
    last.fit(train, val_series=val, epochs=6)
    # Two epochs on top. Their numbers are not compared: they are not those of Lightning (see docs/libraries.md).
    reloaded = reloaded and len(last.predict(8, series=train)) == 8
    model.save(os.path.join(folder, "model.pt"))
    reloaded = reloaded and np.allclose(
        NBEATSModel.load(os.path.join(folder, "model.pt"), trusted=True).predict(8, series=train).values().flatten(),
        forecast,
    )
    checkpoints = glob.glob(os.path.join(folder, "**", "*.ckpt"), recursive=True)
    print_report(pl, recorder, checkpoints, reloaded, [*forecast, *at_best])


main(sys.argv[1])
