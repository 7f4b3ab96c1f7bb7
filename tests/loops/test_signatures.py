"""Steps and hooks get what their signatures say, by position or by name; what cannot be called is refused at once."""

from __future__ import annotations

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.utils.data import IterableDataset

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException


class OnlyByName(Regression):
    def __init__(self):
        super().__init__()
        self.got = []

    def setup(self, *, stage):
        self.got.append(("setup", stage.value))

    def training_step(self, batch, *, batch_idx):
        self.got.append(("train", batch_idx))
        return self.loss(batch)

    def on_train_batch_end(self, outputs, *, batch, batch_idx):
        self.got.append(("end", batch_idx))
        assert len(batch) == 2

    def validation_step(self, batch, **kwargs):
        self.got.append(("validate", kwargs))

    def on_validation_batch_start(self, batch, batch_idx, **kwargs):
        self.got.append(("start", batch_idx, kwargs))

    def on_validation_batch_end(self, *args, **kwargs):
        self.got.append(("args", len(args), kwargs))


class Listens(pl.Callback):
    def __init__(self):
        self.got = []

    def on_train_batch_start(self, trainer, *, pl_module, batch, batch_idx):
        self.got.append((type(pl_module).__name__, batch_idx))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, **kwargs):
        self.got.append(kwargs)


class Data(pl.LightningDataModule):
    def setup(self, *, stage):
        self.stage = stage.value

    def teardown(self, *, stage):
        self.ended = stage.value

    def train_dataloader(self):
        return make_loader(4)


def test_what_is_taken_by_name_only_is_passed_by_name():
    model, callback = OnlyByName(), Listens()
    make_trainer(callbacks=[callback]).fit(model, make_loader(4), make_loader(4))
    assert model.got == [
        ("setup", "fit"), ("train", 0), ("end", 0), ("start", 0, {}), ("validate", {"batch_idx": 0}), ("args", 3, {}),
    ]  # fmt: skip
    assert callback.got == [("OnlyByName", 0), {}]
    data = Data()
    make_trainer(limit_val_batches=0).fit(Regression(), data)
    assert data.stage == data.ended == "fit"


def test_with_several_loaders_keyword_arguments_say_which_one():
    model, callback = OnlyByName(), Listens()
    make_trainer(callbacks=[callback]).validate(model, [make_loader(4), make_loader(4)], verbose=False)
    for index in range(2):
        assert ("start", 0, {"dataloader_idx": index}) in model.got
        assert ("validate", {"batch_idx": 0, "dataloader_idx": index}) in model.got
    assert model.got.count(("args", 4, {})) == 2
    assert callback.got == [{"dataloader_idx": 0}, {"dataloader_idx": 1}]


def test_a_step_without_the_argument_is_refused_in_the_words_of_the_api():
    with pytest.raises(RuntimeError, match="no `dataloader_idx` argument in `Regression.validation_step`"):
        make_trainer().validate(Regression(), [make_loader(4), make_loader(4)])


def module_with(name, method):
    return type("Wrong", (Regression,), {name: method})()


@pytest.mark.parametrize(
    ("name", "method", "right"),
    [
        ("training_step", lambda self: None, "def training_step(self, batch, batch_idx)"),
        ("training_step", lambda self, a, b, c: None, "def training_step(self, batch, batch_idx)"),
        ("validation_step", lambda self: None, "def validation_step(self, batch, batch_idx, dataloader_idx=0)"),
        ("on_validation_epoch_end", lambda self, outputs: None, "def on_validation_epoch_end(self)"),
        ("on_train_epoch_end", lambda self, outputs: None, "def on_train_epoch_end(self)"),
        ("on_train_batch_end", lambda self, outputs, batch: None, "def on_train_batch_end(self, outputs, batch, batch_idx)"),
        ("on_before_optimizer_step", lambda self, optimizer, idx: None, "def on_before_optimizer_step(self, optimizer)"),
        ("setup", lambda self: None, "def setup(self, stage)"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_before_anything_runs(name, method, right):
    model = module_with(name, method)
    model.prepare_data = lambda: pytest.fail("something has run")
    with pytest.raises(TypeError) as caught:
        make_trainer().fit(model, make_loader(), make_loader())
    assert f"`Wrong.{name}" in str(caught.value) and right in str(caught.value)


def test_a_callback_that_cannot_be_called_is_refused_as_well():
    class Wrong(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module):
            pass

    with pytest.raises(
        TypeError, match=r"def on_train_batch_end\(self, trainer, pl_module, outputs, batch, batch_idx\)"
    ):
        make_trainer(callbacks=[Wrong()]).fit(Regression(), make_loader())


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_signatures_of_every_accepted_kind_run(verb):
    class Any(Regression):
        def training_step(self, *args, **kwargs):
            return self.loss(args[0])

        def validation_step(self, data):
            return self.loss(data)

        test_step = predict_step = validation_step

        def on_validation_batch_start(self, *_, **__):
            pass

        def on_train_batch_start(self, b, i, more=None):
            pass

    loaders = (make_loader(), make_loader()) if verb == "fit" else (make_loader(),)
    getattr(make_trainer(), verb)(Any(), *loaders)


# ---------------------------------------------------------------------- a step that pulls batches itself


class Pulls(Regression):
    def __init__(self, count=1):
        super().__init__()
        self.got, self.hooks, self.count = [], [], count

    def pull(self, dataloader_iter):
        self.got.append(next(dataloader_iter))

    validation_step = test_step = predict_step = pull

    def training_step(self, dataloader_iter):
        pulled = [next(dataloader_iter)[0] for _ in range(self.count)]
        self.got.append(pulled)
        return self.layer(torch.full((1, 4), float(sum(pulled)))).sum()

    def on_train_batch_start(self, batch, batch_idx):
        self.hooks.append(("start", batch, batch_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.hooks.append(("end", batch, batch_idx))

    def on_test_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.hooks.append(("start", batch, batch_idx, dataloader_idx))

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.hooks.append(("end", batch, batch_idx, dataloader_idx))


@pytest.mark.filterwarnings("ignore:.predict_step. returned")
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_steps_pull_batches(verb):
    one, two = Pulls(), Pulls()
    getattr(make_trainer(), verb)(one, [5, 6, 7])
    assert one.got == [(5, 0, 0), (6, 1, 0), (7, 2, 0)]
    getattr(make_trainer(), verb)(two, {"a": [0, 1], "b": [2, 3]})
    assert two.got == [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
    if verb == "test":
        assert [args for args in one.hooks if args[0] == "end"] == [
            ("end", 5, 0, 0),
            ("end", 6, 1, 0),
            ("end", 7, 2, 0),
        ]
        assert [args[1:] for args in two.hooks if args[0] == "end"] == two.got


class PullsByName(Pulls):
    def pull(self, *, dataloader_iter):
        self.got.append(next(dataloader_iter))

    validation_step = test_step = predict_step = pull

    def training_step(self, *, dataloader_iter):
        return super().training_step(dataloader_iter)


@pytest.mark.filterwarnings("ignore:.predict_step. returned")
def test_the_iterator_is_passed_by_name_where_a_step_asks_for_that():
    model = PullsByName()
    for verb in ("validate", "test", "predict"):
        getattr(make_trainer(), verb)(model, {"a": [0], "b": [2]})
    make_trainer(limit_val_batches=0).fit(model, [3, 4])
    assert model.got == [(0, 0, 0), (2, 0, 1)] * 3 + [[3], [4]]


def test_hooks_of_training_get_the_batch_that_was_pulled_last():
    model = Pulls()
    make_trainer(limit_val_batches=0).fit(model, [3, 4])
    assert model.hooks == [("start", None, 0), ("end", 3, 0), ("start", 3, 0), ("end", 4, 1)]


def test_data_that_ends_inside_of_a_step_end_the_epoch():
    model = Pulls(count=2)
    validated = []
    model.on_validation_start = lambda: validated.append(model.global_step)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, [1, 2, 3, 4, 5], [1])
    assert trainer.global_step == 4 and trainer.current_epoch == 2
    assert [pulled for pulled in model.got if isinstance(pulled, list)] == [[1, 2], [3, 4]] * 2
    assert validated == [2, 4]


def test_an_iterator_of_the_users_own_that_ends_is_said():
    class Own(Regression):
        def on_train_epoch_start(self):
            self.own = iter(range(2))

        def training_step(self, batch, batch_idx):
            next(self.own)
            return self.loss(batch)

    trainer = make_trainer(max_epochs=2)
    with pytest.warns(UserWarning, match="`Own.training_step` raised StopIteration: epoch 0 ends"):
        trainer.fit(Own(), make_loader(16))
    assert trainer.global_step == 4


# ---------------------------------------------------------------------- what is given and given back


@pytest.mark.parametrize("where", ["train", "val", "a list", "a datamodule", "a hook", "test", "predict"])
def test_a_dataset_in_the_place_of_a_loader_is_refused_with_the_fix(where):
    dataset, model, trainer = make_loader().dataset, Regression(), make_trainer()

    class Holds(pl.LightningDataModule):
        def train_dataloader(self):
            return dataset

    with pytest.raises(TypeError, match=r"A `Dataset` \(`TensorDataset`\).*DataLoader\(dataset, batch_size=\.\.\.\)"):
        if where in ("test", "predict"):
            getattr(trainer, where)(model, dataset)
        elif where == "val":
            trainer.fit(model, make_loader(), dataset)
        elif where == "a datamodule":
            trainer.fit(model, Holds())
        elif where == "a hook":
            model.train_dataloader = lambda: {"a": [dataset]}
            trainer.fit(model)
        else:
            trainer.fit(model, dataset if where == "train" else [make_loader(), dataset])


class Forgets(Regression):
    def training_step(self, batch, batch_idx):
        self.loss(batch)


class ForgetsDeep(Regression):
    def training_step(self, batch, batch_idx):
        return self.shared(batch)

    def shared(self, batch):
        self.loss(batch)


class Sometimes(Regression):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) if batch_idx > 1 else None


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", [Forgets, ForgetsDeep])
def test_a_step_that_never_returns_a_loss_is_an_error(kind, window):
    trainer = make_trainer(accumulate_grad_batches=window, limit_val_batches=0, max_epochs=3)
    with pytest.raises(
        MisconfigurationException, match=f"`{kind.__name__}.training_step` returned `None`.*`return loss`"
    ):
        trainer.fit(kind(), make_loader(16))
    assert trainer.current_epoch == 0
    if kind is Forgets:
        assert trainer.fit_loop.progress.batch == window - 1


@pytest.mark.parametrize("window", [1, 2])
def test_a_step_that_may_return_a_loss_has_eight_windows_to_do_so(window):
    trainer = make_trainer(accumulate_grad_batches=window, limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="`ForgetsDeep.training_step` returned `None`"):
        trainer.fit(ForgetsDeep(), make_loader(100))
    assert trainer.fit_loop.progress.batch == 8 * window - 1


@pytest.mark.filterwarnings("ignore:.*returned .None.")
def test_none_now_and_then_stays_allowed():
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(Sometimes(), make_loader(16))
    assert trainer.global_step == 4


@pytest.mark.parametrize("verb", ["validate", "fit"])
def test_gradients_in_evaluation_are_explained(verb):
    class Forces(Regression):
        def validation_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad(self(x).sum(), x)

    trainer = make_trainer()
    match = {
        "validate": r"`Forces.validation_step`.*Trainer\(inference_mode=False\)",
        "fit": r"with torch.enable_grad\(\)",
    }
    with pytest.raises(RuntimeError, match=match[verb]):
        if verb == "fit":
            trainer.fit(Forces(), make_loader(), make_loader())
        else:
            trainer.validate(Forces(), make_loader())


def test_iterables_that_are_no_dataset_are_taken():
    """Also an `IterableDataset`: it may give batches."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_loader())

    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(Regression(), Stream())
    assert trainer.global_step == 3
