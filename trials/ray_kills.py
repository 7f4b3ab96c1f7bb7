"""Workers of Ray Train are killed at random steps, and Ray starts them again: does the run end in the same bits?

It needs `pip install 'ray[train]'`; the script that the workers run knows nothing of Ray.

python -m trials.ray_kills            # 20 kills
python -m trials.ray_kills --kills 2
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from benchmarks.harness import NOTHING_ON

WORKERS = 2
BATCHES = 6  # of an epoch, for each worker
ROOT = Path(__file__).parents[1]


class Model(pl.LightningModule):
    """Dropout and momentum: nothing that a resume could leave out goes unseen. One of the workers may kill itself.

    Arguments:
        kill_at: so many batches after a start; None for never.
        victim: the rank of that worker.
    """

    def __init__(self, kill_at: int | None, victim: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 1))
        self.kill_at = kill_at
        self.victim = victim
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.seen == self.kill_at and self.global_rank == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1
        loss = (self.layers(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(config: dict[str, Any]) -> None:
    """What the workers run: a plain script, with a plan of who is killed when."""
    folder = Path(config["folder"])
    rank = int(os.environ["RANK"])
    (folder / f"start-{rank}-{os.getpid()}").touch()
    start = len(list(folder.glob(f"start-{rank}-*"))) - 1
    kill_at, victim = config["plan"][start] if start < len(config["plan"]) else (None, 0)
    pl.seed_everything(1)
    data = TensorDataset(torch.randn(BATCHES * 4 * WORKERS, 4, generator=torch.Generator().manual_seed(2)))
    trainer = pl.Trainer(max_epochs=config["epochs"], **NOTHING_ON)
    model = Model(kill_at, victim)
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True))
    if rank == 0:
        torch.save([model.state_dict(), trainer.optimizers[0].state_dict()], folder / "end.pt")


def run_with_kills(folder: Path, plan: list[tuple[int, int]], epochs: int) -> tuple[Any, int]:
    """What a run ends with, and how many starts it took."""
    folder.mkdir()
    ray_train = importlib.import_module("ray.train")
    trainer = importlib.import_module("ray.train.torch").TorchTrainer(
        train,
        train_loop_config={"folder": str(folder), "plan": plan, "epochs": epochs},
        scaling_config=ray_train.ScalingConfig(num_workers=WORKERS),
        run_config=ray_train.RunConfig(
            storage_path=str(folder / "ray"), failure_config=ray_train.FailureConfig(max_failures=len(plan))
        ),
    )
    trainer.fit()
    return torch.load(folder / "end.pt"), len(list(folder.glob("start-0-*")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    # Some starts do not reach the end of an epoch, and what they did is done again.
    plan = [(chance.randrange(2 * BATCHES), chance.randrange(WORKERS)) for _ in range(given.kills)]
    epochs = sum(kill_at // BATCHES for kill_at, _ in plan) + 1
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # A busy machine is slow to start things, and workers that Ray makes nicer than others slower still.
    os.environ |= {"RAY_worker_niceness": "0"}
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "600"
    ray = importlib.import_module("ray")
    ray.init(num_cpus=WORKERS + 1, include_dashboard=False, object_store_memory=100 * 2**20)
    with tempfile.TemporaryDirectory() as name:
        killed, starts = run_with_kills(Path(name) / "killed", plan, epochs)
        straight, _ = run_with_kills(Path(name) / "straight", [], epochs)
    equal = str(killed) == str(straight) and all(map(torch.equal, killed[0].values(), straight[0].values()))
    print(f"{given.kills} kills, {starts} starts, {epochs} epochs of {WORKERS} workers", flush=True)
    print(f"final weights: {'those' if equal else 'NOT those'} of a run that was never killed, bit for bit", flush=True)
    ray.shutdown()
    return int(not equal or starts != given.kills + 1)


if __name__ == "__main__":
    sys.exit(main())
