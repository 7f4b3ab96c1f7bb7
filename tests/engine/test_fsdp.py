"""FSDP in real processes: the numbers of DDP, and checkpoints that any strategy reads."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from support import SavesAfterFirstEpoch, make_loader, make_trainer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy  # here, so that forked processes have it
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy, size_based_auto_wrap_policy

import fulmen as pl
from fulmen.plugins import DoublePrecision, FSDPPrecision, MixedPrecision
from fulmen.strategies import DDPStrategy, FSDPStrategy
from fulmen.utilities.errors import MisconfigurationException

DEEP = {"auto_wrap_policy": {nn.Sequential}}
DEEPEST = {"auto_wrap_policy": {nn.Linear}}


class Net(pl.LightningModule):
    """Sizes that do not divide by the processes, a layer used without calling it, a norm, a weight of its own."""

    weighted = False

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU())
        self.head = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.ones(3))
        self.losses: list[float] = []
        self.norms: list[float] = []

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.head.weight, self.head.bias) * self.scale.mean()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.losses.append(loss.item())
        weight = 1.0 + 3 * self.global_rank + batch_idx  # ranks and batches differ
        return (loss * weight, weight) if self.weighted else loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None:
            self.norms.append(norm.item())

    def validation_step(self, batch, batch_idx):
        assert not torch.is_grad_enabled()
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        assert not torch.is_inference_mode_enabled()
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Weighted(Net):
    weighted = True


class Layers(Net):
    """Without a parameter of its own, and each layer is called."""

    def __init__(self) -> None:
        super().__init__()
        del self.scale

    def forward(self, x):
        return self.head(self.body(x))


class Overflowing(Layers):
    """In one batch, a gradient is not finite: one number, which one process holds."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + float("inf") * self.head.bias.sum() if batch_idx == 3 else loss


class Manual(Layers):
    """Two backward passes in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.losses.append(loss.item())


class ManualWithOwn(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.lonely = nn.Parameter(torch.zeros(2))


class Tied(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1, 1), nn.Linear(1, 1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(super().forward(x)))


class OnCpu(Net):
    place = "cpu"

    def configure_model(self):
        if not hasattr(self, "extra"):
            with torch.device(self.place):
                self.extra = nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 1))

    def forward(self, x):
        return self.extra(super().forward(x))


class OnMeta(OnCpu):
    """Made where there is no memory."""

    place = "meta"


class WithLBFGS(Layers):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise ValueError("this one")
        return super().training_step(batch, batch_idx)


def fit(strategy, model=Net, devices=2, ckpt_path=None, save=None, callbacks=(), **settings):
    """The model after training."""
    torch.manual_seed(0)
    model = model() if isinstance(model, type) else model
    callbacks = [*callbacks, *([SavesAfterFirstEpoch(save)] if save else [])]
    trainer = make_trainer(strategy=strategy, devices=devices, callbacks=callbacks, **{"max_epochs": 2, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, make_loader(40, 4), ckpt_path=ckpt_path)
    return model


def largest_difference(a, b) -> float:
    a, b = (dict(m if isinstance(m, dict) else m.state_dict()) for m in (a, b))
    assert list(a) == list(b)
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


# ---------------------------------------------------------------------- numbers

CASES = {
    "layers on their own": (Net, {}, DEEP),
    "kept until backward, recomputed": (
        Net, {}, {"sharding_strategy": "SHARD_GRAD_OP", "activation_checkpointing_policy": {nn.Linear}},
    ),
    "accumulated": (Net, {"accumulate_grad_batches": 3}, DEEP),
    "weighted": (Weighted, {}, DEEP),
    "weighted and accumulated": (Weighted, {"accumulate_grad_batches": 3}, DEEP),
    "clipped by norm": (Net, {"gradient_clip_val": 0.1}, DEEP),
    "clipped by value": (Net, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, DEEP),
    "synchronised statistics": (Net, {"sync_batchnorm": True}, DEEP),
    "manual": (Manual, {}, {}),
    "tied": (Tied, {}, {}),
    "bf16-mixed": (Layers, {"precision": "bf16-mixed"}, DEEPEST),
    "16-mixed": (Layers, {"precision": "16-mixed"}, DEEPEST),
    "overflow": (Overflowing, {"precision": "16-mixed"}, {}),
    "bf16-true": (Layers, {"precision": "bf16-true"}, DEEPEST),
}  # fmt: skip
EXACT = [name for name in CASES if "16" not in name and name != "overflow"]


def outcome(model):
    return {"losses": model.losses, "norms": model.norms, "weights": model.state_dict()}


def train_all():
    """Each case with both strategies; and what has no counterpart."""
    found = {}
    for name, (kind, settings, options) in CASES.items():
        for label, strategy in (("ddp", DDPStrategy()), ("fsdp", FSDPStrategy(**options))):
            found[name, label] = outcome(fit(strategy, kind, **settings))
    for precision in ("32-true", "16-true"):
        found[precision] = outcome(fit(FSDPStrategy(), Layers, precision=precision))
    for kind in (OnCpu, OnMeta):
        found[kind.place] = outcome(fit(FSDPStrategy(**DEEP), kind, max_epochs=1))
    return found if torch.distributed.get_rank() == 0 else None


@pytest.fixture(scope="module")
def trained():
    return run_ranks(2, train_all)[0]


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_weights_are_those_of_ddp(trained, name):
    one, two = trained[name, "ddp"], trained[name, "fsdp"]
    assert len(two["losses"]) == 10
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], abs=1e-5)
    assert bool(two["norms"]) is (name == "clipped by norm")
    assert largest_difference(one["weights"], two["weights"]) < 1e-5


def test_the_cases_differ(trained):
    losses = {tuple(trained[name, "fsdp"]["losses"]) for name in EXACT}
    same = 2  # what is recomputed changes nothing, and one case clips so as to end in the same numbers or not
    assert len(losses) >= len(EXACT) - same


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_short_numbers_give_the_losses_of_ddp(trained, name):
    policy = FSDPPrecision(name).mixed_precision_config
    assert policy.param_dtype in (torch.bfloat16, torch.float16) and policy.reduce_dtype is torch.float32
    assert trained[name, "fsdp"]["losses"] == pytest.approx(trained[name, "ddp"]["losses"], rel=0.03)


def test_weights_of_16_bits_are_updated_in_32(trained):
    exact, short = trained["32-true"]["losses"], trained["16-true"]["losses"]
    assert short == pytest.approx(exact, rel=0.03) and short != exact


def test_bfloat16_is_rounded_by_chance_which_differs_where_parameters_are_cut_otherwise(trained):
    """Their neighbours are 2^-8 apart, and what is left to chance grows from step to step in so short a training."""
    spread, copied = trained["bf16-true", "fsdp"]["losses"], trained["bf16-true", "ddp"]["losses"]
    assert spread[:2] == pytest.approx(copied[:2], rel=0.03)
    assert sum(spread) == pytest.approx(sum(copied), rel=0.25)


def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(trained):
    one, two = (trained["overflow", strategy]["weights"] for strategy in ("ddp", "fsdp"))
    assert all(value.isfinite().all() for value in two.values())
    assert largest_difference(one, two) < 0.01  # a step is five times as large


def test_layers_on_the_meta_device_begin_as_if_they_had_been_made_here(trained):
    assert largest_difference(trained["meta"]["weights"], trained["cpu"]["weights"]) == 0


def on_four():
    options = {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2), **DEEP}
    clipped = {"gradient_clip_val": 0.1, "max_epochs": 1, "devices": 4}
    one = outcome(fit(DDPStrategy(), **clipped))
    return one, outcome(fit(FSDPStrategy(**options), **clipped))


def test_hybrid_sharding_is_that_of_ddp_on_four_processes():
    (one, two), *_ = run_ranks(4, on_four)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], abs=1e-5) and len(two["norms"]) == 3


# ---------------------------------------------------------------------- what a process holds


class Looking(pl.Callback):
    """Notes what the parameters are while training, and how much of them is here."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.held = self.all = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        (optimizer,) = trainer.optimizers
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.kinds = {type(p.data).__name__ for p in parameters}
        self.held = sum(p.to_local().numel() + optimizer.state[p]["exp_avg"].to_local().numel() for p in parameters)
        self.all = sum(2 * p.numel() for p in parameters)


def test_a_process_holds_its_part_and_the_caller_gets_the_model_back():
    looking, model = Looking(), Net()
    before = model.head.weight.detach().clone()
    fit(FSDPStrategy(start_method="fork", **DEEP), model=model, callbacks=[looking])
    assert looking.kinds == {"DTensor"}
    assert looking.held < 0.7 * looking.all
    assert {type(p.data) for p in model.parameters()} == {torch.Tensor}
    assert type(model.head) is nn.Linear and not torch.equal(model.head.weight, before)


def afterwards(folder: str):
    """Fits, tests and predicts in this group of processes, one call after the other."""
    torch.manual_seed(torch.distributed.get_rank())  # weights differ, and those of rank 0 count
    model = Net()
    trainer = make_trainer(strategy=FSDPStrategy(**DEEP), devices=2, max_epochs=1)
    parameters = [name for name, _ in model.named_parameters()]
    trainer.fit(model, make_loader(24, 4), make_loader(8, 4))
    elsewhere = [p.is_meta for p in model.parameters()]
    trainer.save_checkpoint(f"{folder}/after.ckpt")
    trainer.test(model, make_loader(8, 4), verbose=False)
    trainer.predict(model, make_loader(8, 4))
    trainer.fit(model, make_loader(24, 4))
    assert type(model) is Net and [name for name, _ in model.named_parameters()] == parameters
    hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks) if hooks]
    return elsewhere, hooks, {key: value for key, value in model.state_dict().items() if not value.is_meta}


def test_calls_follow_each_other_and_leave_no_trace(tmp_path):
    first, second = run_ranks(2, afterwards, str(tmp_path))
    assert not any(first[0]) and all(second[0]), "rank 0 keeps the weights"
    assert first[1] == second[1] == []
    saved = torch.load(tmp_path / "after.ckpt")
    assert len(saved["optimizer_states"][0]["state"]) == len(list(Net().parameters()))
    Net().load_state_dict(saved["state_dict"])
    Net().load_state_dict(first[2])


# ---------------------------------------------------------------------- checkpoints


def save_and_resume(folder: str):
    """Runs that write a checkpoint half-way, and runs that go on from each with each strategy."""
    kinds = {
        "full": partial(FSDPStrategy, **DEEP),
        "sharded": partial(FSDPStrategy, state_dict_type="sharded", **DEEP),
        "ddp": DDPStrategy,
    }
    ends, found = {}, {}
    for kind, strategy in kinds.items():
        ends[kind] = fit(strategy(), save=f"{folder}/{kind}.ckpt").state_dict()
    for written in kinds:
        for reading, strategy in kinds.items():
            found[written, reading] = fit(strategy(), ckpt_path=f"{folder}/{written}.ckpt").state_dict()
    keeping = pl.callbacks.ModelCheckpoint(f"{folder}/best", save_last=True, enable_version_counter=False)
    strategy = FSDPStrategy(state_dict_type="sharded")
    best = fit(strategy, max_epochs=3, callbacks=[keeping], enable_checkpointing=True).state_dict()
    complaints = []
    for written in ("full", "sharded"):
        other = Net()
        other.head2, other.head = nn.Linear(7, 2), nn.Linear(6, 1)
        with pytest.raises(RuntimeError) as caught:
            fit(kinds[written](), model=other, ckpt_path=f"{folder}/{written}.ckpt")
        complaints.append(str(caught.value))
    return ends, found, best, complaints


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, *run_ranks(2, save_and_resume, str(folder))[0]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_resumed_run_ends_in_the_same_bits(written, kind):
    folder, ends, found, *_ = written
    assert os.path.isdir(folder / f"{kind}.ckpt") is (kind == "sharded")
    assert largest_difference(ends[kind], found[kind, kind]) == 0


def test_checkpoints_go_from_one_strategy_to_the_others(written):
    folder, ends, found, *_ = written
    assert len(found) == 9
    for pair, state in found.items():
        assert largest_difference(state, ends["ddp"]) < 1e-5, pair
    full, shards, ddp = (Net.load_from_checkpoint(folder / f"{kind}.ckpt") for kind in ("full", "sharded", "ddp"))
    assert largest_difference(full, shards) == 0
    assert largest_difference(full, ddp) < 1e-5


def test_model_checkpoint_keeps_the_best_folders_and_replaces_the_last(written):
    folder, _, _, best, _ = written
    assert sorted(path.name for path in (folder / "best").iterdir()) == ["epoch=2-step=15.ckpt", "last.ckpt"]
    assert (folder / "best" / "last.ckpt" / "meta.pt").is_file()
    assert largest_difference(Net.load_from_checkpoint(folder / "best" / "epoch=2-step=15.ckpt"), best) == 0


def test_weights_that_do_not_fit_are_named(written):
    for complaint in written[-1]:
        assert "missing: head2.weight" in complaint
        assert "of another shape: head.weight (1, 7) in the file, (1, 6) in the module" in complaint


def resume_on(devices: int, path: str, again: str):
    # A run that is at its end already trains no more.
    model = fit(FSDPStrategy(state_dict_type="sharded"), devices=devices, ckpt_path=path, max_epochs=1)
    state = model.state_dict()
    fit(FSDPStrategy(), devices=devices, ckpt_path=path, max_epochs=2)
    return state


@pytest.mark.parametrize("devices", [1, 3])
def test_shards_are_read_by_another_number_of_processes(written, tmp_path, devices):
    path = str(written[0] / "sharded.ckpt")
    state = run_ranks(devices, resume_on, devices, path, str(tmp_path / "again.ckpt"))[0]
    assert largest_difference(state, Net.load_from_checkpoint(path)) == 0


def test_a_folder_becomes_a_file(written, tmp_path):
    path, target = written[0] / "sharded.ckpt", tmp_path / "one.ckpt"
    command = [sys.executable, "-m", "fulmen.utilities.consolidate_checkpoint", str(path), "--output_file", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(Path(pl.__file__).parents[1])}
    subprocess.run(command, check=True, env=environment)
    whole = torch.load(target)
    assert largest_difference(Net.load_from_checkpoint(path), Net.load_from_checkpoint(target)) == 0
    optimizer = Net().configure_optimizers()
    optimizer.load_state_dict(whole["optimizer_states"][0])
    assert {name for state in optimizer.state.values() for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    from fulmen.checkpoint.consolidate import consolidate

    with pytest.raises(FileExistsError, match="--output_file"):
        consolidate(path, target)
    with pytest.raises(FileNotFoundError, match="not a sharded checkpoint"):
        consolidate(tmp_path)


# ---------------------------------------------------------------------- mistakes


def break_and_refuse(folder: str):
    """What is said, of each mistake."""
    said = {}
    for model, options, error in (
        (ManualWithOwn(), {}, MisconfigurationException),
        (Net(), DEEPEST, RuntimeError),
        (Tied(), DEEPEST, MisconfigurationException),
        (WithLBFGS(), {}, MisconfigurationException),
    ):
        with pytest.raises(error) as caught:
            fit(FSDPStrategy(**options), model=model)
        said[type(model).__name__] = str(caught.value)
    saving = pl.callbacks.OnExceptionCheckpoint(folder)
    trainer = make_trainer(strategy=FSDPStrategy(), devices=2, callbacks=[saving], enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as told, pytest.raises(ValueError, match="this one"):
        warnings.simplefilter("always")
        trainer.fit(Failing(), make_loader(40, 4))
    said["Failing"] = "\n".join(str(warning.message) for warning in told)
    return said


def test_mistakes_are_named_and_nobody_waits(tmp_path):
    said = run_ranks(2, break_and_refuse, str(tmp_path))[0]
    assert "lonely are in no layer of `ManualWithOwn`" in said["ManualWithOwn"]
    assert "Call the layer, or leave it out of `auto_wrap_policy`" in said["Net"]
    assert "`one.weight` and `two.weight` are the same parameter" in said["Tied"]
    assert "LBFGS" in said["WithLBFGS"]
    assert "No checkpoint is written" in said["Failing"] and "spread over processes" in said["Failing"]
    assert not list(tmp_path.iterdir()), "a checkpoint that others may not help to write is not begun"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sharding_strategy": "NO_SHARD"}, ValueError, "strategy='ddp'"),
        ({"sharding_strategy": "FULL"}, ValueError, "FULL_SHARD"),
        ({"state_dict_type": "local"}, ValueError, "'full' or 'sharded'"),
        ({"device_mesh": (2, 2)}, ValueError, "HYBRID_SHARD"),
        ({"use_orig_params": False}, ValueError, "use_orig_params"),
        ({"ignored_modules": []}, ValueError, "requires_grad_"),
        ({"auto_wrap_polcy": {nn.Linear}}, TypeError, "Did you mean `auto_wrap_policy`"),
        (
            {"activation_checkpointing": {nn.Linear}, "activation_checkpointing_policy": {nn.Linear}},
            ValueError,
            "former",
        ),
        ({"mixed_precision": "bf16"}, TypeError, "MixedPrecisionPolicy"),
        ({"precision_plugin": DoublePrecision()}, TypeError, "FSDPPrecision"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        FSDPStrategy(**arguments)


def test_arguments_without_meaning_are_said(caplog):
    FSDPStrategy(use_orig_params=True, limit_all_gathers=True, param_init_fn=None)
    assert not caplog.text
    FSDPStrategy(forward_prefetch=True)
    assert "`FSDPStrategy(forward_prefetch=...)` changes nothing" in caplog.text


@pytest.mark.parametrize("precision", ["64-true", "transformer-engine", "half"])
def test_precisions_that_are_not_spread_are_refused(precision):
    with pytest.raises(ValueError, match="32-true"):
        FSDPPrecision(precision)


def test_names_and_precisions_lead_to_the_strategy():
    for name in ("fsdp", "fsdp_cpu_offload"):
        trainer = make_trainer(devices=2, strategy=name, precision="bf16-mixed")
        assert type(trainer.strategy) is FSDPStrategy and trainer.precision == "bf16-mixed"
        assert bool(trainer.strategy.cpu_offload) is (name == "fsdp_cpu_offload")
    assert FSDPStrategy.get_registered_strategies() == ["fsdp", "fsdp_cpu_offload"]
    with pytest.raises(ValueError, match="64-true"):
        make_trainer(devices=2, strategy="fsdp", precision="64-true")
    known = FSDPStrategy(precision_plugin=MixedPrecision("16-mixed", "cpu")).precision_plugin
    assert type(known) is FSDPPrecision and known.precision == "16-mixed"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert FSDPStrategy(mixed_precision=policy).mixed_precision_config is policy


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({nn.Linear}, ["body.0", "head"]),
        (partial(lambda_auto_wrap_policy, lambda_fn=lambda part: isinstance(part, nn.Linear)), ["body.0", "head"]),
        (partial(size_based_auto_wrap_policy, min_num_params=30), ["body"]),
    ],
)
def test_policies_choose_layers(policy, expected):
    from fulmen.engine.fsdp import select_modules

    net = Layers()
    found = select_modules(net, policy)
    assert [name for name, part in net.named_modules() if part in found] == expected


# ---------------------------------------------------------------------- what looks at gradients


class Faulty(Net):
    """One gradient of the second batch is no number, in a parameter that one process holds alone."""

    def on_train_batch_start(self, batch, batch_idx):
        self.spoil = batch_idx == 1

    def on_before_optimizer_step(self, optimizer):
        norms = pl.utilities.grad_norm(self, 2)
        self.norms.append([value.item() for value in norms.values()])

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + torch.nan * self.head.bias.sum() if self.spoil else loss


def watched(kind, options):
    found = {}
    for policy in ("skip", "rollback", "stop"):
        guard = pl.callbacks.NonFiniteGuard(policy, every_n_steps=1)
        model = Faulty()
        try:
            model = fit(kind(**options), model, callbacks=[guard, pl.callbacks.GradientNorm()], max_epochs=1)
        except pl.callbacks.guard.NonFiniteError as error:
            found[policy] = str(error)
            continue
        faults = [(fault.step, fault.batch_idx, fault.parameter) for fault in guard.quarantine]
        found[policy] = (
            faults,
            model.trainer.global_step,
            [norm for norms in model.norms for norm in norms if sum(norms) == sum(norms)],
        )
        if model.global_rank == 0:
            found[policy] += ({name: value.clone() for name, value in model.state_dict().items()},)
    return found


def test_a_fault_in_the_part_of_one_process_is_seen_by_all():
    ddp, _ = run_ranks(2, watched, DDPStrategy, {})
    fsdp, other = run_ranks(2, watched, FSDPStrategy, DEEP)
    assert fsdp["stop"] == other["stop"] == ddp["stop"] and "head.bias" in ddp["stop"]
    for policy in ("skip", "rollback"):
        assert fsdp[policy][:2] == other[policy][:2] == ddp[policy][:2] and len(ddp[policy][0]) == 1
        assert fsdp[policy][2] == other[policy][2] == pytest.approx(ddp[policy][2], rel=1e-5)
        assert largest_difference(fsdp[policy][3], ddp[policy][3]) < 1e-6
