"""`neuralforecast`: models fitted and cross-validated by its own trainer arguments, saved and loaded."""

import os
import sys

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM, NHITS
from recording import Recording, print_report


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


def make_frame() -> pd.DataFrame:
    dates = pd.date_range("2020-01-01", periods=72, freq="MS")
    frames = []
    for number in range(3):
        value = 10 + number + np.sin(np.arange(72) / 3 + number)
        frames.append(pd.DataFrame({"unique_id": str(number), "ds": dates, "y": value}))
    return pd.concat(frames, ignore_index=True)


def main(folder: str) -> None:
    common = {
        "h": 6,
        "input_size": 18,
        "max_steps": 30,
        "val_check_steps": 10,
        "early_stop_patience_steps": 3,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "logger": False,
    }
    models = [
        NHITS(**common, mlp_units=[[32, 32]] * 3, callbacks=[Recorder()], enable_checkpointing=False),
        LSTM(**common, encoder_hidden_size=8, decoder_hidden_size=8),
    ]
    forecast = NeuralForecast(models=models, freq="MS")
    frame = make_frame()
    os.chdir(folder)
    forecast.fit(frame, val_size=6)
    predicted = forecast.predict()[["NHITS", "LSTM"]].to_numpy()
    # The library trains copies of the models, and so of their callbacks.
    recorder = next(each for each in forecast.models[0].trainer_kwargs["callbacks"] if isinstance(each, Recorder))
    forecast.save(os.path.join(folder, "saved"), overwrite=True, save_dataset=True)
    loaded = NeuralForecast.load(os.path.join(folder, "saved"))
    again = loaded.predict()[["NHITS", "LSTM"]].to_numpy()
    reloaded = np.allclose(again, predicted)
    checkpoints = [
        os.path.join(folder, "saved", each) for each in os.listdir("saved") if each.endswith((".ckpt", ".safetensors"))
    ]
    print_report(pl, recorder, checkpoints, reloaded, predicted.flatten().tolist())


main(sys.argv[1])
