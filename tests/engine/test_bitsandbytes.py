import copy
import pickle
import sys

import pytest
import torch
from support import make_loader, make_trainer
from torch import nn
from torch.nn.functional import mse_loss

import fulmen as pl
from fulmen.plugins import BitsandbytesPrecision, Precision
from fulmen.utilities.optional import is_installed

ON_CPU = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
MODES = [*ON_CPU, "int8-training"]
FLOAT = torch.float32


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    is_installed.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match='pip install "bitsandbytes>=0.46"'):
            BitsandbytesPrecision("nf4")
    finally:
        is_installed.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nf5",), "mode='nf5'` must be one of 'nf4', .*Did you mean `nf4`"),
        ((4,), "mode=4"),
        (("int8", FLOAT), "mode='int8'` with `dtype=torch.float32`: it computes in torch.float16"),
        (("int8-training", torch.bfloat16), "torch.float16"),
        (("nf4", torch.float64), "torch.bfloat16 or torch.float16 or torch.float32"),
        (("nf4", "bf16"), "dtype='bf16'"),
    ],
)
def test_unknown_modes_and_dtypes_are_refused_with_or_without_the_package(arguments, words):
    with pytest.raises(ValueError, match=words):
        BitsandbytesPrecision(*arguments)


class Net(pl.LightningModule):
    """Two linear layers with a norm between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64))
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@pytest.fixture
def bnb():
    """The real package, on the CPU."""
    if not is_installed("bitsandbytes", ">=0.49"):
        pytest.skip("`pip install 'bitsandbytes>=0.49'` to test quantised layers")
    import bitsandbytes

    return bitsandbytes


def quantised(mode, dtype=None, **arguments):
    precision = BitsandbytesPrecision(mode, dtype, **arguments)
    return precision, precision.convert_module(Net()).to("cpu")


def run(precision, module, x):
    with precision.forward_context():
        return module(precision.convert_input(x)).float()


def same(states, others):
    return all(torch.equal(a, b) for a, b in zip(states.values(), others.values(), strict=True))


# what is computed


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_computes_nearly_what_floats_do(bnb, mode):
    precision, module = quantised(mode)
    x = make_loader(32, 32).dataset.tensors[0]
    wanted = Net()(x)
    # the error of a weight of 4 bits is about a tenth of it, of 8 bits a hundredth
    assert (run(precision, module, x) - wanted).norm() < (0.02 if "8" in mode else 0.25) * wanted.norm()
    assert precision.dtype == (torch.float16 if "8" in mode else torch.bfloat16)
    assert isinstance(precision, Precision) and precision.precision == "32-true"
    weight = module.head.weight
    assert isinstance(module.head, bnb.nn.Linear8bitLt if "8" in mode else bnb.nn.Linear4bit)
    assert weight.requires_grad is (mode == "int8-training") and module.head.bias.requires_grad
    assert weight.dtype == {"int8": torch.int8, "int8-training": torch.float16}.get(mode, torch.uint8)
    assert module.body[1].weight.dtype == module.head.bias.dtype == precision.dtype


def test_training_equals_a_loop_over_layers_of_the_package(bnb):
    module, plain = Net(), Net()
    for parent, name in ((plain.body, "0"), (plain.body, "3"), (plain, "head")):
        layer = getattr(parent, name)
        four = {"compute_dtype": FLOAT, "quant_type": "nf4", "compress_statistics": False}
        ours = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **four)
        ours.load_state_dict(layer.state_dict())
        setattr(parent, name, ours)
    plain.to("cpu")
    optimizer = plain.configure_optimizers()
    for _ in range(2):
        for batch in make_loader():
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            optimizer.step()
    trainer = make_trainer(plugins=BitsandbytesPrecision("nf4", FLOAT), max_epochs=2, limit_val_batches=0)
    trainer.fit(module, make_loader())
    assert same(module.state_dict(), plain.state_dict())
    assert not torch.equal(module.head.bias, Net().head.bias)


@pytest.mark.parametrize("mode", ON_CPU)
def test_all_verbs_run_and_what_is_not_frozen_trains(bnb, mode):
    module, loader = Net(), make_loader()
    trainer = make_trainer(plugins=[BitsandbytesPrecision(mode)], max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(module, loader, loader)
    after = trainer.validate(module, loader, verbose=False)[0]["val_loss"]
    assert trainer.predict(module, loader)[0].dtype == trainer.precision_plugin.dtype
    fresh, trainer = Net(), make_trainer(plugins=BitsandbytesPrecision(mode))
    assert after < trainer.validate(fresh, loader, verbose=False)[0]["val_loss"]
    assert torch.equal(module.head.weight, fresh.head.weight)
    assert not torch.equal(module.body[1].bias, fresh.body[1].bias)


def test_weights_that_train_are_quantised_anew_after_each_step(bnb):
    x, y = make_loader().dataset.tensors
    trained = []
    for as_trainer in (True, False):
        precision, module = quantised("int8-training")
        optimizer = module.configure_optimizers()
        if as_trainer:
            precision.connect(module, [optimizer], [])
        for _ in range(3):
            if not as_trainer:
                optimizer.zero_grad()  # what the package waits for
            loss = mse_loss(run(precision, module, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        precision.teardown()
        assert not optimizer._optimizer_step_post_hooks
        trained.append(copy.deepcopy(module.state_dict()))
    assert same(*trained) and not torch.equal(module.head.weight, quantised("int8-training")[1].head.weight)


def test_encoder_layers_do_not_read_quantised_weights_by_themselves(bnb):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    precision = BitsandbytesPrecision("int8")
    x, converted = torch.randn(2, 3, 16), precision.convert_module(copy.deepcopy(layer)).to("cpu")
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert (run(precision, converted, x) - layer(x)).norm() < 0.02 * layer(x).norm()
    assert type(converted.self_attn.out_proj) is type(layer.self_attn.out_proj)
    assert torch.backends.mha.get_fastpath_enabled() is fused


# which layers


def test_modules_can_be_left_out_by_name(bnb):
    _, module = quantised("nf4", ignore_modules=["body.3", "head"])
    assert isinstance(module.body[0], bnb.nn.Linear4bit)
    assert {type(module.body[3]), type(module.head)} == {nn.Linear} and module.head.weight.dtype == torch.bfloat16
    _, module = quantised("nf4", ignore_modules="body")
    assert type(module.body[0]) is nn.Linear and isinstance(module.head, bnb.nn.Linear4bit)


def test_a_name_that_no_module_has_is_an_error(bnb):
    with pytest.raises(ValueError, match="no module 'haed'. Did you mean `head`"):
        make_trainer(plugins=BitsandbytesPrecision("nf4", ignore_modules=["haed"])).fit(Net(), make_loader())


def test_a_model_without_linear_layers_is_an_error(bnb):
    precision = BitsandbytesPrecision("nf4", ignore_modules=["0"])
    for model in (nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1)), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="found no `torch.nn.Linear` to quantise in Sequential"):
            precision.convert_module(model)


def test_a_model_that_is_quantised_already_is_taken_as_it_is(bnb):
    model = nn.Sequential(nn.Linear(4, 4), bnb.nn.Linear4bit(4, 4))
    assert BitsandbytesPrecision("int8").convert_module(model) is model and type(model[0]) is nn.Linear


def test_layers_keep_their_hooks_and_their_owners(bnb):
    seen, layer = [], nn.Linear(64, 64)
    layer.register_forward_hook(lambda *_: seen.append(1))
    precision = BitsandbytesPrecision("nf4")
    model = precision.convert_module(nn.Sequential(layer, layer)).to("cpu")
    run(precision, model, torch.ones(1, 64))
    assert model[0] is model[1] is layer and seen == [1, 1]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_layers_can_be_made_quantised(bnb, mode):
    class Late(Net):
        def __init__(self):
            pl.LightningModule.__init__(self)

        def configure_model(self):
            if not hasattr(self, "head"):
                Net.__init__(self)
                self.kinds = {type(self.head), type(self.body[3])}
                assert torch.get_default_dtype() == self.body[1].weight.dtype

    module, precision = Late(), BitsandbytesPrecision(mode)
    make_trainer(plugins=precision).fit(module, make_loader())
    assert {bnb.nn.Linear8bitLt if "8" in mode else bnb.nn.Linear4bit} == module.kinds
    assert module.head.weight.dtype == {"nf4": torch.uint8, "int8": torch.int8}[mode]
    with BitsandbytesPrecision(mode, ignore_modules=["head"]).module_init_context():
        assert type(nn.Linear(2, 2)) is nn.Linear
    assert type(nn.Linear(2, 2)) is nn.Linear and torch.get_default_dtype() == FLOAT


# what is loaded


@pytest.mark.parametrize("moved", [True, False], ids=["quantised", "not yet"])
@pytest.mark.parametrize("mode", MODES)
def test_states_of_floats_and_of_quantised_weights_load_the_same(bnb, mode, moved):
    precision, module = quantised(mode)
    x = make_loader(32, 32).dataset.tensors[0]
    wanted = run(precision, module, x)
    packed = copy.deepcopy(module.state_dict())
    for state in (packed, Net().state_dict(), pickle.loads(pickle.dumps(packed))):
        other = precision.convert_module(Net())
        for parameter in other.parameters():
            parameter.data.mul_(2)
        if moved:
            run(precision, other.to("cpu"), x).sum().backward()  # the package keeps copies since then
        weight, size = other.head.weight, len(state)
        other.load_state_dict(state)
        assert torch.equal(run(precision, other.to("cpu"), x), wanted) and other.head.weight is weight
        assert len(state) == size and same(other.state_dict(), packed)


@pytest.mark.parametrize("mode", MODES)
def test_states_can_be_assigned(bnb, mode):
    precision, module = quantised(mode)
    x = make_loader(32, 32).dataset.tensors[0]
    other = precision.convert_module(Net())
    other.load_state_dict(Net().state_dict(), assign=True)
    assert torch.equal(run(precision, other.to(precision.dtype).to("cpu"), x), run(precision, module, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64, 2), (128, 1), (3, 1)])
def test_weights_of_another_shape_are_refused(bnb, mode, shape):
    precision = BitsandbytesPrecision(mode)
    make = lambda *shape: precision.convert_module(nn.Sequential(nn.Linear(*shape, bias=False))).to("cpu")  # noqa: E731
    layer = make(2, 64)
    for state in (make(*shape).state_dict(), nn.Sequential(nn.Linear(*shape, bias=False)).state_dict()):
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("mode", ON_CPU)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(bnb, mode, tmp_path):
    whole, half, rest = Net(), Net(), Net()
    make_trainer(plugins=BitsandbytesPrecision(mode), max_epochs=2).fit(whole, make_loader())
    trainer = make_trainer(plugins=BitsandbytesPrecision(mode), max_epochs=1)
    trainer.fit(half, make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for parameter in rest.parameters():
        parameter.data.mul_(2)
    trainer = make_trainer(plugins=BitsandbytesPrecision(mode), max_epochs=2)
    trainer.fit(rest, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(rest.state_dict(), whole.state_dict())


# where it runs


def test_a_device_that_the_installed_version_does_not_serve_is_refused(bnb, monkeypatch):
    monkeypatch.setattr(bnb, "supported_torch_devices", {"xpu", "cuda"})
    with pytest.raises(RuntimeError, match="does not run on `cpu`, only on cuda."):
        pl.Trainer(accelerator="cpu", plugins=BitsandbytesPrecision("int8-training"))
    with pytest.raises(RuntimeError, match="does not run on `cpu`, only on cuda, xpu"):
        pl.Trainer(accelerator="cpu", plugins=BitsandbytesPrecision("nf4"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_every_mode_trains_and_resumes(bnb, mode, tmp_path):
    def fit(epochs, **arguments):
        trainer = make_trainer(accelerator="gpu", plugins=BitsandbytesPrecision(mode), max_epochs=epochs)
        module = Net()
        trainer.fit(module, make_loader(), make_loader(), **arguments)
        return trainer, {name: value.cpu() for name, value in module.state_dict().items()}

    (trainer, half), (_, whole), path = fit(1), fit(2), tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    _, resumed = fit(2, ckpt_path=path)
    assert all(torch.allclose(resumed[name], whole[name], atol=0.02) for name in whole)
    assert not torch.equal(half["body.1.bias"], whole["body.1.bias"])


def test_an_old_gpu_computes_in_float16(bnb, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert BitsandbytesPrecision("nf4").dtype == torch.float16
