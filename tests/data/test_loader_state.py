"""A loader that goes on inside an epoch: the same batches as without a stop, and nothing is loaded twice."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from support import make_trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)  # fmt: skip

import fulmen as pl
from fulmen.callbacks import Callback
from fulmen.utilities.combined_loader import CombinedLoader

SAMPLES, STOP = 22, 3  # batches that are done when a checkpoint is written, in the second epoch


class Samples(Dataset):
    """A number and noise from every generator; remembers what was loaded in this process."""

    def __init__(self, size=SAMPLES, noise=False):
        self.size, self.noise, self.loaded = size, noise, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = float(torch.rand(()) + random.random() + numpy.random.rand()) if self.noise else 0.0
        return torch.tensor([index, noise], dtype=torch.float64)


class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return iter(Samples(noise=True)[index] for index in range(first, SAMPLES, step))


class StatefulStream(Stream):
    """Knows where it is; the place is that of the iterator, which may be one batch ahead of training."""

    def __init__(self):
        self.place, self.read = 0, 0

    def __iter__(self):
        while self.place < SAMPLES:
            self.place += 1
            self.read += 1
            yield torch.tensor([self.place - 1.0, 0.0])
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class StatefulLoader:
    """The interface of a loader with a state of its own; without a length, so it is read ahead."""

    def __init__(self):
        self.stream = StatefulStream()
        self.state_dict, self.load_state_dict = self.stream.state_dict, self.stream.load_state_dict

    def __iter__(self):
        return iter(self.stream)


class Plain:
    """No loader at all, only something to read."""

    def __iter__(self):
        return iter([torch.tensor([[float(i), 0.0]]) for i in range(7)])


class Shuffle(Sampler):
    """Draws from python at once, and from a generator of its own."""

    def __init__(self, own):
        self.rng = random.Random(3) if own else random

    def __iter__(self):
        order = list(range(SAMPLES))
        self.rng.shuffle(order)
        return iter(order)

    def __len__(self):
        return SAMPLES


class Pairs(Sampler):
    def __iter__(self):
        for _ in range(9):
            yield torch.randperm(SAMPLES)[:2].tolist()

    def __len__(self):
        return 9


class OwnIterator(DataLoader):
    """Reads without its sampler."""

    def __iter__(self):
        return iter([torch.tensor([[float(i), 0.0]]) for i in range(6)])


def own():
    return torch.Generator().manual_seed(9)


def noisy(**arguments):
    return DataLoader(Samples(noise=True), **{"batch_size": 4, "shuffle": True, **arguments})


LOADERS = {
    "in order": lambda: DataLoader(Samples(), 4),
    "shuffled": lambda: DataLoader(Samples(), 4, shuffle=True),
    "noise in this process": noisy,
    "generator": lambda: DataLoader(Samples(), 4, shuffle=True, generator=own()),
    "weights": lambda: DataLoader(
        Samples(), 4, sampler=WeightedRandomSampler(torch.ones(SAMPLES), 20, generator=own())
    ),
    "replacement": lambda: DataLoader(
        Samples(), 4, sampler=RandomSampler(Samples(), replacement=True, generator=own())
    ),
    "custom sampler": lambda: DataLoader(Samples(), 4, sampler=Shuffle(own=False), drop_last=True),
    "custom sampler, own generator": lambda: DataLoader(Samples(), 4, sampler=Shuffle(own=True)),
    "batch sampler": lambda: DataLoader(Samples(), batch_sampler=BatchSampler(RandomSampler(Samples()), 3, True)),
    "batch sampler that draws as it goes": lambda: DataLoader(Samples(), batch_sampler=Pairs()),
    "no batches": lambda: DataLoader(Samples(), batch_size=None, shuffle=True),
    "subset": lambda: DataLoader(Subset(Samples(), range(3, 20)), 4, shuffle=True),
    "tensors": lambda: DataLoader(TensorDataset(torch.arange(44.0).view(22, 2)), 4, shuffle=True),
    "1 worker": lambda: noisy(num_workers=1),
    "2 workers": lambda: noisy(num_workers=2, generator=own()),
    "3 workers that stay": lambda: noisy(num_workers=3, persistent_workers=True, prefetch_factor=3),
    "2 workers, no batches": lambda: noisy(num_workers=2, batch_size=None),
    "stream": lambda: DataLoader(Stream(), 4),
    "stream, 2 workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "stream with a state": lambda: DataLoader(StatefulStream(), 4),
    "loader with a state": StatefulLoader,
    "no loader": Plain,
    "own iterator": lambda: OwnIterator(Samples()),
    **{
        mode: lambda mode=mode: CombinedLoader(
            {"a": DataLoader(Samples(10), 4, shuffle=True), "b": noisy(num_workers=1, generator=own()), "c": Plain()},
            mode,
        )
        for mode in ("max_size_cycle", "max_size", "min_size")
    },
}


class Listener(pl.LightningModule):
    """Writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.given = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        flat = batch if isinstance(batch, dict) else {"": batch}
        told = {k: v if v is None else torch.cat([p.flatten() for p in v]).tolist() for k, v in flat.items()}
        self.given.append((self.current_epoch, batch_idx, told))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Saves(Callback):
    """After so many batches of an epoch."""

    def __init__(self, path, epoch=1, batch=STOP):
        self.path, self.when = path, (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx + 1) == self.when:
            trainer.save_checkpoint(self.path)


def given(loader, path=None, seed=5, **arguments):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    model = Listener()
    make_trainer(max_epochs=3, **arguments).fit(model, loader, ckpt_path=path)
    return model.given


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", LOADERS)
def test_the_rest_of_an_epoch_is_that_of_the_run_without_a_stop(tmp_path, kind):
    path = tmp_path / "saved.ckpt"
    stop = 2 if kind == "min_size" else STOP
    whole = given(LOADERS[kind](), callbacks=[Saves(path, batch=stop)])
    rest = given(LOADERS[kind](), path, seed=77, callbacks=[Saves(tmp_path / "later.ckpt", batch=stop + 1)])
    begin = whole.index(next(told for told in whole if told[:2] == (1, stop)))
    assert rest == whole[begin:] and len({str(told) for told in rest}) > 2
    if (tmp_path / "later.ckpt").exists():
        assert given(LOADERS[kind](), tmp_path / "later.ckpt", seed=78) == whole[begin + 1 :]


@pytest.mark.parametrize("kind", [kind for kind, make in LOADERS.items() if type(make()) is DataLoader])
def test_a_run_gives_what_a_loop_over_the_loader_gives(kind):
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    loader, plain = LOADERS[kind](), []
    for epoch in range(3):
        for idx, batch in enumerate(loader):
            plain.append((epoch, idx, {"": torch.cat([part.flatten() for part in batch]).tolist()}))
    assert given(LOADERS[kind]()) == plain


@pytest.mark.parametrize("kind", ["shuffled", "weights", "batch sampler", "no batches", "subset"])
def test_what_is_done_is_not_loaded_again(tmp_path, kind):
    given(LOADERS[kind](), callbacks=[Saves(tmp_path / "saved.ckpt")])
    loader = LOADERS[kind]()
    rest = given(loader, tmp_path / "saved.ckpt")
    data = loader.dataset.dataset if kind == "subset" else loader.dataset
    assert len(data.loaded) == sum(len(told[""]) // 2 for _, _, told in rest)


def test_a_stream_with_a_state_is_not_read_again(tmp_path):
    given(DataLoader(StatefulStream(), 4), callbacks=[Saves(tmp_path / "saved.ckpt")])
    stream = StatefulStream()
    given(DataLoader(stream, 4), tmp_path / "saved.ckpt")
    assert stream.read == SAMPLES - STOP * 4 + SAMPLES


def test_it_is_said_what_is_read_again_and_what_is_not_exact(tmp_path, caplog):
    class OwnWorkers(DataLoader):
        def _get_iterator(self):
            iterator = super()._get_iterator()
            iterator._collate_fn = None
            return iterator

    path = tmp_path / "saved.ckpt"
    given(LOADERS["stream"](), callbacks=[Saves(path)])
    with caplog.at_level("INFO"):
        given(LOADERS["stream"](), path)
    assert "3 batches of `Stream` were read and passed over" in caplog.text
    loader = OwnWorkers(Samples(), 4, num_workers=1)
    given(loader, callbacks=[Saves(path)])
    with pytest.warns(UserWarning, match="drawn in the 1 workers of `OwnWorkers` start anew"):
        given(loader, path)


def test_a_sampler_that_draws_between_the_steps_is_named(tmp_path):
    class Draws(Listener):
        def training_step(self, batch, batch_idx):
            torch.rand(1)
            return super().training_step(batch, batch_idx)

    def fit(path=None, **arguments):
        make_trainer(max_epochs=2, **arguments).fit(
            Draws(), LOADERS["batch sampler that draws as it goes"](), ckpt_path=path
        )

    fit(callbacks=[Saves(tmp_path / "saved.ckpt")])
    with pytest.warns(UserWarning, match="`Pairs` draws random numbers of the run for each index"):
        fit(tmp_path / "saved.ckpt")
