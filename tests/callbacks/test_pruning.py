"""Weights that are set to zero while training, beside a loop written by hand with `torch.nn.utils.prune`."""

from __future__ import annotations

import logging

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn
from torch.nn.utils import prune

from fulmen import seed_everything
from fulmen.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, ModelPruning
from fulmen.checkpoint.pruned import apply_masks
from fulmen.utilities.errors import MisconfigurationException


class Net(Regression):
    """Two layers and a norm; Adam has a state for each parameter."""

    def __init__(self, lr: float = 0.05):
        super().__init__(lr)
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 1))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)


class SavesOnce(Callback):
    """Writes a checkpoint when a hook runs for the n-th time."""

    def __init__(self, path, hook: str, count: int):
        self.path = path
        self.left = count
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def make_net() -> Net:
    seed_everything(3, verbose=False)
    return Net()


def fit(pruning, epochs: int = 3, callbacks=(), ckpt_path=None, net=None, **options):
    net = net or make_net()
    trainer = make_trainer(max_epochs=epochs, callbacks=[pruning, *callbacks], **options)
    trainer.fit(net, make_loader(), ckpt_path=ckpt_path)
    return net, trainer


def train_by_hand(prune_parameters, epochs: int = 3) -> Net:
    net = make_net()
    optimizer = net.configure_optimizers()
    for epoch in range(epochs):
        for x, y in make_loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        prune_parameters(net, epoch)
    return net


def pairs_of(net: Net, names=("weight", "bias")):
    return [(net.layer[i], name) for name in names for i in (0, 2, 3)]


def permanent(net: Net) -> Net:
    for layer in net.layer:
        for name in ("weight", "bias"):
            if hasattr(layer, f"{name}_mask"):
                prune.remove(layer, name)
    return net


def assert_same(one, other) -> None:
    one, other = dict(one), dict(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def plain_weights(net: Net) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in apply_masks(net.state_dict()).items()}


def globally(method):
    return lambda net, epoch: prune.global_unstructured(pairs_of(net), pruning_method=method, amount=0.3)


def locally(function, names=("weight", "bias"), **options):
    def apply(net, epoch):
        for layer, name in [pair for pair in pairs_of(net, names) if pair[0].weight.dim() > 1 or names != ("weight",)]:
            function(layer, name, amount=0.5, **options)

    return apply


PLAIN = {"use_lottery_ticket_hypothesis": False}
LINEAR_ONLY = {"parameter_names": ["weight"], "use_global_unstructured": False, "pruning_dim": 1, "amount": 0.5}


class NoNorm(ModelPruning):
    def filter_parameters_to_prune(self, parameters_to_prune=()):
        return [(layer, name) for layer, name in parameters_to_prune if not isinstance(layer, nn.LayerNorm)]


@pytest.mark.parametrize(
    ("make", "by_hand"),
    [
        (lambda: ModelPruning("l1_unstructured", amount=0.3, **PLAIN), globally(prune.L1Unstructured)),
        (lambda: ModelPruning(prune.RandomUnstructured, amount=0.3, **PLAIN), globally(prune.RandomUnstructured)),
        (
            lambda: ModelPruning("random_unstructured", use_global_unstructured=False, **PLAIN),
            locally(prune.random_unstructured),
        ),
        (
            lambda: NoNorm("ln_structured", pruning_norm=2, **LINEAR_ONLY, **PLAIN),
            locally(prune.ln_structured, ("weight",), n=2, dim=1),
        ),
        (
            lambda: NoNorm("random_structured", **LINEAR_ONLY, **PLAIN),
            locally(prune.random_structured, ("weight",), dim=1),
        ),
    ],
    ids=["l1", "random", "random each", "rows by norm", "rows at random"],
)
def test_weights_are_those_of_the_loop_written_by_hand(make, by_hand):
    net, _ = fit(make())
    hand = permanent(train_by_hand(by_hand))
    assert_same(net.named_parameters(), hand.named_parameters())
    assert any((parameter == 0).any() for parameter in net.parameters())
    assert not list(net.buffers())


def test_what_is_due_is_asked_of_the_epoch():
    asked = []

    def answer(name, value):
        return lambda epoch: asked.append((name, epoch)) or value(epoch)

    pruning = ModelPruning(
        "l1_unstructured",
        amount=answer("amount", lambda epoch: [0, 0.5, 0.25][epoch]),
        apply_pruning=answer("apply", lambda epoch: epoch != 2),
        use_lottery_ticket_hypothesis=answer("rewind", lambda epoch: False),
    )
    net, _ = fit(pruning)
    assert asked == [
        ("apply", 0),
        ("amount", 0),
        ("apply", 1),
        ("amount", 1),
        ("rewind", 1),
        ("apply", 2),
        ("amount", 2),
    ]

    def by_hand(net, epoch):
        if epoch == 1:
            prune.global_unstructured(pairs_of(net), pruning_method=prune.L1Unstructured, amount=0.5)

    assert_same(net.named_parameters(), permanent(train_by_hand(by_hand)).named_parameters())


def test_pruning_after_validation_happens_in_training_runs_only():
    pruning = ModelPruning("l1_unstructured", amount=2, prune_on_train_epoch_end=False, **PLAIN)
    net = make_net()
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=2, val_check_interval=1, callbacks=[pruning])
    trainer.fit(net, make_loader(), make_loader())
    assert (
        sum(int((parameter == 0).sum()) for parameter in net.parameters()) == 6
    )  # three validations, two elements each
    trainer.validate(net, make_loader(), verbose=False)
    assert sum(int((parameter == 0).sum()) for parameter in net.parameters()) == 6


def test_a_lottery_ticket_has_the_values_from_before_training_each_time():
    first = {name: parameter.detach().clone() for name, parameter in make_net().named_parameters()}
    seen = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for name, value in first.items():
                path, _, kind = name.rpartition(".")
                layer = pl_module.get_submodule(path)
                assert torch.equal(getattr(layer, f"{kind}_orig"), value)
                assert torch.equal(getattr(layer, kind), value * getattr(layer, f"{kind}_mask"))
            seen.append(trainer.current_epoch)

    with pytest.warns(UserWarning, match="values before training, and training ended there"):
        fit(ModelPruning("l1_unstructured", amount=0.3), callbacks=[Looks()])
    assert seen == [0, 1, 2]


def test_new_values_are_drawn_if_asked_for():
    pruning = ModelPruning("l1_unstructured", amount=0.3, resample_parameters=True, make_pruning_permanent=False)
    with pytest.warns(UserWarning, match="training ended there"):
        net, _ = fit(pruning, epochs=1)
    seed_everything(3, verbose=False)
    hand = train_by_hand(globally(prune.L1Unstructured), epochs=1)  # training draws nothing
    for i, fresh in ((0, nn.Linear(4, 8)), (2, nn.LayerNorm(8)), (3, nn.Linear(8, 1))):
        for name in ("weight", "bias"):
            assert torch.equal(getattr(net.layer[i], f"{name}_orig"), getattr(fresh, name))
            assert torch.equal(getattr(net.layer[i], f"{name}_mask"), getattr(hand.layer[i], f"{name}_mask"))


@pytest.mark.parametrize("make_permanent", [True, False], ids=["permanent", "masked"])
@pytest.mark.parametrize("lottery", [True, False], ids=["lottery", "plain"])
@pytest.mark.parametrize(
    ("hook", "count"),
    [("on_train_batch_end", 2), ("on_train_batch_end", 5), ("on_train_batch_end", 6), ("on_train_epoch_end", 2)],
    ids=["before pruning", "inside an epoch", "last batch of an epoch", "after pruning"],
)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, make_permanent, lottery, hook, count):
    def make():
        chosen = {"use_lottery_ticket_hypothesis": (lambda epoch: epoch < 3) if lottery else False}
        options = {"parameter_names": ["weight"], "make_pruning_permanent": make_permanent, **chosen}
        return ModelPruning("l1_unstructured", amount=0.3, **options)

    straight, _ = fit(make(), epochs=4, callbacks=[SavesOnce(tmp_path / "a.ckpt", hook, count)])
    other = Net()  # what it starts from does not matter
    resumed, _ = fit(make(), epochs=4, ckpt_path=tmp_path / "a.ckpt", net=other)
    assert_same(sorted(straight.state_dict().items()), sorted(resumed.state_dict().items()))


def test_files_hold_plain_weights_or_masks_as_asked(tmp_path):
    saves = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    weights = ModelCheckpoint(tmp_path / "weights", filename="weights", save_weights_only=True, every_n_train_steps=9)
    net, trainer = fit(
        ModelPruning("l1_unstructured", amount=0.5, **PLAIN), callbacks=[saves, weights], enable_checkpointing=True
    )
    plain = make_net().state_dict().keys()
    for epoch in range(3):
        stored = torch.load(tmp_path / "all" / f"epoch={epoch}.ckpt")["state_dict"]
        assert stored.keys() == plain
        zeros = sum(int((tensor == 0).sum()) for tensor in stored.values())
        assert zeros >= [32, 48, 56][epoch]
    assert torch.load(tmp_path / "weights" / "weights.ckpt")["state_dict"].keys() == plain
    loaded = Net.load_from_checkpoint(tmp_path / "all" / "epoch=2.ckpt")
    assert_same(sorted(net.state_dict().items()), sorted(loaded.state_dict().items()))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt")["callbacks"]["ModelPruning"]["masks"].keys() == plain


def test_a_file_with_masks_loads_into_a_model_that_is_not_pruned(tmp_path):
    masked = ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=False, **PLAIN)
    net, trainer = fit(masked, epochs=2)
    trainer.save_checkpoint(tmp_path / "masked.ckpt")
    stored = torch.load(tmp_path / "masked.ckpt")["state_dict"]
    assert {"layer.0.weight_orig", "layer.0.weight_mask"} <= stored.keys() and "layer.0.weight" not in stored
    loaded = Net.load_from_checkpoint(tmp_path / "masked.ckpt")
    assert_same(sorted(plain_weights(net).items()), sorted(loaded.state_dict().items()))
    other = Net()
    result = make_trainer().test(other, make_loader(), ckpt_path=tmp_path / "masked.ckpt", verbose=False)
    assert result == trainer.test(net, make_loader(), verbose=False)
    # The other way round: a file from before pruning, and a model that is pruned.
    make_trainer(max_epochs=1).fit(other, make_loader())
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": make_net().state_dict()}, tmp_path / "plain.ckpt")
    trainer.test(net, make_loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert_same(sorted(plain_weights(net).items()), sorted(make_net().state_dict().items()))


def test_a_run_of_masked_files_continues_by_itself(tmp_path):
    def make():
        return ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=False, **PLAIN)

    def go(epochs, net):
        saves = ModelCheckpoint(tmp_path, filename="{epoch}")
        return fit(make(), epochs, [saves], "auto", net, enable_checkpointing=True, default_root_dir=tmp_path)[0]

    go(2, make_net())
    continued = go(4, Net())
    straight, _ = fit(make(), epochs=4)
    assert_same(sorted(straight.state_dict().items()), sorted(continued.state_dict().items()))


def test_a_second_fit_keeps_what_is_pruned():
    pruning = ModelPruning("l1_unstructured", amount=0.5, apply_pruning=lambda epoch: epoch == 0, **PLAIN)
    net, trainer = fit(pruning, epochs=1)
    zeros = {name: parameter == 0 for name, parameter in net.named_parameters()}
    assert sum(int(zero.sum()) for zero in zeros.values()) >= 32
    trainer.fit_loop.max_epochs = 3
    trainer.fit(net, make_loader())
    assert all(bool((net.get_parameter(name)[zero] == 0).all()) for name, zero in zeros.items())


def test_the_log_says_how_much_is_pruned(caplog):
    def messages(verbose):
        caplog.clear()
        chosen = {"parameter_names": ["weight"], "amount": 0.5, "verbose": verbose, **PLAIN}
        with caplog.at_level(logging.INFO, "fulmen"):
            fit(ModelPruning("l1_unstructured", **chosen), epochs=2)
        return [message for message in caplog.messages if message.startswith("Applied")]

    assert messages(0) == []
    total = ["Applied `L1Unstructured`. Pruned: 0/48 (0.00%) -> 24/48 (50.00%)"]
    total += ["Applied `L1Unstructured`. Pruned: 24/48 (50.00%) -> 36/48 (75.00%)"]
    assert messages(1) == total
    detailed = messages(2)
    assert detailed[0::4] == total
    layer = "`Linear(in_features=4, out_features=8, bias=True).weight`"
    assert detailed[1].startswith(f"Applied `L1Unstructured` to {layer} with amount=0.5. Pruned: 0 (0.00%) -> ")


def test_each_process_prunes_what_the_first_one_drew(tmp_path):
    class Writes(Callback):
        def on_train_batch_start(self, trainer, *_):
            torch.manual_seed(trainer.global_rank)

        def on_train_epoch_end(self, trainer, pl_module):
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.current_epoch}-{trainer.global_rank}")

    net = make_net()
    chosen = [(net.layer[0], "weight"), (net.layer[3], "weight")]
    pruning = ModelPruning("random_unstructured", chosen, make_pruning_permanent=False, **PLAIN)
    _, trainer = fit(pruning, 2, [Writes()], net=net, strategy="ddp_fork", devices=2)
    for epoch in range(2):
        assert_same(torch.load(tmp_path / f"{epoch}-0"), torch.load(tmp_path / f"{epoch}-1"))
    # The caller has the weights, and goes on with layers of its own.
    assert_same(sorted(apply_masks(torch.load(tmp_path / "1-0")).items()), sorted(net.state_dict().items()))
    trainer.test(net, make_loader(), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(net, make_loader())
    assert int((net.layer[0].weight == 0).sum()) == 28


WRONG = MisconfigurationException


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (WRONG, {"pruning_fn": "l1_unstructured", "parameter_names": ["wight"]}, r"wight isn't in .* mean `weight`"),
        (WRONG, {"pruning_fn": {}}, "must be one of .*; received {}"),
        (WRONG, {"pruning_fn": "l1_structured"}, "not available .* Did you mean `l"),
        (WRONG, {"pruning_fn": prune.l1_unstructured}, "subclass of torch's `BasePruningMethod`"),
        (WRONG, {"pruning_fn": prune.L1Unstructured(0.5)}, "Pass the class, not an instance"),
        (WRONG, {"pruning_fn": "random_structured"}, "`pruning_dim` should be provided"),
        (WRONG, {"pruning_fn": "ln_structured", "pruning_dim": 0}, "`pruning_norm` should be provided"),
        (WRONG, {"pruning_fn": "random_structured", "pruning_dim": 0}, "is structured: only what is unstructured"),
        (WRONG, {"pruning_fn": prune.LnStructured}, "is structured: only what is unstructured"),
        (WRONG, {"pruning_fn": prune.L1Unstructured, "use_global_unstructured": False}, "Leave that out"),
        (WRONG, {"pruning_fn": "l1_unstructured", "verbose": 3}, "`verbose=3` must be one of 0, 1 and 2"),
        (WRONG, {"pruning_fn": "l1_unstructured", "amount": "half"}, "`amount` must be .*; received 'half'"),
        (WRONG, {"pruning_fn": "l1_unstructured", "amount": True}, "`amount` must be .*; received True"),
        (ValueError, {"pruning_fn": "l1_unstructured", "amount": 1.5}, "`amount=1.5` must be a float between"),
        (ValueError, {"pruning_fn": "l1_unstructured", "amount": -1}, "`amount=-1` must be"),
    ],
)
def test_wrong_arguments_are_refused_at_once(kind, options, words):
    with pytest.raises(kind, match=words):
        ModelPruning(**options)


def test_names_are_those_of_torch_in_any_case_and_subclasses_may_have_more():
    assert ModelPruning("L1_Unstructured").pruning_fn is prune.L1Unstructured
    assert ModelPruning(prune.RandomUnstructured, amount=3).amount == 3

    class Scales(ModelPruning):
        PARAMETER_NAMES = ("weight", "bias", "scale")

    assert Scales("l1_unstructured", parameter_names=["scale"]).PARAMETER_NAMES[-1] == "scale"


def test_parameters_are_found_and_checked():
    net = make_net()
    find = ModelPruning.sanitize_parameters_to_prune
    assert list(find(net)) == pairs_of(net)
    assert list(find(net, parameter_names=["bias"])) == pairs_of(net, ("bias",))
    chosen = [(net.layer[0], "weight")]
    assert find(net, chosen) == chosen
    for wrong, words in (
        ([(net.layer[0], "weigth")], r"does not have: modules \[\], parameters \['weigth'\]"),
        ([(nn.Linear(1, 1), "weight")], r"does not have: modules \[Linear"),
        (["weight"], "must be a list of pairs"),
        ("weight", "must be a list of pairs"),
    ):
        with pytest.raises(MisconfigurationException, match=words):
            find(net, wrong)


@pytest.mark.parametrize(
    ("kind", "make", "words"),
    [
        (
            ValueError,
            lambda: ModelPruning("random_structured", use_global_unstructured=False, pruning_dim=0),
            r"one dimension: layer.2.weight, layer.0.bias",
        ),
        (ValueError, lambda: ModelPruning("l1_unstructured", amount=66), "`amount=66` is more than the 65 elements"),
        (
            ValueError,
            lambda: ModelPruning("l1_unstructured", use_global_unstructured=False, amount=2),
            "more than the 1 elements of layer.3.bias",
        ),
        (WRONG, lambda: Empty("l1_unstructured"), "no parameters called weight or bias"),
    ],
    ids=["structured", "too many of all", "too many of one", "none"],
)
def test_what_cannot_be_pruned_is_refused_before_training(kind, make, words):
    net = make_net()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with pytest.raises(kind, match=words):
        fit(make(), net=net)
    assert_same(before.items(), net.named_parameters())


class Empty(ModelPruning):
    def filter_parameters_to_prune(self, parameters_to_prune=()):
        return []


def test_an_average_cannot_follow_what_is_pruned():
    with pytest.raises(MisconfigurationException, match="`EMAWeightAveraging` follows"):
        fit(ModelPruning("l1_unstructured"), callbacks=[EMAWeightAveraging()])


def test_layers_made_late_are_pruned_too():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.layer = None

        def configure_model(self):
            if self.layer is None:
                self.layer = nn.Linear(4, 1)

    net, _ = fit(ModelPruning("l1_unstructured", amount=2, parameter_names=["weight"], **PLAIN), epochs=1, net=Late())
    assert int((net.layer.weight == 0).sum()) == 2


def test_it_works_without_a_trainer():
    net = make_net()
    pruning = ModelPruning("l1_unstructured")
    pruning.setup(None, net, "fit")
    pruning.apply_pruning(0.5)
    assert {"layer.0.weight_orig", "layer.3.bias_mask"} <= net.state_dict().keys()
    pruning.apply_lottery_ticket_hypothesis()
    assert torch.equal(net.layer[0].weight_orig, make_net().layer[0].weight)
    pruning.make_pruning_permanent(net)
    assert net.state_dict().keys() == make_net().state_dict().keys()
    assert sum(int((parameter == 0).sum()) for parameter in net.parameters()) >= 32
    pruning.make_pruning_permanent(nn.Linear(1, 1))
