"""What a user can get wrong: each is refused before the first training step, by name, with the way out."""

from __future__ import annotations

import zipfile

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.utils.data import DataLoader

import fulmen as pl
from fulmen.callbacks import Callback, EarlyStopping, ModelCheckpoint
from fulmen.storage.checkpoint_io import DamagedCheckpointError
from fulmen.utilities.errors import MisconfigurationException


def fit(model, train=None, val=None, **kwargs):
    trainer = make_trainer(**kwargs)
    trainer.fit(model, make_loader() if train is None else train, val)
    return trainer


class Bare(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)


def with_method(**methods):
    """A `Regression` with some methods replaced."""
    return type("Changed", (Regression,), methods)()


def returning(value):
    return with_method(training_step=lambda self, batch, batch_idx: value(self, batch))


def optimizing(value):
    return with_method(configure_optimizers=lambda self: value(self))


# ---------------------------------------------------------------------- what is missing


def test_no_training_step():
    with pytest.raises(MisconfigurationException, match=r"No `training_step\(\)` method defined in Bare"):
        fit(Bare())


def test_no_configure_optimizers():
    model = type("NoOptimizer", (Bare,), {"training_step": lambda self, batch, batch_idx: None})()
    with pytest.raises(MisconfigurationException, match="configure_optimizers.*Define"):
        fit(model)


def test_configure_optimizers_returning_none_warns_and_trains_nothing(model):
    model.configure_optimizers = lambda: None
    before = model.layer.weight.clone()
    with pytest.warns(UserWarning, match="no optimizer"):
        trainer = fit(model)
    assert torch.equal(model.layer.weight, before) and trainer.global_step == 3


@pytest.mark.parametrize("verb, step", [("validate", "validation_step"), ("test", "test_step")])
def test_no_evaluation_step(verb, step):
    with pytest.raises(MisconfigurationException, match=f"`{step}"):
        getattr(make_trainer(), verb)(Bare(), make_loader())


@pytest.mark.parametrize(
    "verb, kind", [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")]
)
def test_no_loader(model, verb, kind):
    with pytest.raises(MisconfigurationException, match=rf"`Trainer.{verb}` has no batches.*`{kind}_dataloader"):
        getattr(make_trainer(), verb)(model)


def test_no_model():
    with pytest.raises(TypeError, match="requires a `LightningModule`"):
        make_trainer().test(dataloaders=make_loader())


@pytest.mark.parametrize("not_a_model", [torch.nn.Linear(1, 1), "model", None, Regression])
def test_not_a_lightning_module(not_a_model):
    with pytest.raises(TypeError, match="requires a `LightningModule`, got"):
        fit(not_a_model)


# ---------------------------------------------------------------------- loaders


@pytest.mark.parametrize("loader", [5, 0.5])
def test_not_a_loader(model, loader):
    with pytest.raises(TypeError, match="train_dataloaders"):
        fit(model, loader)


def test_loader_of_length_zero_warns_and_trains_nothing(model):
    with pytest.warns(UserWarning, match="length|no batches|0"):
        trainer = fit(model, DataLoader([]))
    assert trainer.global_step == 0


def test_loaders_beside_a_datamodule(model):
    with pytest.raises(MisconfigurationException, match="datamodule.*at the same time"):
        make_trainer().fit(model, make_loader(), datamodule=pl.LightningDataModule())


def test_validation_interval_longer_than_the_epoch(model):
    with pytest.raises(
        ValueError, match=r"val_check_interval=9.*less than or equal to the number of training batches.*\(3\)"
    ):
        fit(model, val=make_loader(), val_check_interval=9)


def test_several_loaders_and_a_step_that_cannot_tell_them_apart(model):
    with pytest.raises(RuntimeError, match="dataloader_idx"):
        make_trainer().validate(model, [make_loader(), make_loader()])


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("trainig_step", "training_step"), ("on_train_epoch_ends", "on_train_epoch_end"),
        ("configure_optimizer", "configure_optimizers"), ("validation_stp", "validation_step"),
        ("on_validation_epoch_edn", "on_validation_epoch_end"),
    ],
)  # fmt: skip
def test_misspelt_hook_of_a_module(wrong, right):
    class Plain(Bare):
        training_step = Regression.training_step
        configure_optimizers = Regression.configure_optimizers

    if hasattr(Plain, right) and right in vars(Plain):
        delattr(Plain, right)
    setattr(Plain, wrong, lambda self, *args: None)
    with pytest.raises(MisconfigurationException, match=f"{wrong}.*Did you mean `{right}`"):
        fit(Plain())


def test_misspelt_hook_of_a_callback(model):
    class Watch(Callback):
        def on_train_bach_end(self, trainer, pl_module, outputs, batch, batch_idx): ...

    with pytest.raises(MisconfigurationException, match="Did you mean `on_train_batch_end`"):
        fit(model, callbacks=[Watch()])


def test_methods_of_the_users_own_are_left_alone(model):
    type(model).on_my_own_event = lambda self: None
    type(model).validation_steps = lambda self: None  # the hook itself is there: this is no misspelling
    try:
        fit(model)
    finally:
        del type(model).on_my_own_event, type(model).validation_steps


@pytest.mark.parametrize(
    "callback", [EarlyStopping("val_los"), ModelCheckpoint(monitor="val_los")], ids=["stop", "save"]
)
def test_misspelt_monitor(model, callback):
    kwargs = {"enable_checkpointing": True} if isinstance(callback, ModelCheckpoint) else {}
    with pytest.raises((RuntimeError, MisconfigurationException), match="val_los.*val_loss"):
        fit(model, val=make_loader(), callbacks=[callback], **kwargs)


@pytest.mark.parametrize("name", ["training_epoch_end", "validation_epoch_end", "test_epoch_end"])
def test_removed_hooks(name):
    with pytest.raises(NotImplementedError, match=f"{name}.*on_"):
        fit(with_method(**{name: lambda self, outputs: None}))


def test_optimizer_idx():
    model = with_method(training_step=lambda self, batch, batch_idx, optimizer_idx: None)
    with pytest.raises(RuntimeError, match="optimizer_idx"):
        fit(model)


# ---------------------------------------------------------------------- what training_step returns


@pytest.mark.parametrize(
    "value, words",
    [
        (lambda self, batch: 1.5, "returned a float"),
        (lambda self, batch: "loss", "returned a str"),
        (lambda self, batch: [self.loss(batch)], "returned a list"),
        (lambda self, batch: {"los": self.loss(batch)}, "without the key 'loss'.*los"),
        (lambda self, batch: self.loss(batch).detach(), "without gradient"),
        (lambda self, batch: self(batch[0]), r"shape \(4, 1\)"),
        (lambda self, batch: {"loss": 3.0}, "float instead of a tensor"),
        (lambda self, batch: torch.ones((), dtype=torch.int64), "int64"),
    ],
)
def test_wrong_return_of_training_step(value, words):
    model = returning(value)
    before = model.layer.weight.clone()
    with pytest.raises(MisconfigurationException, match=words):
        fit(model)
    assert torch.equal(model.layer.weight, before)


def test_none_from_training_step_warns_once(recwarn):
    trainer = fit(returning(lambda self, batch: None if self.global_step else self.loss(batch)))
    assert trainer.global_step == 3
    assert sum("returned `None`" in str(w.message) for w in recwarn) <= 1


# ---------------------------------------------------------------------- optimizers


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def scheduled(model, **config):
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}


@pytest.mark.parametrize(
    "answer, error, words",
    [
        (lambda m: torch.optim.SGD([{"params": []}], lr=1), MisconfigurationException, "SGD.*no parameters"),
        (lambda m: 3, MisconfigurationException, "Unknown configuration: `configure_optimizers` returned 3"),
        (lambda m: {"optimiser": sgd(m)}, MisconfigurationException, "'optimizer' is missing"),
        (lambda m: [sgd(m), sgd(m)], RuntimeError, "2 optimizers.*manual optimization"),
        (lambda m: scheduled(m, interval="stepp"), MisconfigurationException, "'stepp'.*Did you mean `step`"),
        (
            lambda m: {"optimizer": sgd(m), "lr_scheduler": {"interval": "step"}},
            MisconfigurationException,
            "without the key 'scheduler'",
        ),
        (
            lambda m: ([(o := sgd(m))], [torch.optim.lr_scheduler.ReduceLROnPlateau(o)]),
            MisconfigurationException,
            "without a `monitor`",
        ),
        (
            lambda m: ([sgd(m)], [torch.optim.lr_scheduler.StepLR(sgd(m), 1)]),
            MisconfigurationException,
            "did not return",
        ),
    ],
)
def test_wrong_optimizers(answer, error, words):
    with pytest.raises(error, match=words):
        fit(optimizing(answer))


def test_unknown_scheduler_keys_warn_with_the_nearest(model):
    model = optimizing(lambda m: scheduled(m, freqency=2))
    with pytest.warns(RuntimeWarning, match="freqency.*Did you mean `frequency`"):
        fit(model)


def test_unknown_outer_keys_warn(model):
    model = optimizing(lambda m: {**scheduled(m), "lr_schduler": None})
    with pytest.warns(RuntimeWarning, match="Did you mean `lr_scheduler`"):
        fit(model)


def test_optimizer_step_that_never_runs_the_closure():
    model = with_method(optimizer_step=lambda self, *args, **kwargs: None)
    with pytest.raises(MisconfigurationException, match="did not run the closure"):
        fit(model)


@pytest.mark.parametrize("kwargs", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}], ids=str)
def test_manual_optimization_refuses_what_it_cannot_do(model, kwargs):
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(model, **kwargs)


def test_manual_backward_with_automatic_optimization():
    model = with_method(training_step=lambda self, batch, batch_idx: self.manual_backward(self.loss(batch)))
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        fit(model)


# ---------------------------------------------------------------------- logging


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_fit_end", "on_train_end", "configure_optimizers", "teardown"]
)
def test_log_outside_its_hooks(hook):
    def log(self, *args):
        self.log("x", 1.0)
        return sgd(self)

    with pytest.raises(MisconfigurationException, match=rf"can't `self.log\('x', ...\)` inside `{hook}`"):
        fit(with_method(**{hook: log}))


def test_log_in_predict(model):
    model = with_method(predict_step=lambda self, batch, batch_idx: self.log("x", 1.0))
    with pytest.raises(MisconfigurationException, match="predict_step"):
        make_trainer().predict(model, make_loader())


@pytest.mark.parametrize(
    "value, words",
    [
        ("text", "str values cannot be logged"), ([1.0], "list"), ({"a": 1.0}, "dict"),
        (torch.ones(3), r"shape \(3,\).*mean"), (None, "NoneType"),
    ],
)  # fmt: skip
def test_log_of_something_that_is_no_number(value, words):
    model = with_method(on_train_batch_start=lambda self, batch, batch_idx: self.log("x", value))
    before = model.layer.weight.clone()
    with pytest.raises(ValueError, match=words):
        fit(model)
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"on_step": False, "on_epoch": False}, "is not useful"), ({"reduce_fx": "meen"}, "Did you mean `mean`"),
        ({"reduce_fx": torch.median}, "not known"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_log(kwargs, words):
    model = with_method(on_train_batch_start=lambda self, batch, batch_idx: self.log("x", 1.0, **kwargs))
    with pytest.raises(MisconfigurationException, match=words):
        fit(model)


def test_on_step_in_an_epoch_hook():
    model = with_method(on_train_epoch_start=lambda self: self.log("x", 1.0, on_step=True))
    with pytest.raises(MisconfigurationException, match="on_step=True"):
        fit(model)


def test_same_name_with_other_arguments():
    def start(self, batch, batch_idx):
        self.log("x", 1.0)
        self.log("x", 1.0, prog_bar=True)

    with pytest.raises(MisconfigurationException, match="twice"):
        fit(with_method(on_train_batch_start=start))


# ---------------------------------------------------------------------- checkpoints


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.ckpt"
    if kind == "missing":
        return path
    trainer = fit(Regression())
    trainer.save_checkpoint(path)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "number":
        torch.save(3, path)
    elif kind == "weights of a plain module":
        torch.save(torch.nn.Linear(4, 1).state_dict(), path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "b")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "future":
        later = torch.load(path)
        later["fulmen"]["version"] = 99
        torch.save(later, path)
    elif kind == "other model":
        changed = torch.load(path)
        changed["state_dict"] = {"encoder.weight": torch.ones(1)}
        torch.save(changed, path)
    return path


@pytest.mark.parametrize(
    "kind, error",
    [
        ("missing", FileNotFoundError), ("truncated", RuntimeError), ("empty", RuntimeError), ("text", RuntimeError),
        ("list", TypeError), ("number", TypeError), ("weights of a plain module", KeyError),
        ("zip", DamagedCheckpointError), ("folder", IsADirectoryError), ("future", ValueError),
        ("other model", RuntimeError),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(tmp_path, kind, error):
    path = damaged(tmp_path, kind)
    model = Regression()
    before = model.layer.weight.clone()
    with pytest.raises(error, match=path.name):
        make_trainer(max_epochs=2).fit(model, make_loader(), ckpt_path=path)
    assert torch.equal(model.layer.weight, before)


def test_a_damaged_file_names_the_newest_good_one_beside_it(tmp_path):
    bad = damaged(tmp_path, "truncated")
    fit(Regression()).save_checkpoint(tmp_path / "good.ckpt")
    for verb in ("fit", "validate", "test", "predict"):
        with pytest.raises(DamagedCheckpointError, match=r"truncated\.ckpt.*good one beside it is .*good\.ckpt"):
            getattr(make_trainer(max_epochs=2), verb)(Regression(), make_loader(), ckpt_path=bad)


def test_best_without_a_monitor_is_the_newest(tmp_path):
    callback = ModelCheckpoint(tmp_path)
    trainer = make_trainer(max_epochs=2, callbacks=callback, enable_checkpointing=True)
    trainer.fit(Regression(), make_loader(), make_loader())
    trainer.validate(ckpt_path="best", dataloaders=make_loader(), verbose=False)
    assert trainer.ckpt_path == str(tmp_path / "epoch=1-step=6.ckpt")


@pytest.mark.parametrize("name", ["best", "hpc"])
def test_names_without_a_file(model, name):
    with pytest.raises(ValueError, match=name):
        make_trainer().fit(model, make_loader(), ckpt_path=name)


def test_save_without_a_model(tmp_path):
    with pytest.raises(AttributeError, match="attached"):
        make_trainer().save_checkpoint(tmp_path / "x.ckpt")


def test_nothing_is_lost_when_training_fails(tmp_path):
    """The last good checkpoint and the log stay, and say what happened before the error."""

    def step(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            raise ValueError("boom")
        return Regression.training_step(self, batch, batch_idx)

    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(max_epochs=3, logger=logger, enable_checkpointing=True, log_every_n_steps=1)
    with pytest.raises(ValueError, match="boom"):
        trainer.fit(with_method(training_step=step), make_loader(), make_loader(8))
    saved = trainer.checkpoint_callback.best_model_path
    assert torch.load(saved, weights_only=True)["global_step"] == 3
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len([row for row in rows[1:] if row]) >= 4
    assert trainer.interrupted
