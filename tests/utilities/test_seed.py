import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fulmen.utilities.rank_zero import rank_zero_only
from fulmen.utilities.seed import (
    generator_states,
    isolate_rng,
    pl_worker_init_function,
    seed_everything,
    set_generator_states,
)


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    with isolate_rng():
        yield


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_seed_gives_the_same_numbers():
    assert seed_everything(7) == 7
    first = draw()
    assert os.environ["PL_GLOBAL_SEED"] == "7" and os.environ["PL_SEED_WORKERS"] == "0"
    assert seed_everything("7", workers=True) == 7
    assert draw() == first and os.environ["PL_SEED_WORKERS"] == "1"


def test_without_a_seed_the_environment_decides(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    assert seed_everything() == 12
    monkeypatch.delenv("PL_GLOBAL_SEED")
    with pytest.warns(UserWarning, match="No seed found"):
        assert seed_everything() == 0


def test_the_seed_is_announced_unless_told_not_to(caplog):
    with caplog.at_level("INFO", logger="fulmen"):
        seed_everything(3)
        seed_everything(4, verbose=False)
    assert caplog.messages == ["Seed set to 3"]


@pytest.mark.parametrize("seed", [-1, 2**32, "x"])
def test_an_impossible_seed_is_an_error(seed):
    with pytest.raises(ValueError):
        seed_everything(seed)


def test_an_unreadable_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "abc")
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED.*abc"):
        seed_everything()


def test_numbers_drawn_inside_do_not_change_those_after():
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with isolate_rng():
        draw()
    assert draw() == expected


def test_generator_states_survive_a_weights_only_file(tmp_path):
    random.gauss(0, 1)  # leaves a second number behind in the generator
    torch.save(generator_states(), tmp_path / "states.pt")
    expected = draw(), random.gauss(0, 1)
    seed_everything(99)
    set_generator_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (draw(), random.gauss(0, 1)) == expected


class RandomNumbers(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.tensor(draw(), dtype=torch.float64)


def test_each_worker_of_each_rank_has_streams_of_its_own(monkeypatch):
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        seed_everything(1, workers=True)
        loader = DataLoader(RandomNumbers(), num_workers=2, worker_init_fn=pl_worker_init_function)
        seen += [tuple(batch[0].tolist()) for batch in loader]
    for stream in zip(*seen):
        assert len(set(stream)) == 4
