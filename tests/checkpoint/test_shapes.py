"""Weights and optimizer states saved on n processes with one strategy, and resumed on m with another."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from support import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.checkpoint.consolidate import consolidate
from fulmen.console.commands import run_command
from fulmen.engine.dtensor import gather_full
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.strategies import DDPStrategy, FSDPStrategy

# Number of processes, what they write, and who reads what: of all ways, few enough to start few processes.
SAMPLE = (
    (1, ["single-1"], []),
    (4, ["sharded-4"], [("single-1", "ddp-4"), ("single-1", "full-4")]),
    (2, ["full-2"], [("single-1", "sharded-2"), ("sharded-4", "sharded-2"), ("sharded-4", "full-2")]),
    (1, [], [("full-2", "single-1"), ("sharded-4", "single-1")]),
)
WHOLE_BATCH = 4


class Net(pl.LightningModule):
    """Sizes that do not divide by the processes; keeps what it is when training begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 7), nn.Tanh())
        self.head = nn.Linear(7, 3)
        self.begin, self.target = None, None

    def training_step(self, batch, batch_idx):
        return self.head(self.body(batch[0])).square().mean()

    def on_train_start(self):
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        states = self.trainer.optimizers[0].state
        self.begin = {
            "weights": {name: gather_full(value, True).clone() for name, value in self.state_dict().items()},
            "states": {
                names[id(p)]: {k: gather_full(v, True).clone() for k, v in values.items()}
                for p, values in states.items()
            },
        }

    def on_train_end(self):
        if self.target:
            self.trainer.save_checkpoint(self.target)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def samples():
    return torch.randn(2 * WHOLE_BATCH, 4, generator=torch.Generator().manual_seed(1))


def train(case, target=None, ckpt_path=None, steps=2):
    """Steps with the same whole batches on any number of processes."""
    kind, devices = case.split("-")
    wrap = {"auto_wrap_policy": {nn.Sequential}}
    strategies = {"single": "auto", "ddp": DDPStrategy(), "full": FSDPStrategy(**wrap)}
    strategies["sharded"] = FSDPStrategy(state_dict_type="sharded", **wrap)
    module = Net()
    module.target = target
    trainer = make_trainer(max_epochs=5, max_steps=steps, devices=int(devices), strategy=strategies[kind])
    loader = DataLoader(TensorDataset(samples()), batch_size=WHOLE_BATCH // int(devices))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return {**module.begin, "end": dict(module.state_dict())}


def session(folder, writers, pairs):
    """Writes files, and by (writer, reader): what was there when training began, and after one step."""
    for case in writers:
        train(case, f"{folder}/{case}.ckpt")
    return {(w, r): train(r, ckpt_path=f"{folder}/{w}.ckpt", steps=3) for w, r in pairs}


def ran(folder, sessions):
    found = {}
    for devices, *tasks in sessions:
        alone = devices == 1
        found |= (
            session(folder, *tasks)
            if alone
            else run_ranks(devices, session, str(folder), *tasks, timeout_seconds=300)[0]
        )
    return found


def problem(folder, writer, found):
    """What differs from the file, or after the first step of the next epoch from that step made by hand; None if nothing does."""
    saved = TorchCheckpointIO().load_checkpoint(folder / f"{writer}.ckpt")
    module = Net()
    module.load_state_dict(saved["state_dict"])
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(saved["optimizer_states"][0])
    expected = {
        "weights": saved["state_dict"],
        "states": {name: dict(optimizer.state[parameter]) for name, parameter in module.named_parameters()},
    }
    if len(expected["states"]) != 4 or saved["global_step"] != 2:
        return "the file is not of two steps"
    for part, values in expected.items():
        flat, other = (sorted(flattened(tree)) for tree in (values, found[part]))
        if [name for name, _ in flat] != [name for name, _ in other]:
            return f"names of {part}"
        for (name, a), (_, b) in zip(flat, other):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return f"{part} {name}"
    module.training_step([samples()[:WHOLE_BATCH]], 0).backward()
    optimizer.step()
    for name, value in module.state_dict().items():
        if not torch.allclose(found["end"][name], value, rtol=1e-5, atol=1e-6):
            return f"{name} after a step"
    return None


def flattened(tree, name=""):
    for key, value in tree.items():
        yield from flattened(value, f"{name}.{key}") if isinstance(value, dict) else [(f"{name}.{key}", value)]


def test_states_are_those_of_the_file_bit_for_bit_whoever_reads_it(tmp_path):
    found = ran(tmp_path, SAMPLE)
    assert len(found) == 7
    assert {pair: problem(tmp_path, pair[0], one) for pair, one in found.items()} == dict.fromkeys(found)
    target = consolidate(tmp_path / "sharded-4.ckpt", tmp_path / "one.ckpt")
    one = train("single-1", ckpt_path=target, steps=3)
    assert problem(tmp_path, "sharded-4", one) is None


def test_folders_that_torch_alone_wrote_are_named_and_become_a_file(tmp_path, capsys):
    import torch.distributed.checkpoint as dcp

    module, path = Net(), tmp_path / "plain"
    dcp.save({"model": module.state_dict(), "step": 3}, checkpoint_id=path)
    with pytest.raises(IsADirectoryError, match="python -m fulmen consolidate"):
        train("single-1", ckpt_path=path)
    run_command(["consolidate", str(path)])
    content = torch.load(capsys.readouterr().out.strip())
    assert content["step"] == 3 and content["model"].keys() == module.state_dict().keys()
    assert all(torch.equal(content["model"][name], value) for name, value in module.state_dict().items())
    with pytest.raises(KeyError, match="no trainer wrote it"):
        train("single-1", ckpt_path=f"{path}.consolidated")
    (path / ".metadata").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    with pytest.raises(pickle.UnpicklingError, match="can run any code"):
        consolidate(path, tmp_path / "other")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other").exists()


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


if __name__ == "__main__":  # all ways: python tests/checkpoint/test_shapes.py FOLDER
    cases = {1: ["single-1", "full-1", "sharded-1"]} | {
        n: [f"{k}-{n}" for k in ("ddp", "full", "sharded")] for n in (2, 4)
    }
    all_cases = [case for names in cases.values() for case in names]
    writing = [(n, names, []) for n, names in cases.items()]
    reading = [(n, [], list(itertools.product(all_cases, names))) for n, names in cases.items()]
    found = ran(sys.argv[1], writing + reading)
    problems = {pair: problem(Path(sys.argv[1]), pair[0], one) for pair, one in found.items()}
    print(f"{sum(value is None for value in problems.values())} of {len(problems)} ways are right")
    print({pair: value for pair, value in problems.items() if value})
