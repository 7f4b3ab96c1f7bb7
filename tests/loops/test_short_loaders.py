"""Loaders that give fewer batches than they promise, or none: an epoch ends where its batches end, and it is said."""

from __future__ import annotations

import re
import warnings
from itertools import islice

import pytest
import torch
from ranks import run_ranks
from support import Regression, make_trainer
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, get_worker_info

from fulmen.callbacks import ModelCheckpoint
from fulmen.data.combined import CombinedLoader
from fulmen.data.loaders import length_is_certain
from fulmen.utilities.errors import MisconfigurationException


def samples(count, seed=1):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return list(zip(x, x.sum(dim=1, keepdim=True)))


class Promising(IterableDataset):
    """Says that it has other samples than it has; split by worker."""

    def __init__(self, count, says, seed=1):
        self.samples, self.says = samples(count, seed), says

    def __len__(self):
        return self.says

    def __iter__(self):
        worker = get_worker_info()
        return iter(self.samples[worker.id :: worker.num_workers] if worker else self.samples)


class Batches:
    """Five batches are promised, so many come."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return 5

    def __iter__(self):
        return iter(DataLoader(samples(2 * self.count), batch_size=2))


class Few(Sampler):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter(range(8))


def dropping_workers():
    """Eleven samples for each of two workers: two batches each. `len()` says five."""
    return DataLoader(Promising(22, 22), batch_size=4, num_workers=2, drop_last=True)


class Stopping(DataLoader):
    def __iter__(self):
        yield from islice(super().__iter__(), 4)


class Cut(DataLoader):
    def __iter__(self):
        return islice(super().__iter__(), 4)


LOADERS = {
    "iterable": lambda: DataLoader(Promising(8, 10), batch_size=2),
    "workers that drop": dropping_workers,
    "a loader of one's own": lambda: Batches(4),
    "a sampler": lambda: DataLoader(samples(10), batch_size=2, sampler=Few()),
    "a DataLoader of one's own": lambda: Stopping(samples(10), batch_size=2),
    "several": lambda: {"a": Batches(4), "b": Batches(4)},
}


class Model(Regression):
    def __init__(self):
        super().__init__()
        self.validated, self.last = [], []

    def training_step(self, batch, batch_idx):
        self.last.append(self.trainer.is_last_batch)
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    def on_validation_start(self):
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def by_hand(batches, window, epochs):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for start in range(0, len(batches), window):
            part = batches[start : start + window]
            optimizer.zero_grad()
            for batch in part:
                (model.loss(batch) / len(part)).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    return model


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("kind", LOADERS)
def test_everything_that_belongs_to_the_end_of_an_epoch_happens(tmp_path, kind, window):
    torch.manual_seed(0)
    model, saver = Model(), ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=window, callbacks=[saver], enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, LOADERS[kind](), DataLoader(samples(4), batch_size=2))
    steps = 4 if window == 1 else 2
    assert model.validated == [steps, 2 * steps] and len(list(tmp_path.iterdir())) == 2
    assert model.last == [False, False, False, True] * 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025
    said = [str(w.message) for w in caught if "promised" in str(w.message)]
    assert len(said) == 1 and re.search(r"`train_dataloaders` of `Trainer.fit`, promised 5 batches .* gave 4", said[0])
    batches = [batch["a"] if kind == "several" else batch for batch in iterated(LOADERS[kind]())]
    theirs = by_hand(batches, window, 2)
    for ours, hand in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, hand, rtol=0, atol=0)


@pytest.mark.parametrize("interval", [1.0, 2])
def test_validation_and_schedulers_follow_where_nobody_could_know_the_last_batch(interval):
    model, trainer = Model(), make_trainer(max_epochs=2, val_check_interval=interval)
    with pytest.warns(UserWarning, match="promised 5 batches .* gave 4"):
        trainer.fit(model, Cut(samples(10), batch_size=2), DataLoader(samples(4), batch_size=2))
    assert model.validated == ([4, 8] if interval == 1.0 else [2, 4, 6, 8]) and trainer.global_step == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025


def iterated(loaders):
    if isinstance(loaders, dict):
        return [dict(zip(loaders, batches)) for batches in zip(*loaders.values())]
    return list(loaders)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"val_check_interval": 0.5}, [2, 4]),
        ({"val_check_interval": 2}, [2, 4]),
        ({"val_check_interval": 3}, [3]),
        ({"val_check_interval": 5}, [4]),  # the end of the epoch that was promised
        ({"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2}, [3, 6]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 2}, [8]),
        ({"limit_train_batches": 3}, [3]),
    ],
)
def test_validation_inside_of_a_short_epoch(arguments, expected):
    model = Model()
    make_trainer(**arguments).fit(model, Batches(4), DataLoader(samples(4), batch_size=2))
    assert model.validated == expected


def test_several_loaders_one_of_which_is_short():
    model = Model()
    loaders = CombinedLoader({"a": DataLoader(samples(10), batch_size=2), "b": Batches(3)}, "min_size")
    make_trainer(max_epochs=2).fit(model, loaders, DataLoader(samples(4), batch_size=2))
    assert model.validated == [3, 6]


def test_a_dataset_that_became_smaller_ends_its_epoch_early():
    class Shrinks(Model):
        def on_train_epoch_end(self):
            del data[6:]

    data = samples(10)
    model = Shrinks()
    make_trainer(max_epochs=2).fit(model, DataLoader(data, batch_size=2), DataLoader(samples(4), batch_size=2))
    assert model.validated == [5, 8] and model.last == [False] * 4 + [True] + [False, False, True]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_ends_with_its_batches_and_says_so(verb):
    trainer, model = make_trainer(), Regression()
    with pytest.warns(UserWarning, match="promised 5 batches with `len\\(\\)` and gave 4"):
        found = getattr(trainer, verb)(model, Batches(4))
    if verb == "predict":
        assert len(found) == 4
        return
    kept = DataLoader(samples(8), batch_size=2)
    assert found == getattr(trainer, verb)(model, kept, verbose=False)
    with pytest.warns(UserWarning, match="number 1.*gave 3"):
        getattr(trainer, verb)(Several(), [kept, Batches(3), kept], verbose=False)
    with pytest.warns(UserWarning, match="No batches: the `generator`"):
        getattr(trainer, verb)(model, (batch for batch in ()), verbose=False)


class Several(Regression):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    test_step = validation_step


def test_a_run_resumed_in_a_short_epoch_ends_in_the_same_bits(tmp_path):
    def run(path=None, **arguments):
        torch.manual_seed(0)
        model, val = Model(), DataLoader(samples(4), batch_size=2)
        trainer = make_trainer(max_epochs=2, **arguments)
        trainer.fit(model, DataLoader(Promising(8, 10), batch_size=2), val, ckpt_path=path)
        return model, trainer

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    whole, _ = run(callbacks=[saver], enable_checkpointing=True)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        resumed, trainer = run(path)
        assert torch.equal(whole.layer.weight, resumed.layer.weight), path
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025
        assert trainer.global_step == 8 and resumed.validated[-1] == 8


def test_lengths_that_are_certain_are_counted_and_nothing_is_read_ahead():
    plain = DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2)
    assert length_is_certain(plain) and length_is_certain([1, 2])
    assert length_is_certain(DataLoader(samples(8), batch_size=2, shuffle=True))
    for doubtful in (LOADERS[kind]() for kind in ("iterable", "a loader of one's own", "a sampler")):
        assert not length_is_certain(doubtful)


class Told(Sampler):
    def __init__(self):
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize("reload", [0, 1])
def test_samplers_hear_of_each_epoch_once(reload):
    sampler = Told()
    loader = DataLoader(samples(4), batch_size=2, sampler=sampler)
    make_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=reload).fit(Regression(), loader)
    assert sampler.told == [0, 1, 2]


# ---------------------------------------------------------------------- epochs without a batch


@pytest.mark.parametrize("loader", [lambda: (b for b in ()), lambda: DataLoader(Promising(0, 4), batch_size=2)])
def test_training_without_any_batch_is_an_error(loader):
    with (
        pytest.warns(UserWarning, match="No batches"),
        pytest.raises(MisconfigurationException, match="No training batch"),
    ):
        make_trainer(max_epochs=2).fit(Regression(), loader())


def test_an_epoch_of_a_generator_that_is_used_up_is_said_once(recwarn):
    batches = iter(DataLoader(samples(4), batch_size=2))
    trainer = make_trainer(max_epochs=4)
    trainer.fit(Regression(), batches)
    assert trainer.global_step == 2
    assert len([w for w in recwarn if "No batches" in str(w.message)]) == 1


def test_nothing_left_to_read_does_not_run_for_ever():
    batches = iter(DataLoader(samples(4), batch_size=2))
    with pytest.warns(UserWarning, match="No batches"), pytest.raises(MisconfigurationException, match="in a row"):
        make_trainer(max_epochs=-1, max_steps=10).fit(Regression(), batches)


def test_skipping_all_of_an_epoch_is_not_an_epoch_without_batches(recwarn):
    class Skips(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    make_trainer(max_epochs=2).fit(Skips(), DataLoader(samples(4), batch_size=2))
    assert not [w for w in recwarn if "No batches" in str(w.message)]


# ---------------------------------------------------------------------- several processes


def on_ranks(counts, window):
    import torch.distributed as dist

    own = DataLoader(Promising(counts[dist.get_rank()], 10, seed=dist.get_rank()), batch_size=2)
    torch.manual_seed(0)
    model = Model()
    trainer = make_trainer(
        max_epochs=2, accumulate_grad_batches=window, devices=len(counts), strategy="ddp", use_distributed_sampler=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, own, DataLoader(samples(4), batch_size=2))
    said = [str(w.message) for w in caught if "promised" in str(w.message)]
    return model.layer.weight.detach().tolist(), model.validated, trainer.optimizers[0].param_groups[0]["lr"], said


def all_cases(cases):
    return [on_ranks(*case) for case in cases]


def test_two_processes_end_the_epoch_together_and_the_loader_is_named():
    cases = [((8, 8), 1), ((10, 6), 3)]
    on_0, on_1 = run_ranks(2, all_cases, cases)
    for (counts, window), first, second in zip(cases, on_0, on_1):
        assert first[:3] == second[:3]
        steps = 4 if window == 1 else 2  # the windows of five batches are of three and two
        assert first[1] == [steps, 2 * steps] and first[2] == 0.025
        assert len(first[3]) == 1 and not second[3], (first, second)
        assert "Promising" in first[3][0] and f"on rank {int(counts[0] == 10)}" in first[3][0]
        both = [list(DataLoader(Promising(count, 10, seed=rank), batch_size=2)) for rank, count in enumerate(counts)]
        theirs = together_by_hand(both, window)
        torch.testing.assert_close(torch.tensor(first[0]), theirs.layer.weight.detach(), rtol=1e-5, atol=1e-6)


def together_by_hand(both, window):
    """One process that has the batches of all: a step is the mean over those that there are."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    longest = max(map(len, both))
    for _ in range(2):
        for start in range(0, longest, window):
            part = [batch for batches in both for batch in batches[start : start + window]]
            optimizer.zero_grad()
            (sum(model.loss(batch) for batch in part) / len(part)).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    return model
