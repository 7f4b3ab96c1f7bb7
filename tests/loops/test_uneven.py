"""Processes with different amounts of training data: nobody waits, and gradients are those of all batches together."""

from __future__ import annotations

import os

import pytest
import torch
from ranks import run_ranks
from support import make_trainer

import fulmen as pl


def batches_of(counts, size=4):
    """Batches of each rank: made from one stream, so that whoever knows the counts knows all of them."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda width: torch.randn(size, width, generator=generator).double()  # noqa: E731
    return [[(draw(3), draw(1)) for _ in range(count)] for count in counts]


STEPS = [0]  # of the newest model: what a module counts itself is put back where a step does not count


class Model(pl.LightningModule):
    """How it optimizes is chosen by a word."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.kind = kind
        torch.manual_seed(3)
        middle = torch.nn.BatchNorm1d(4) if kind == "batchnorm" else torch.nn.Tanh()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), middle, torch.nn.Linear(4, 1)).double()
        self.automatic_optimization = kind != "manual"
        STEPS[0] = 0
        self.hook_calls = 0

    def squares(self, batch):
        return (self.net(batch[0]) - batch[1]) ** 2

    def training_step(self, batch, batch_idx):
        STEPS[0] += 1
        loss = self.squares(batch).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("synced", loss, sync_dist=True)
        self.log("samples", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
        if self.kind == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if self.kind == "weighted":
            return self.squares(batch).sum(), len(batch[0])
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.hook_calls += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Yielding(Model):
    def training_step(self, batch, batch_idx):
        yield self.squares(batch).mean()
        yield (self.net[0](batch[0]) ** 2).mean()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[2].parameters(), lr=0.1), torch.optim.SGD(self.net[0].parameters(), lr=0.1)]


class Clipped(Model):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)


MODELS = {"yielding": Yielding, "closure": Clipped}


def learned(model):
    """Weights, and what batch norm saw."""
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in model.state_dict().values()])


def train(cases):
    """On one rank: weights and what was seen, for each (kind, counts, window, size, sized)."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = []
    for kind, counts, window, size, sized in cases:
        own = batches_of(counts, size)[rank]
        model = MODELS.get(kind, Model)(kind)
        trainer = make_trainer(
            strategy="ddp", devices=world, max_epochs=2, accumulate_grad_batches=window, use_distributed_sampler=False,
            sync_batchnorm=True,
        )  # fmt: skip
        trainer.fit(model, (Sized if sized else Unsized)(own))
        weights = learned(model)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        results.append((weights, STEPS[0], model.hook_calls, trainer.global_step, metrics))
    return results


class Unsized:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Sized(Unsized):
    def __len__(self):
        return len(self.batches)


def alone(kind, counts, window, size, sized):
    """The same training in one process: a plain loop whose gradient is that of all batches of a window."""
    data = batches_of(counts, size)
    model = MODELS.get(kind, Model)(kind)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for start in range(0, max(counts), window):
            batches = [batch for own in data for batch in own[start : start + window]]
            if kind == "batchnorm":
                together = [torch.cat(parts) for parts in zip(*batches)]
                losses = [model.squares(together).mean()]
            else:
                losses = [model.squares(batch).mean() for batch in batches]
            sgd.zero_grad()
            (sum(losses) / len(losses)).backward()
            sgd.step()
    return learned(model)


CASES = {
    2: [
        ("plain", (5, 3), 1, 4, True),
        ("plain", (2, 5), 1, 4, True),
        ("plain", (7, 4), 3, 4, True),
        ("plain", (4, 9), 4, 4, True),
        ("weighted", (5, 2), 2, 4, True),
        ("weighted", (1, 4), 1, 4, True),
        ("manual", (5, 3), 1, 4, True),
        ("closure", (3, 6), 2, 4, True),
        ("batchnorm", (2, 4), 1, 4, True),
        ("plain", (5, 3), 1, 4, False),
        ("plain", (3, 8), 3, 4, False),
    ],
    3: [
        ("plain", (5, 3, 1), 1, 4, True),
        ("plain", (2, 7, 4), 3, 4, True),
        ("weighted", (1, 2, 5), 2, 4, False),
        ("batchnorm", (3, 1, 2), 1, 4, True),
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=[2, 3])
def trained(request):
    cases = CASES[request.param]
    return cases, run_ranks(request.param, train, cases)


def test_weights_are_those_of_one_process_with_all_batches(trained):
    cases, ranks = trained
    for index, case in enumerate(cases):
        expected = alone(*case)
        for rank in ranks:
            torch.testing.assert_close(rank[index][0], expected, rtol=0, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")


def test_all_processes_take_the_same_steps_and_see_the_same_hooks(trained):
    cases, ranks = trained
    for index, (kind, counts, window, _, _) in enumerate(cases):
        rounds = 2 * max(counts)
        steps = 2 * -(-max(counts) // window)
        for rank in ranks:
            assert rank[index][2:4] == (rounds, steps), kind


def test_a_repeated_batch_is_not_logged(trained):
    cases, ranks = trained
    for index, (kind, counts, _, size, _) in enumerate(cases):
        for rank in ranks:
            assert rank[index][4]["samples"] == sum(counts) * size, kind
            assert rank[index][4]["loss_epoch"] == pytest.approx(ranks[0][index][4]["loss_epoch"], abs=1e-12)


def test_the_step_of_a_process_without_a_batch_runs_only_where_others_wait_for_it(trained):
    cases, ranks = trained
    for index, (kind, counts, _, _, _) in enumerate(cases):
        for count, rank in zip(counts, ranks):
            whole = kind in ("manual", "batchnorm")
            assert rank[index][1] == 2 * (max(counts) if whole else count), kind


def yielding():
    return train([("yielding", (2, 4), 1, 4, True)])


def test_optimizers_that_take_turns_see_all_batches():
    ranks = run_ranks(2, yielding)
    data, model = batches_of((2, 4)), Yielding("yielding")
    last, first = model.configure_optimizers()
    for _ in range(2):
        for index in range(4):
            batches = [own[index] for own in data if index < len(own)]
            for sgd, loss in (
                (last, lambda b: model.squares(b).mean()),
                (first, lambda b: (model.net[0](b[0]) ** 2).mean()),
            ):
                model.zero_grad()
                (sum(map(loss, batches)) / len(batches)).backward()
                sgd.step()
    expected = learned(model)
    for rank in ranks:
        torch.testing.assert_close(rank[0][0], expected, rtol=0, atol=1e-12)


class Watched(Model):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.squares(batch).mean())


def everything(folder):
    """Checkpoints, validation and a scheduler while one process has no batch any more."""
    own = batches_of((2, 5))[int(os.environ["RANK"])]
    every = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    best = pl.callbacks.ModelCheckpoint(folder, "best", monitor="val_loss")
    trainer = make_trainer(
        strategy="ddp", devices=2, max_epochs=2, use_distributed_sampler=False, val_check_interval=2,
        enable_checkpointing=True, callbacks=[every, best, pl.callbacks.EarlyStopping("val_loss", mode="max")],
    )  # fmt: skip
    trainer.fit(Watched(), Sized(own), Sized(batches_of((3, 3))[0]))
    return trainer.global_step, float(trainer.callback_metrics["val_loss"])


def test_callbacks_that_meet_go_on_meeting(tmp_path):
    first, second = run_ranks(2, everything, str(tmp_path))
    assert first == second
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"step={step}.ckpt" for step in range(1, first[0] + 1)} | {"best.ckpt"} <= names


def nothing_on_rank_one():
    try:
        train([("plain", (2, 0), 1, 4, True)])
    except RuntimeError as error:
        return str(error)


def test_a_process_without_any_batch_is_refused_in_all_of_them():
    for said in run_ranks(2, nothing_on_rank_one):
        assert "2 on rank 0, 0 on rank 1" in said
        assert "smaller batch size" in said
