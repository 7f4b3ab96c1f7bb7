"""`strict_loading = False` loads what fits, and the rest stays as it was made."""

from __future__ import annotations

import pytest
import torch
from support import Regression, make_loader, make_trainer


class Net(Regression):
    def __init__(self, width: int = 3, strict: bool | None = None, names: tuple[str, ...] = ("head",)):
        super().__init__()
        self.wide = torch.nn.Linear(4, width)
        for name in names:
            setattr(self, name, torch.nn.Linear(width, 1))
        self.names, self.strict_loading = names, strict

    def forward(self, x):
        return self.layer(x) + sum(getattr(self, name)(self.wide(x)) for name in self.names)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("fits") / "x.ckpt"
    trainer = make_trainer()
    trainer.fit(Net(), make_loader())
    trainer.save_checkpoint(path)
    return path, torch.load(path, weights_only=True)["state_dict"]


def same(module, state, left_out=()):
    return all(torch.equal(value, state[key]) for key, value in module.state_dict().items() if key not in left_out)


WIDE = ("wide.weight", "wide.bias", "head.weight")


def test_by_default_other_shapes_are_an_error_that_names_the_way_out(saved):
    with pytest.raises(RuntimeError, match=r"wide\.weight \(3, 4\) in the file, \(5, 4\).*strict_loading = False"):
        Net.load_from_checkpoint(saved[0], width=5)
    with pytest.raises(RuntimeError, match=r"strict_loading = False"):
        make_trainer(max_epochs=2).fit(Net(5), make_loader(), ckpt_path=saved[0])


@pytest.mark.parametrize("how", ["attribute", "argument"])
def test_what_has_another_shape_is_left_out_by_name(saved, how):
    torch.manual_seed(5)
    made = Net(5).state_dict()
    torch.manual_seed(5)
    more = {"strict": False}  # the argument of the call and that of `Net` have the same name
    with pytest.warns(
        UserWarning, match=r"another shape stay as they are in Net: wide\.weight \(3, 4\) in the file, \(5,"
    ):
        loaded = load(saved[0], 5, how, more)
    assert same(loaded, saved[1], WIDE)
    assert all(torch.equal(loaded.state_dict()[key], made[key]) for key in WIDE)


def load(path, width, how, more):
    kind = type(
        "Net", (Net,), {"__init__": lambda self: Net.__init__(self, width, False if how == "attribute" else None)}
    )
    return kind.load_from_checkpoint(path, **(more if how == "argument" else {}))


def test_a_run_continues_with_new_states_for_new_shapes(saved):
    model = Net(5, strict=False)
    trainer = make_trainer(max_epochs=3)
    with pytest.warns(UserWarning, match="another shape"):
        trainer.fit(model, make_loader(), ckpt_path=saved[0])
    assert trainer.global_step == 9
    states = trainer.optimizers[0].state
    steps = {name: int(states[parameter]["step"]) for name, parameter in model.named_parameters()}
    assert steps == {name: 6 if name in WIDE else 9 for name in steps}
    assert all(states[p]["exp_avg"].shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_takes_what_fits_too(saved, verb):
    model = Net(5, strict=False, names=("head", "more"))
    with pytest.warns(UserWarning, match="another shape"):
        getattr(make_trainer(), verb)(model, make_loader(), ckpt_path=saved[0])
    assert same(model, saved[1], (*WIDE, "more.weight", "more.bias"))


def test_a_module_that_adapts_shapes_by_itself_is_asked_first(saved):
    class Stretches(torch.nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight = state_dict[f"{prefix}weight"]
            state_dict[f"{prefix}weight"] = torch.cat([weight, weight])[: len(self.weight)]
            state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"].repeat(2)[: len(self.bias)]
            super()._load_from_state_dict(state_dict, prefix, *args)

    class Own(Regression):
        def __init__(self):
            super().__init__()
            self.wide, self.strict_loading = Stretches(4, 5), False

    loaded = Own.load_from_checkpoint(saved[0])
    assert torch.equal(loaded.wide.weight[:3], saved[1]["wide.weight"])
    assert torch.equal(loaded.wide.weight[3:], saved[1]["wide.weight"][:2])
