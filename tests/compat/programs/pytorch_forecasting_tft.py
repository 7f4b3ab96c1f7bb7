"""`pytorch-forecasting`: a temporal fusion transformer on a few series, and its forecast from a checkpoint."""

import sys

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from recording import Recording, print_report


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


def make_frame() -> pd.DataFrame:
    steps = np.arange(60)
    frames = []
    for number in range(4):
        value = 10 + number + np.sin(steps / 4 + number)
        frames.append(pd.DataFrame({"time_idx": steps, "series": str(number), "value": value.astype("float32")}))
    return pd.concat(frames, ignore_index=True)


def list_values(forecast) -> list[float]:
    """The numbers of a tensor, or of a list of them."""
    return [float(value) for part in forecast for value in part.flatten()]


def main(folder: str) -> None:
    pl.seed_everything(1)
    frame = make_frame()
    training = TimeSeriesDataSet(
        frame[frame.time_idx < 50],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=16,
        max_prediction_length=5,
        static_categoricals=["series"],
        time_varying_known_reals=["time_idx"],
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["series"]),
    )
    validation = TimeSeriesDataSet.from_dataset(training, frame, predict=True, stop_randomization=True)
    train_loader = training.to_dataloader(train=True, batch_size=16, num_workers=0)
    val_loader = validation.to_dataloader(train=False, batch_size=16, num_workers=0)
    recorder = Recorder()
    checkpoint = pl.callbacks.ModelCheckpoint(folder, monitor="val_loss")
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        gradient_clip_val=0.1,
        callbacks=[recorder, checkpoint, pl.callbacks.EarlyStopping("val_loss"), pl.callbacks.LearningRateMonitor()],
        default_root_dir=folder,
        enable_progress_bar=False,
    )
    model = TemporalFusionTransformer.from_dataset(
        training,
        learning_rate=0.03,
        hidden_size=8,
        attention_head_size=1,
        hidden_continuous_size=4,
        loss=QuantileLoss(),
    )
    trainer.fit(model, train_loader, val_loader)
    best = TemporalFusionTransformer.load_from_checkpoint(checkpoint.best_model_path, weights_only=False)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    forecast = list_values(best.predict(val_loader, trainer_kwargs=quiet))
    again = TemporalFusionTransformer.load_from_checkpoint(checkpoint.best_model_path, weights_only=False)
    repeated = list_values(again.predict(val_loader, trainer_kwargs=quiet))
    reloaded = len(forecast) == 4 * 5 and torch.allclose(torch.tensor(repeated), torch.tensor(forecast), rtol=1e-4)
    result = [trainer.callback_metrics["val_loss"], *forecast]
    print_report(pl, recorder, [checkpoint.best_model_path], reloaded, result)


main(sys.argv[1])
