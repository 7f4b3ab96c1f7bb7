"""Training on several real processes over gloo, compared with one process that sees the large batch.

Processes are forked: what a test prepared is there, and nothing has to be imported again.
"""

import copy
import os
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support import Regression, make_loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.plugins import MixedPrecision, TorchCheckpointIO, TorchSyncBatchNorm
from fulmen.strategies import DDPStrategy
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
SAMPLES = 48


class Net(pl.LightningModule):
    """Three layers, momentum, and whatever a test puts in."""

    def __init__(self, *between):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), *between, nn.Tanh(), nn.Linear(6, 1))

    def loss(self, batch, reduction="mean"):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1], reduction=reduction)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(dim=1, keepdim=True).sin())


def loader(batch_size, samples=SAMPLES, **options):
    return DataLoader(data(samples), batch_size=batch_size, **options)


def fitted(model, devices, batch_size=12, **arguments):
    """A copy of the model, trained; each process takes its part of the batch size."""
    model = copy.deepcopy(model)
    strategy = arguments.pop("strategy", "ddp_fork") if devices > 1 else "auto"
    options = {"max_epochs": 2, "precision": "64-true", **arguments}
    trainer = make_trainer(devices=devices, strategy=strategy, **options)
    trainer.fit(model, loader(batch_size // devices))
    return model


def assert_same(one, other, tolerance=1e-12):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def by_hand(model, batch_size=12, epochs=2):
    """The loop one would write for one process."""
    model = copy.deepcopy(model).double()
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for batch in loader(batch_size):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    return model


def per_rank(tmp_path, devices=2):
    return [torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in range(devices)]


# ---------------------------------------------------------------------- the numbers of one device


@pytest.mark.parametrize("devices", [2, 4])
def test_weights_are_those_of_one_process_with_the_large_batch(devices):
    model = Net()
    assert_same(fitted(model, devices), by_hand(model))


@pytest.mark.parametrize("arguments", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_options_of_a_step_mean_the_same_on_several_devices(arguments):
    model = Net()
    assert_same(fitted(model, 2, **arguments), fitted(model, 1, **arguments))


def test_accumulated_gradients_are_those_of_the_larger_batch():
    model = Net()
    assert_same(fitted(model, 2, batch_size=6, accumulate_grad_batches=2), by_hand(model))


def test_a_shuffled_loader_stays_shuffled_and_every_sample_is_seen_once(tmp_path):
    class Sees(Net):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0][:, 0])
            return self.loss(batch)

        def on_train_epoch_start(self):
            self.seen = []

        def on_train_epoch_end(self):
            self.epochs = [*getattr(self, "epochs", []), torch.cat(self.seen)]

        def on_train_end(self):
            torch.save(self.epochs, tmp_path / f"rank-{self.global_rank}")

    trainer = make_trainer(devices=2, strategy="ddp_fork", max_epochs=2, precision="64-true")
    trainer.fit(Sees(), loader(6, shuffle=True))
    first, second = (torch.cat(parts) for parts in zip(*per_rank(tmp_path)))
    all_samples = data().tensors[0][:, 0]
    for epoch in (first, second):
        assert torch.equal(epoch.sort().values, all_samples.sort().values)
    assert not torch.equal(first, second) and not torch.equal(first, all_samples)


class Weighs(Net):
    """The loss of a batch is a sum over the rows that count."""

    as_tensor = True

    def training_step(self, batch, batch_idx):
        counts = batch[0][:, 0] > 0
        loss = ((self.net(batch[0]) - batch[1]) ** 2)[counts].sum()
        return loss, counts.sum() if self.as_tensor else int(counts.sum())


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_weights_of_losses_count_over_all_processes(window, as_tensor):
    model = Weighs()
    model.as_tensor = as_tensor
    # 48 samples in batches of 4: the last window of an epoch is shorter when 3 do not divide 6 batches of each of 2
    alone = fitted(model, 1, batch_size=10, accumulate_grad_batches=window)
    assert_same(fitted(model, 2, batch_size=10, accumulate_grad_batches=window), alone, 1e-12)


class Adversaries(Net):
    """Two optimizers whose losses reach different parameters."""

    def __init__(self, accumulate=1):
        super().__init__()
        self.other = nn.Linear(1, 1)
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch, batch_idx):
        steps = (batch_idx + 1) % self.accumulate == 0
        for index, optimizer in enumerate(self.optimizers()):
            with optimizer.toggle_model(sync_grad=steps):
                out = self.net(batch[0])
                loss = (
                    (self.other(out) - batch[1]).square().mean()
                    if index
                    else (out * self.other.weight - 1).abs().mean()
                )
                self.manual_backward(loss / self.accumulate)
            if steps:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.Adam(self.other.parameters(), lr=0.1)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_fork_find_unused_parameters_true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_manual_optimization_of_two_that_share_no_parameters(accumulate, strategy):
    model = Adversaries(accumulate)
    assert_same(fitted(model, 2, strategy=strategy), fitted(model, 1))


class TakesTurns(Adversaries):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        yield (self.net(batch[0]) * self.other.weight - batch[1]).square().mean()
        yield None if batch_idx == 2 else (self.other(self.net(batch[0])) - batch[1]).square().mean()


class TakesTurnsByWeight(TakesTurns):
    def training_step(self, batch, batch_idx):
        for _ in range(2):
            counts = batch[0][:, 0] > 0
            yield (self.other(self.net(batch[0])) - batch[1])[counts].square().sum(), counts.sum()


@pytest.mark.parametrize("kind", [TakesTurns, TakesTurnsByWeight])
@pytest.mark.parametrize("window", [1, 2])
def test_optimizers_that_take_turns(kind, window):
    model = kind()
    arguments = {"accumulate_grad_batches": window}
    assert_same(fitted(model, 2, **arguments), fitted(model, 1, **arguments))


def test_lbfgs_evaluates_several_times():
    class Quadratic(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    model = Quadratic()
    assert_same(fitted(model, 2), fitted(model, 1), 1e-10)


def test_parameters_that_learn_later_are_averaged_too():
    class Thaws(Net):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 1)

        def setup(self, stage):
            self.net[0].requires_grad_(False)

    model = Thaws()
    assert_same(fitted(model, 2), fitted(model, 1))


# ---------------------------------------------------------------------- batch norm


def test_synchronised_batch_norm_is_that_of_the_large_batch_and_is_taken_out_again(tmp_path):
    model = Net(nn.BatchNorm1d(6))
    several = fitted(model, 2, sync_batchnorm=True)
    assert_same(several, fitted(model, 1))
    assert type(several.net[1]) is nn.BatchNorm1d


def test_a_plugin_may_synchronise_layers():
    model = Net(nn.BatchNorm1d(6))
    assert_same(fitted(model, 2, plugins=TorchSyncBatchNorm()), fitted(model, 1))


def test_statistics_of_batch_norm_are_those_of_rank_0_when_they_are_read(tmp_path):
    class Reads(Net):
        def on_validation_epoch_end(self):
            self.read("validation")

        def on_test_epoch_end(self):
            self.read("test")

        test_step = Net.validation_step

        def read(self, name):
            torch.save(self.net[1].running_mean, tmp_path / f"{name}-{self.global_rank}")

    model = Reads(nn.BatchNorm1d(6))
    trainer = make_trainer(devices=2, strategy="ddp_fork", precision="64-true")
    trainer.fit(model, loader(6), loader(6))
    trainer.test(model, loader(6), verbose=False)
    values = [torch.load(tmp_path / f"{name}-{rank}") for name in ("validation", "test") for rank in (0, 1)]
    assert all(torch.equal(value, model.net[1].running_mean) for value in values)
    assert not torch.equal(values[0], torch.zeros(6, dtype=torch.float64))


# ---------------------------------------------------------------------- what is exchanged, and when


class Counts(pl.callbacks.Callback):
    """Collectives of any kind, C++ and Python, that happened until the end of each batch."""

    def __init__(self):
        self.so_far = []

    def on_train_batch_end(self, *_):
        self.so_far.append(dist.group.WORLD._get_sequence_number_for_group())

    @property
    def per_batch(self):
        return [after - before for before, after in zip(self.so_far, self.so_far[1:])]


def collectives(model, **arguments):
    counts = Counts()
    options = {"max_epochs": 1, "strategy": "ddp_fork", **arguments}
    callbacks = [counts, *options.pop("callbacks", [])]
    trainer = make_trainer(devices=2, callbacks=callbacks, **options)
    trainer.fit(model.float(), make_loader(40, 2))
    return counts.per_batch


def test_a_batch_exchanges_its_gradients_and_nothing_else():
    # From the second to the third batch DDP puts gradients into buckets as they come, once.
    assert collectives(Net())[1:] == [1] * 8


def test_metrics_loggers_and_buffers_of_batch_norm_exchange_nothing(tmp_path):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
            return loss

    everything = {"logger": True, "enable_checkpointing": True, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    assert collectives(Logs(nn.BatchNorm1d(6)), **everything)[1:] == [1] * 8


def test_a_window_exchanges_its_gradients_once():
    # batches 4 to 9, of which the last one ends an epoch
    assert collectives(Net(), accumulate_grad_batches=3)[3:] == [0, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("window", [1, 3])
def test_weights_of_losses_cost_one_more(window):
    found = collectives(Weighs(), accumulate_grad_batches=window)
    assert found[3:] == {1: [2] * 6, 3: [0, 2, 0, 0, 2, 2]}[window]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_manual_optimization_exchanges_once_per_backward_and_window(accumulate):
    found = collectives(Adversaries(accumulate))
    assert found == {1: [2] * 9, 3: [0, 2, 0, 0, 2, 0, 0, 2, 0]}[accumulate]


def test_a_hook_of_the_user_sees_the_gradients():
    seen = []

    def hook(state, bucket):
        state.append(bucket.buffer().numel())
        tensor = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])

    class Seen(pl.callbacks.Callback):
        def on_train_end(self, *_):
            self.seen = seen

    reader, model = Seen(), Net()
    strategy = DDPStrategy(start_method="fork", ddp_comm_state=seen, ddp_comm_hook=hook)
    assert_same(fitted(model, 2, strategy=strategy, callbacks=[reader]), by_hand(model))
    assert reader.seen == [sum(parameter.numel() for parameter in model.parameters())] * 8


# ---------------------------------------------------------------------- what is refused, and how it is said


class LeavesOut(Net):
    """One layer takes no part in the loss."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 1}], ids=str)
def test_parameters_without_gradient_are_named_after_the_first_step(arguments):
    class Says(LeavesOut):
        def training_step(self, batch, batch_idx):
            if self.global_step > 0:
                raise AssertionError("too late")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"'spare.weight', 'spare.bias'.*find_unused_parameters_true"):
        fitted(Says(), 2, max_epochs=1, **arguments)


def test_parameters_that_lose_their_gradient_later_are_named():
    class Later(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (self.scale if batch_idx < 2 else 1)

    with pytest.raises(RuntimeError, match=r"'scale'.*find_unused_parameters_true"):
        fitted(Later(), 2)


def test_unused_parameters_may_be_allowed():
    model = LeavesOut()
    strategy = "ddp_fork_find_unused_parameters_true"
    assert_same(fitted(model, 2, strategy=strategy), by_hand(model))


def test_a_step_without_loss_cannot_be_skipped_by_one_process():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if self.global_rank == 1 and batch_idx == 1 else self.loss(batch)

    with pytest.raises(RuntimeError, match=r"returned None on rank 1 of 2.*`0 \* loss`"):
        fitted(Skips(), 2)


def test_an_optimizer_cannot_sit_out_the_batch_that_ends_its_window():
    class SitsOut(TakesTurns):
        def training_step(self, batch, batch_idx):
            yield self.loss(batch)
            loss = (self.other(self.net(batch[0])) - batch[1]).square().mean()
            yield None if batch_idx == 1 else loss

    with pytest.raises(RuntimeError, match="yielded None on rank"):
        fitted(SitsOut(), 2, accumulate_grad_batches=2)


def test_lazy_layers_must_have_seen_a_batch():
    model = Net()
    model.net[0] = nn.LazyLinear(6)
    with pytest.raises(RuntimeError, match=r"lazy layers.*configure_model"):
        fitted(model, 2)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="Did you mean `find_unused_parameters`"):
        DDPStrategy(find_unused_parameter=True)
    with pytest.raises(MisconfigurationException, match="model_averaging_period=3"):
        DDPStrategy(model_averaging_period=3)
    with pytest.raises(ValueError, match="'frok', which this platform cannot"):
        make_trainer(devices=2, strategy=DDPStrategy(start_method="frok"))


def test_manual_optimization_has_no_place_for_a_hook():
    strategy = DDPStrategy(start_method="fork", ddp_comm_hook=print)
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        fitted(Adversaries(), 2, strategy=strategy)


# ---------------------------------------------------------------------- for users


class Reports(Net):
    """Keeps what the trainer says on each rank."""

    folder = None

    def on_train_start(self):
        trainer, strategy = self.trainer, self.trainer.strategy
        rank = float(self.global_rank)
        told = {
            "ranks": (trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size),
            "zero": trainer.is_global_zero,
            "devices": (trainer.num_devices, trainer.num_nodes),
            "sampler": trainer.distributed_sampler_kwargs,
            "mean": strategy.reduce(torch.tensor(rank)),
            "mean of whole numbers": strategy.reduce(torch.tensor(int(rank))),
            "sum": strategy.reduce(torch.tensor([rank, 1.0]), reduce_op="sum"),
            "max": strategy.reduce(torch.tensor(rank), reduce_op=dist.ReduceOp.MAX),
            "text": strategy.reduce("text"),
            "object": strategy.broadcast({"rank": rank}),
            "object of 1": strategy.broadcast([rank], src=1),
            "gathered": self.all_gather({"a": rank, "b": torch.full((2,), rank)}),
            "all": strategy.reduce_boolean_decision(rank == 0),
            "any": strategy.reduce_boolean_decision(rank == 0, all=False),
            "wrapped": type(trainer.model).__name__,
            "module": trainer.model.module is trainer.lightning_module is self,
        }
        x = torch.tensor(rank, requires_grad=True)
        (self.all_gather(x, sync_grads=True) * (rank + 1)).sum().backward()
        told["gradient"] = x.grad
        with pytest.raises(ValueError, match="meen"):
            strategy.reduce(torch.ones(1), reduce_op="meen")
        strategy.barrier()
        torch.save(told, self.folder / f"rank-{self.global_rank}")


def test_what_the_trainer_and_its_strategy_say(tmp_path):
    model = Reports()
    model.folder = tmp_path
    fitted(model, 2)
    for rank, told in enumerate(per_rank(tmp_path)):
        assert told["ranks"] == (rank, rank, 0, 2) and told["zero"] is (rank == 0)
        assert told["devices"] == (2, 1) and told["sampler"] == {"num_replicas": 2, "rank": rank}
        assert (
            told["mean"] == told["mean of whole numbers"] == 0.5
            and told["mean of whole numbers"].dtype == torch.float32
        )
        assert told["sum"].tolist() == [1, 2] and told["max"] == 1 and told["text"] == "text"
        assert told["object"] == {"rank": 0.0} and told["object of 1"] == [1.0]
        assert told["gathered"]["a"].tolist() == [0, 1] and told["gathered"]["b"].tolist() == [[0, 0], [1, 1]]
        assert told["all"] is False and told["any"] is True
        assert told["wrapped"] == "DistributedDataParallel" and told["module"] is True
        assert told["gradient"] == 3  # of what both processes made of it


def test_a_checkpoint_is_that_of_one_device_and_continues(tmp_path):
    model = Net(nn.BatchNorm1d(6)).double()
    whole = fitted(model, 2, max_epochs=4, sync_batchnorm=True)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="half")
    half = make_trainer(
        devices=2, strategy="ddp_fork", precision="64-true", max_epochs=2, sync_batchnorm=True, callbacks=[checkpoint],
        enable_checkpointing=True,
    )  # fmt: skip
    half.fit(copy.deepcopy(model), loader(6))
    assert checkpoint.best_model_path == str(tmp_path / "half.ckpt") and os.listdir(tmp_path) == ["half.ckpt"]
    content = torch.load(checkpoint.best_model_path)
    assert content["state_dict"].keys() == model.state_dict().keys()
    assert content["global_step"] == 8 == half.global_step
    for devices in (1, 2):
        rest = make_trainer(
            devices=devices, strategy="ddp_fork" if devices == 2 else "auto", precision="64-true", max_epochs=4,
            sync_batchnorm=True,
        )  # fmt: skip
        continued = copy.deepcopy(model)
        rest.fit(continued, loader(12 // devices), ckpt_path=checkpoint.best_model_path)
        assert_same(continued, whole)


def test_a_checkpoint_that_cannot_be_written_stops_all(tmp_path):
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            raise OSError("the disk is full")

    class Saves(Net):
        def on_train_end(self):
            with pytest.raises((OSError, RuntimeError), match="disk is full"):
                self.trainer.save_checkpoint(tmp_path / "x.ckpt")
            torch.save(True, tmp_path / f"rank-{self.global_rank}")

    fitted(Saves(), 2, plugins=Full())
    assert per_rank(tmp_path) == [True, True]


def test_samplers_are_left_alone_when_asked_to(tmp_path):
    class Sees(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            torch.save(self.trainer.num_training_batches, tmp_path / f"rank-{self.global_rank}")

    fitted(Sees(), 2, use_distributed_sampler=False)
    assert per_rank(tmp_path) == [8, 8]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_other_precisions_keep_processes_together(precision, tmp_path):
    class Ends(Net):
        def on_train_end(self):
            torch.save([parameter.detach() for parameter in self.parameters()], tmp_path / f"rank-{self.global_rank}")

    trainer = make_trainer(devices=2, strategy="ddp_fork", precision=precision)
    trainer.fit(Ends(), make_loader(24, 4))
    first, second = per_rank(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_validate_test_and_predict_start_from_the_weights_of_rank_0(tmp_path):
    class Asked(Regression):
        def on_validation_start(self):
            torch.save(self.layer.weight.detach(), tmp_path / f"rank-{self.global_rank}")

        def configure_model(self):
            if "LOCAL_RANK" in os.environ:
                nn.init.constant_(self.layer.weight, float(os.environ["LOCAL_RANK"]))

    trainer = make_trainer(devices=2, strategy="ddp_fork")
    results = trainer.validate(Asked(), make_loader(), verbose=False)
    assert list(results[0]) == ["val_loss"] and [weight.tolist() for weight in per_rank(tmp_path)] == [[[0] * 4]] * 2


def test_preparing_data_may_take_longer_than_a_collective_may(tmp_path):
    class Prepares(Net):
        def prepare_data(self):
            time.sleep(3)
            (tmp_path / f"prepared-{self.global_rank}").touch()

    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=2))
    fitted(Prepares(), 2, strategy=strategy)
    assert os.listdir(tmp_path) == ["prepared-0"]


def test_the_log_dir_can_be_asked_for_by_one_process_alone(tmp_path):
    class Asks(Net):
        def on_train_start(self):
            if self.global_rank == 1:
                torch.save(self.trainer.log_dir, tmp_path / "rank-1")

    trainer = make_trainer(devices=2, strategy="ddp_fork", logger=pl.loggers.CSVLogger(tmp_path))
    trainer.fit(Asks().double(), loader(6))
    assert torch.load(tmp_path / "rank-1") == trainer.log_dir == str(tmp_path / "lightning_logs" / "version_0")


def test_small_batches_of_batch_norm_are_mentioned():
    fit = lambda **arguments: fitted(Net(nn.BatchNorm1d(6)), 2, batch_size=4, max_epochs=1, **arguments)  # noqa: E731
    warned = []

    class Listens(pl.callbacks.Callback):
        def setup(self, *_, **__):
            self.context = warnings.catch_warnings(record=True)
            self.found = self.context.__enter__()
            warnings.simplefilter("always")

        def on_train_start(self, *_):
            self.said = [str(warning.message) for warning in self.found]
            del self.context, self.found

    for arguments in ({}, {"sync_batchnorm": True}):
        listens = Listens()
        fit(callbacks=[listens], **arguments)
        warned.append(any("2 samples on each of 2 devices" in said for said in listens.said))
    assert warned == [True, False]


def test_a_compiled_module_learns_the_same():
    model = Net()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    trainer = make_trainer(devices=2, strategy="ddp_fork", precision="64-true", max_epochs=2)
    trainer.fit(compiled, loader(6))
    assert_same(trainer.lightning_module, by_hand(model))


@pytest.mark.parametrize(("precision", "tolerance"), [("16-true", 5e-3), ("bf16-true", 5e-2), ("16-mixed", 5e-3)])
def test_weights_of_short_numbers_are_those_of_one_process_too(precision, tolerance):
    """Also after the first update, which must not make autograd forget that DDP listens to the gradients."""
    found = []
    for devices in (1, 2):
        torch.manual_seed(0)
        model = Regression(lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        numbers = (
            {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
            if precision == "16-mixed"
            else {"precision": precision}
        )
        strategy = "ddp_fork" if devices == 2 else "auto"
        make_trainer(devices=devices, strategy=strategy, max_epochs=4, **numbers).fit(
            model, make_loader(32, batch_size=8 // devices)
        )
        found.append(torch.cat([p.detach().float().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=tolerance)
