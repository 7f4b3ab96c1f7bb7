import sys

import pytest
import torch
from torch import nn

import fulmen as pl
from fulmen.plugins import Precision, TransformerEnginePrecision
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import is_installed

# Stands for the real package, which takes a GPU even to be imported: the names and arguments that are used of it.
LAYERS = """
import contextlib
from torch import nn

entered = []

class Linear(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
        super().__init__(in_features, out_features, bias, device, params_dtype)

class LayerNorm(nn.LayerNorm):
    def __init__(self, hidden_size, eps=1e-5, params_dtype=None, device="cuda"):
        super().__init__(hidden_size, eps, device=device, dtype=params_dtype)
"""
OLD = """
@contextlib.contextmanager
def fp8_autocast(enabled=False, fp8_recipe=None):
    entered.append((enabled, fp8_recipe))
    yield
"""
NEW = """
@contextlib.contextmanager
def autocast(enabled=True, recipe=None):
    entered.append((enabled, recipe))
    yield

def fp8_autocast(**_):
    raise DeprecationWarning
"""
RECIPES = """
import dataclasses
import enum

class Format(enum.Enum):
    E4M3 = 1
    HYBRID = 2

@dataclasses.dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
"""
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def asked_anew():
    is_installed.cache_clear()
    yield
    is_installed.cache_clear()


@pytest.fixture(params=["old", "new"])
def engine(request, tmp_path, monkeypatch):
    """The package's `pytorch` module, as it was and as it is."""
    folder = tmp_path / "transformer_engine"
    for name, text in (("pytorch", LAYERS + (OLD if request.param == "old" else NEW)), ("common", ""), ("", "")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(text)
    (folder / "common" / "recipe.py").write_text(RECIPES)
    about = tmp_path / "transformer_engine-2.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.0.0\n")
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    import transformer_engine.pytorch

    yield transformer_engine.pytorch
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


def net():
    torch.manual_seed(0)
    odd = nn.Sequential(nn.Linear(32, 10), nn.LayerNorm(10, elementwise_affine=False))
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32, eps=1e-3), nn.Linear(32, 32, bias=False), odd)


def kinds(module):
    return [
        (type(m).__module__.partition(".")[0], type(m).__name__) for m in module.modules() if not list(m.children())
    ]


@pytest.mark.parametrize("precision", ["transformer-engine", "transformer-engine-float16"])
def test_without_the_package_the_trainer_says_how_to_install_it(monkeypatch, precision):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*'transformer_engine\[pytorch\]>=0.11'") as raised:
        pl.Trainer(accelerator="cpu", precision=precision)
    assert raised.value.name == "transformer_engine"
    with pytest.raises(ModuleNotFoundError, match="not installed"):
        TransformerEnginePrecision(weights_dtype=BF16)


@pytest.mark.parametrize("precision", ["transformer-engine", "transformer-engine-float16"])
def test_on_another_device_than_a_gpu_it_is_refused(engine, precision):
    with pytest.raises(MisconfigurationException, match="'transformer-engine'` needs FP8. `cpu`.*8.9.*'bf16-mixed'"):
        pl.Trainer(accelerator="cpu", precision=precision)


@pytest.mark.parametrize(
    ("name", "dtype"), [("transformer-engine", BF16), ("transformer-engine-float16", torch.float16)]
)
def test_the_names_of_the_trainer_choose_the_dtype_of_weights(engine, monkeypatch, name, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    precision = pl.Trainer(accelerator="gpu", precision=name, logger=False, enable_checkpointing=False).precision_plugin
    assert type(precision) is TransformerEnginePrecision and isinstance(precision, Precision)
    assert precision.weights_dtype == precision.fallback_compute_dtype == dtype
    assert precision.precision == "transformer-engine"


@pytest.mark.parametrize("argument", ["weights_dtype", "fallback_compute_dtype"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bf16"])
def test_dtypes_it_cannot_compute_in_are_refused(argument, dtype):
    with pytest.raises(ValueError, match=f"`{argument}={dtype!r}`.*torch.bfloat16"):
        TransformerEnginePrecision(**{"weights_dtype": BF16, argument: dtype})


def test_linear_and_norm_layers_are_replaced_where_sizes_allow(engine):
    module = net()
    weight, inputs = module[0].weight, torch.randn(8, 16, dtype=BF16)
    module.eval()
    with pytest.warns(UserWarning, match=r"torch.bfloat16, not in FP8: 3.0. FP8 takes sizes that are multiples of 16"):
        converted = TransformerEnginePrecision(weights_dtype=BF16).convert_module(module)
    theirs = ("transformer_engine", "Linear"), ("transformer_engine", "LayerNorm"), ("transformer_engine", "Linear")
    assert converted is module and kinds(module) == [*theirs, ("torch", "Linear"), ("torch", "LayerNorm")]
    assert module[0].weight is weight and {p.dtype for p in module.parameters()} == {BF16}
    assert module[1].eps == 1e-3 and module[2].bias is None and not module[0].training
    assert torch.equal(module(inputs), net().to(BF16)(inputs))


def test_shared_weights_stay_shared_and_frozen_ones_frozen(engine):
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    module = TransformerEnginePrecision(weights_dtype=BF16).convert_module(nn.Sequential(first, second))
    assert module[0].weight is module[1].weight and type(module[1]) is engine.Linear
    assert not module[0].bias.requires_grad and module[1].bias.requires_grad


@pytest.mark.parametrize(("replace", "expected"), [(None, False), (True, True), (False, False)])
def test_a_model_with_layers_of_its_own_is_completed_only_when_asked(engine, replace, expected):
    module = nn.Sequential(nn.Linear(16, 16), engine.Linear(16, 16, device="cpu"))
    precision = TransformerEnginePrecision(weights_dtype=BF16, replace_layers=replace)
    precision.convert_module(precision.convert_module(module))  # once per run
    assert isinstance(module[0], engine.Linear) is expected and isinstance(module[1], engine.Linear)
    assert module[0].weight.dtype == BF16


def test_layers_can_be_left_alone(engine):
    module = TransformerEnginePrecision(weights_dtype=BF16, replace_layers=False).convert_module(net())
    assert {package for package, _ in kinds(module)} == {"torch"}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_step_computes_in_fp8_and_falls_back_to_autocast(engine):
    from transformer_engine.common.recipe import DelayedScaling, Format

    mine = {"fp8_format": "E4M3", "margin": 3}
    for given, recipe in ((None, DelayedScaling()), (mine, DelayedScaling(3, Format.E4M3))):
        precision = TransformerEnginePrecision(weights_dtype=BF16, recipe=given, fallback_compute_dtype=torch.float16)
        with precision.train_step_context():
            assert torch.get_default_dtype() == BF16 and torch.get_autocast_dtype("cuda") == torch.float16
        assert engine.entered.pop() == (True, recipe) and not engine.entered
    assert mine == {"fp8_format": "E4M3", "margin": 3}
    ready = DelayedScaling(margin=2)
    assert TransformerEnginePrecision(weights_dtype=BF16, recipe=ready).recipe is ready


def test_batches_and_new_modules_have_the_dtype_of_weights(engine):
    precision = TransformerEnginePrecision(weights_dtype=BF16)
    batch = precision.convert_input({"x": torch.ones(2, dtype=torch.float64), "i": torch.ones(2, dtype=torch.int64)})
    assert batch["x"].dtype == BF16 and batch["i"].dtype == torch.int64
    assert precision.convert_output(batch["x"]).dtype == torch.float32
    with precision.module_init_context():
        assert nn.Linear(2, 2).weight.dtype == BF16
    assert torch.get_default_dtype() == torch.float32


def test_the_optional_packages_are_not_imported_before_they_are_used(run_python):
    names = "TransformerEnginePrecision", "BitsandbytesPrecision"
    same = " and ".join(f"p.{n} is q.{n} is fulmen.plugins.{n}" for n in names)
    same += " and p.precision.transformer_engine.TransformerEnginePrecision is p.TransformerEnginePrecision"
    same += " and p.precision.bitsandbytes.BitsandbytesPrecision is p.BitsandbytesPrecision"
    asked = "import sys, fulmen, fulmen.plugins.precision as q; from fulmen import plugins as p"
    unused = "not {'transformer_engine', 'bitsandbytes'} & set(sys.modules)"
    assert run_python(f"{asked}; assert {same}; assert {unused}, 'imported'") == 0
