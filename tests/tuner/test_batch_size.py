"""`Tuner.scale_batch_size` and `BatchSizeFinder`: the largest size that fits is found, and nothing else has changed."""

from __future__ import annotations

import os
import re

import pytest
import torch
from searches import OUT_OF_MEMORY, Searched, random_states
from support import make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import BatchSizeFinder, LearningRateFinder
from fulmen.tuner import Tuner
from fulmen.utilities.errors import MisconfigurationException

VERBS = ("fit", "validate", "test", "predict")


def search_sizes(samples: int = 1000, capacity: int = 10**9, **arguments) -> tuple[int | None, Searched, pl.Trainer]:
    model = Searched(batch_size=7, samples=samples)
    model.capacity = capacity
    trainer = make_trainer(limit_val_batches=0)
    return Tuner(trainer).scale_batch_size(model, **arguments), model, trainer


# samples, capacity, arguments -> what is found, what is tried
SEARCHES = [
    (64, 10**9, {}, 64, [2, 4, 8, 16, 32, 64]),
    (40, 10**9, {}, 40, [2, 4, 8, 16, 32, 40]),  # no more than there are
    (64, 10**9, {"max_trials": 3, "init_val": 4}, 16, [4, 8, 16]),
    (64, 10**9, {"max_trials": 0}, 2, []),
    (1000, 100, {}, 64, [2, 4, 8, 16, 32, 64, 128]),
    (1000, 100, {"init_val": 500, "steps_per_trial": 1}, 62, [500, 250, 125, 62, 124]),
    (1000, 1, {"method": "test"}, 1, [2, 1]),
    (1000, 10**9, {"max_val": 50}, 50, [2, 4, 8, 16, 32, 50]),
    (1000, 10**9, {"max_val": 50, "init_val": 100}, 50, [50]),
    (64, 10**9, {"mode": "binsearch"}, 60, [2, 4, 8, 16, 32, 64]),  # a margin of 5 %
    (64, 10**9, {"mode": "binsearch", "margin": 0.5}, 32, [2, 4, 8, 16, 32, 64]),
    (1000, 100, {"mode": "binsearch", "margin": 0.0}, 100, [2, 4, 8, 16, 32, 64, 128, 96, 112, 104, 100, 102, 101]),
    (1000, 100, {"mode": "binsearch", "init_val": 500, "max_trials": 10}, 95, [500, 250, 125, 63, 94, 109, 101, 97, 99, 100]),
    (1000, 100, {"mode": "binsearch", "margin": 0.0, "max_trials": 7}, 96, [2, 4, 8, 16, 32, 64, 128, 96]),
    (1000, 10**9, {"mode": "binsearch", "margin": 0.0, "max_val": 50}, 50, [2, 4, 8, 16, 32, 50]),
    (1000, 1, {"mode": "binsearch", "method": "test"}, 1, [2, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "capacity", "arguments", "found", "tried"), SEARCHES)
def test_the_sizes_that_are_tried_and_the_one_that_is_found(samples, capacity, arguments, found, tried):
    size, model, trainer = search_sizes(samples, capacity, **{"steps_per_trial": 1, **arguments})
    assert (size, model.batch_size, model.sizes) == (found, found, tried)
    loader = trainer.test_dataloaders if "method" in arguments else trainer.train_dataloader
    assert loader.batch_size == found


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_be_searched(verb, tmp_path):
    model = Searched(batch_size=7)
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    model.capacity = 20
    trainer = make_trainer(default_root_dir=tmp_path, logger=True, enable_checkpointing=True)
    callbacks = trainer.callbacks
    before = random_states()
    assert Tuner(trainer).scale_batch_size(model, method=verb, steps_per_trial=2) == 16 == model.batch_size
    steps = [2, 2, 4, 4, 8, 8, 16, 16, 32]
    assert [len(batch) for batch in model.seen] == steps
    assert random_states() == before and trainer.callbacks is callbacks and not os.listdir(tmp_path)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == weights
    assert (trainer.global_step, trainer.current_epoch, float(model.calls)) == (0, 0, 0)
    loaders = {
        "fit": trainer.train_dataloader, "validate": trainer.val_dataloaders,
        "test": trainer.test_dataloaders, "predict": trainer.predict_dataloaders,
    }  # fmt: skip
    assert loaders[verb].batch_size == 16
    if verb == "fit":
        assert trainer.val_dataloaders.batch_size == 16


@pytest.mark.parametrize("verb", VERBS)
def test_a_finder_in_the_trainer_runs_with_the_size_that_it_found(verb, capsys):
    """As a run does whose module was made with that size."""

    def run(batch_size: int, *callbacks: pl.Callback) -> tuple:
        pl.seed_everything(3, verbose=False)
        model = Searched(batch_size=batch_size)
        model.capacity = 20
        trainer = make_trainer(max_epochs=2, callbacks=list(callbacks), num_sanity_val_steps=1)
        results = getattr(trainer, verb)(model)
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        return weights, float(model.calls), str(results), trainer.global_step, random_states(), model

    finder = BatchSizeFinder(steps_per_trial=2)
    *searched, model = run(7, finder)
    *plain, twin = run(16)
    assert finder.optimal_batch_size == model.batch_size == 16
    assert searched == plain and model.seen[-len(twin.seen) :] == twin.seen
    validated = [table for table in capsys.readouterr().out.split("DataLoader 0") if "_loss" in table]
    assert len(validated) == (2 if verb in ("validate", "test") else 0)  # one table each


def test_sizes_and_rates_are_found_in_one_run():
    """The size first, as it stands first; both searches see what the other has set."""
    finders = [BatchSizeFinder(max_trials=3), LearningRateFinder(num_training_steps=30, early_stop_threshold=None)]
    model = Searched()
    trainer = make_trainer(callbacks=finders)
    trainer.fit(model)
    assert model.batch_size == 8 and model.lr == finders[1].optimal_lr.suggestion() != 0.1
    assert trainer.global_step == 5 and trainer.num_val_batches == [5]


@pytest.mark.parametrize("error", [
    OUT_OF_MEMORY, "CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...",
    "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
])  # fmt: skip
def test_every_way_of_saying_that_memory_is_full_counts(error):
    model = Searched(samples=1000)
    model.capacity = 10
    model.error = error
    assert Tuner(make_trainer()).scale_batch_size(model) == 8


@pytest.mark.parametrize("verb", VERBS)
def test_other_errors_pass_and_nothing_has_changed(verb, compare_around, tmp_path):
    model = Searched(batch_size=7)
    model.capacity = 10
    model.error = "shapes do not fit"
    trainer = make_trainer(default_root_dir=tmp_path)
    callbacks = trainer.callbacks
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    before = random_states()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Tuner(trainer).scale_batch_size(model, method=verb)
    assert model.batch_size == 7 and trainer.callbacks is callbacks and not os.listdir(tmp_path)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == weights
    assert random_states() == before and all(part.training for part in model.modules())
    model.capacity = 0
    model.error = OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="CUDA out of memory"):  # not even one sample
        Tuner(trainer).scale_batch_size(model, method=verb)
    assert model.batch_size == 7


def test_a_search_at_the_start_of_an_epoch_changes_the_size_alone(compare_around):
    class AtEpochs(compare_around(BatchSizeFinder, "scale_batch_size")):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.capacity = 5 * 2**trainer.current_epoch
            self.scale_batch_size(trainer, pl_module)

    finder = AtEpochs(steps_per_trial=2)
    model = Searched(batch_size=7, samples=80)
    trainer = make_trainer(max_epochs=3, callbacks=[finder], limit_train_batches=4)
    trainer.fit(model)
    assert len(finder.notes) == 3 and finder.optimal_batch_size == 16
    for before, after in finder.notes:
        assert before == after
    assert trainer.global_step == 12
    own = [len(batch) for batch in model.seen]
    # Each epoch: the sizes that were tried, then four batches and the validation with the one that fits.
    tried = [[2, 2, 4, 4, 8], [2, 2, 4, 4, 8, 8, 16], [2, 2, 4, 4, 8, 8, 16, 16, 32]]
    validated = [[4] * 20, [8] * 10, [16] * 5]
    expected = [[*t, *[v[0]] * 4, *v] for t, v in zip(tried, validated)]
    assert own == [size for epoch in expected for size in epoch]


@pytest.mark.parametrize(("module_size", "data_size"), [(2, None), (2, 3), (None, 3)])
def test_the_size_is_set_wherever_it_is(module_size, data_size):
    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = data_size

        def train_dataloader(self):
            return make_loader(64, self.batch_size)

    model = Searched(samples=64)
    model.batch_size = module_size
    if module_size is None:
        del model.batch_size
    data = None if data_size is None else Data()
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=0)
    found = Tuner(trainer).scale_batch_size(
        model, mode="binsearch", init_val=4, max_trials=2, datamodule=data, margin=0
    )
    assert found == 8 == trainer.train_dataloader.batch_size
    assert module_size is None or model.batch_size == 8
    assert data is None or data.batch_size == 8
    if data is not None:
        other = Data()
        assert Tuner(trainer).scale_batch_size(model, other, max_trials=1) == 2 == other.batch_size
        assert data.batch_size == 8  # that one is not asked any more


def test_hyper_parameters_are_set_and_two_places_are_warned_of():
    class InHparams(Searched):
        def __init__(self, size: int = 2, both: bool = False) -> None:
            super().__init__(samples=64)
            self.hparams.batch_size = size
            if not both:
                del self.batch_size

        def make_loader(self, shuffle=False):
            return make_loader(64, self.hparams.batch_size)

    model = InHparams()
    assert Tuner(make_trainer()).scale_batch_size(model, max_trials=4) == 16 == model.hparams.batch_size
    both = InHparams(both=True)
    match = "Field `model.batch_size` and `model.hparams.batch_size` are mutually exclusive!"
    with pytest.warns(UserWarning, match=match):
        assert Tuner(make_trainer()).scale_batch_size(both, max_trials=4) == 16
    assert (both.batch_size, both.hparams.batch_size) == (16, 16)


def test_the_attribute_may_have_another_name():
    class Renamed(Searched):
        size = 2

        def make_loader(self, shuffle=False):
            return make_loader(64, self.size)

    model = Renamed(batch_size=7)
    assert Tuner(make_trainer()).scale_batch_size(model, batch_arg_name="size", max_trials=3) == 8
    assert (model.size, model.batch_size) == (8, 7)
    with pytest.raises(MisconfigurationException, match="Field model.size not found in `model`"):
        Tuner(make_trainer()).scale_batch_size(model, batch_arg_name="model.size")


def test_the_epochs_of_a_trial_may_be_shorter_than_its_steps():
    """With validation, which has to fit into memory too."""
    model = Searched(samples=4)
    assert Tuner(make_trainer()).scale_batch_size(model, steps_per_trial=3, max_trials=2) == 4
    assert [len(batch) for batch in model.seen] == [2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4]


def test_accumulated_and_manual_steps_are_steps():
    class Manual(Searched):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = self.compute_loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.Adam(self.parameters())]

    model = Searched(samples=64)
    trainer = make_trainer(accumulate_grad_batches=2)
    assert Tuner(trainer).scale_batch_size(model, steps_per_trial=2, max_trials=2) == 4
    assert [len(batch) for batch in model.seen] == [2] * 4 + [4] * 4
    manual = Manual(samples=64)
    assert Tuner(make_trainer()).scale_batch_size(manual, steps_per_trial=2, max_trials=2) == 4
    assert manual.sizes == [2, 4]


def test_a_development_run_skips_the_search():
    with pytest.warns(UserWarning, match="Skipping batch size scaler since `fast_dev_run` is enabled."):
        assert Tuner(make_trainer(fast_dev_run=True)).scale_batch_size(Searched()) is None


def test_wrong_calls_are_refused_and_nothing_has_changed():
    tuner = Tuner(make_trainer())
    model = Searched()
    loader = make_loader()
    wrong = [
        (ValueError, "`mode` should be either of .* 'powr'.*Did you mean `power`", {"mode": "powr"}),
        (ValueError, "method 'prediction' is invalid. Should be one of.*Did you mean `predict`", {"method": "prediction"}),
        (AssertionError, "`margin` should be between 0 and 1", {"margin": 1.0}),
        (ValueError, "`steps_per_trial=0` must be at least 1", {"steps_per_trial": 0}),
        (ValueError, "`init_val=0` must be at least 1", {"init_val": 0}),
        (ValueError, "`max_val=0` must be at least 1", {"max_val": 0}),
        (ValueError, "`max_trials=-1` must not be negative", {"max_trials": -1}),
        (MisconfigurationException, "consider setting `train_dataloaders` and `val_dataloaders`", {"dataloaders": loader}),
        (MisconfigurationException, "cannot be used with dataloaders passed directly to `.fit\\(\\)`", {"train_dataloaders": loader}),
        (MisconfigurationException, "Field size not found in `model`", {"batch_arg_name": "size"}),
    ]  # fmt: skip
    for verb in VERBS[1:]:
        hint = "please consider setting `dataloaders` instead"
        wrong.append((MisconfigurationException, hint, {"method": verb, "train_dataloaders": loader}))
        wrong.append((MisconfigurationException, hint, {"method": verb, "val_dataloaders": loader}))
        match = re.escape(f"cannot be used with dataloaders passed directly to `.{verb}()`")
        wrong.append((MisconfigurationException, match, {"method": verb, "dataloaders": loader}))
    for kind, match, arguments in wrong:
        with pytest.raises(kind, match=match):
            tuner.scale_batch_size(model, **arguments)
    assert model.seen == [] and model.batch_size == 8 and tuner._trainer.callbacks == []


@pytest.mark.parametrize("verb", VERBS[1:])
def test_several_loaders_of_an_evaluation_are_refused_before_their_steps_are_looked_at(verb):
    class Several(Searched):
        def val_dataloader(self):
            return [self.make_loader(), self.make_loader()]

        test_dataloader = predict_dataloader = val_dataloader

    kind = "val" if verb == "validate" else verb
    with pytest.raises(MisconfigurationException, match=f"cannot be used with multiple {kind} dataloaders"):
        Tuner(make_trainer()).scale_batch_size(Several(), method=verb)


@pytest.mark.parametrize("verb", VERBS[1:])
def test_several_loaders_of_an_evaluation_are_refused(verb):
    class Several(Searched):
        def val_dataloader(self):
            return [self.make_loader(), self.make_loader()]

        test_dataloader = predict_dataloader = val_dataloader

        def validation_step(self, batch, batch_idx, dataloader_idx):
            return super().validation_step(batch, batch_idx)

        def test_step(self, batch, batch_idx, dataloader_idx):
            return super().test_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx, dataloader_idx):
            return super().predict_step(batch, batch_idx)

    kind = "val" if verb == "validate" else verb
    model = Several()
    with pytest.raises(MisconfigurationException, match=f"cannot be used with multiple {kind} dataloaders"):
        Tuner(make_trainer()).scale_batch_size(model, method=verb)
    assert model.seen == [] and all(part.training for part in model.modules())


def test_several_processes_are_refused():
    trainer = make_trainer(devices=2, strategy="ddp")
    with pytest.raises(
        ValueError, match="Tuning the batch size is currently not supported with distributed strategies"
    ):
        Tuner(trainer).scale_batch_size(Searched())
    with pytest.raises(
        MisconfigurationException, match="Batch size finder is not supported with distributed strategies"
    ):
        BatchSizeFinder().setup(trainer, Searched())
    configured = make_trainer(callbacks=[BatchSizeFinder()])
    with pytest.raises(ValueError, match="Trainer is already configured with a `BatchSizeFinder` callback"):
        Tuner(configured).scale_batch_size(Searched())
