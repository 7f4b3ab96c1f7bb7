"""`load_from_checkpoint`: a module as it was saved."""

from __future__ import annotations

import io
import sys
import warnings
from argparse import Namespace

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.checkpoint.lightning_format import API_VERSION
from fulmen.checkpoint.load import keep_available_device, load_hparams


class Net(pl.LightningModule):
    def __init__(self, lr=1, width=2):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, width)


class Configured(pl.LightningModule):
    def __init__(self, conf, k=1):
        super().__init__()
        self.save_hyperparameters(conf)
        self.conf, self.k = conf, k


def write(path, module, **chapters):
    hparams = {"hparams_name": module._hparams_name, "hyper_parameters": dict(module.hparams)}
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": API_VERSION, **hparams, **chapters}
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "net.ckpt", Net(lr=5))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_module_comes_back_with_its_weights_and_arguments(tmp_path):
    net = Net(lr=5, width=3)
    loaded = Net.load_from_checkpoint(write(tmp_path / "net.ckpt", net))
    assert loaded.hparams == {"lr": 5, "width": 3}
    assert same_weights(loaded, net)
    assert loaded.training
    assert loaded.device == torch.device("cpu")


def test_what_the_trainer_saves_can_be_loaded(tmp_path):
    model, trainer = Regression(lr=0.25), make_trainer()
    trainer.fit(model, make_loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Regression.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.hparams == {"lr": 0.25}
    assert same_weights(loaded, model)


def test_paths_urls_of_files_and_open_files_are_read(path):
    assert Net.load_from_checkpoint(str(path)).hparams.lr == 5
    assert Net.load_from_checkpoint(f"file://{path}").hparams.lr == 5
    assert Net.load_from_checkpoint(io.BytesIO(path.read_bytes())).hparams.lr == 5
    with pytest.raises(FileNotFoundError, match="net.ckpt"):
        Net.load_from_checkpoint(path.with_name("ne.ckpt"))


def test_arguments_of_the_call_win(path):
    assert Net.load_from_checkpoint(path, lr=9).hparams == {"lr": 9, "width": 2}


def test_an_argument_that_is_not_accepted_is_left_out_with_a_warning(path):
    with pytest.warns(UserWarning, match="`widht` was left out.*Did you mean `width`"):
        assert Net.load_from_checkpoint(path, widht=9).hparams == {"lr": 5, "width": 2}


def test_saved_arguments_the_constructor_no_longer_has_are_left_out(path):
    class Smaller(pl.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(2, 2)

    class Larger(pl.LightningModule):
        def __init__(self, lr, **rest):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.rest = rest

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Smaller.load_from_checkpoint(path).hparams == {"lr": 5}
        assert Larger.load_from_checkpoint(path, new=1).rest == {"width": 2, "new": 1}


@pytest.mark.filterwarnings("ignore:.*holds no weights")
@pytest.mark.parametrize("conf", [{"lr": 3}, Namespace(lr=3)])
def test_one_object_comes_back_under_its_name(tmp_path, conf):
    path = write(tmp_path / "x.ckpt", Configured(conf))
    loaded = Configured.load_from_checkpoint(path)
    assert loaded.conf == {"lr": 3}
    assert loaded.conf.lr == 3  # whatever it was, both ways of reading work
    changed = Configured.load_from_checkpoint(path, lr=4, k=7)
    assert (changed.conf, changed.k) == ({"lr": 4}, 7)
    assert Configured.load_from_checkpoint(path, conf={"lr": 8}).conf == {"lr": 8}


def test_hooks_run_before_the_weights_are_loaded(path):
    seen = []

    class Late(Net):
        def configure_model(self):
            seen.append("configure_model")

        def on_load_checkpoint(self, checkpoint):
            seen.append(checkpoint["hyper_parameters"])
            checkpoint["state_dict"]["layer.bias"] = torch.full((2,), 7.0)

    loaded = Late.load_from_checkpoint(path, lr=6)
    assert seen == ["configure_model", {"lr": 6, "width": 2}]
    assert torch.equal(loaded.layer.bias, torch.full((2,), 7.0))


def test_weights_that_do_not_fit_are_named_with_the_nearest_names(path):
    class Renamed(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Linear(2, 2)

    with pytest.raises(RuntimeError, match=r"Renamed.*layers\.weight.*layer\.weight"):
        Renamed.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"layer\.weight.*\(2, 2\).*\(3, 2\)"):
        Net.load_from_checkpoint(path, width=3)


def test_not_strict_warns_about_keys_of_one_side(path):
    class Other(pl.LightningModule):
        def __init__(self, strict_loading=None):
            super().__init__()
            self.extra = torch.nn.Linear(1, 1, bias=False)
            if strict_loading is not None:
                self.strict_loading = strict_loading

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Other.load_from_checkpoint(path, strict=False)
        Other.load_from_checkpoint(path, strict_loading=False)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 4
    assert "['extra.weight']" in texts[0] and "['layer.weight', 'layer.bias']" in texts[1]
    with pytest.raises(ValueError, match="Other.strict_loading=False"):
        Other.load_from_checkpoint(path, strict=True, strict_loading=False)


def test_it_is_a_method_of_the_class_only(path):
    net = Net()
    with pytest.raises(TypeError, match="Net.load_from_checkpoint"):
        net.load_from_checkpoint(path)
    assert callable(net.load_from_checkpoint)  # looking at it is allowed


@pytest.mark.parametrize("name, text", [("h.yaml", "lr: 42\n"), ("h.yml", "lr: 42\n"), ("h.csv", "key,value\nlr,42\n")])
def test_arguments_can_come_from_another_file(path, tmp_path, name, text):
    if not name.endswith("csv"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    assert Net.load_from_checkpoint(path, hparams_file=tmp_path / name).hparams == {"lr": 42, "width": 2}


def test_argument_files_have_known_endings(path, tmp_path):
    with pytest.raises(ValueError, match=r"\.csv"):
        Net.load_from_checkpoint(path, hparams_file="h.txt")


def test_values_of_csv_files_are_literals_or_text(tmp_path):
    (tmp_path / "h.csv").write_text('key,value\na,0.5\nb,some text\nc,"[1, 2]"\nd,None\n')
    assert load_hparams(tmp_path / "h.csv") == {"a": 0.5, "b": "some text", "c": [1, 2], "d": None}


def test_files_that_are_no_checkpoints_say_so(tmp_path):
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(TypeError, match="`list`"):
        Net.load_from_checkpoint(tmp_path / "list.ckpt")
    torch.save(Net().state_dict(), tmp_path / "weights.ckpt")
    with pytest.raises(KeyError, match="pytorch-lightning_version"):
        Net.load_from_checkpoint(tmp_path / "weights.ckpt")
    torch.save({"pytorch-lightning_version": API_VERSION}, tmp_path / "nothing.ckpt")
    with pytest.raises(KeyError, match="state_dict"):
        Net.load_from_checkpoint(tmp_path / "nothing.ckpt")


def test_an_empty_state_dict_is_warned_about(tmp_path):
    torch.save({"pytorch-lightning_version": API_VERSION, "state_dict": {}}, tmp_path / "empty.ckpt")
    with pytest.warns(UserWarning, match="no weights"):
        pl.LightningModule.load_from_checkpoint(tmp_path / "empty.ckpt")


def test_weights_of_an_absent_device_come_to_the_cpu():
    storage = torch.zeros(1).untyped_storage()
    assert keep_available_device(storage, "cpu") is None
    assert keep_available_device(storage, f"cuda:{torch.cuda.device_count()}") is storage


def test_arguments_that_are_objects_need_a_trusted_file(tmp_path):
    net = Net(lr=1)
    net.hparams["lr"] = Namespace(value=1)
    path = write(tmp_path / "object.ckpt", net)
    with pytest.raises(Exception, match="weights_only=False"):
        Net.load_from_checkpoint(path)
    assert Net.load_from_checkpoint(path, weights_only=False).hparams.lr == Namespace(value=1)


class Special(Net):
    """A subclass that a file may name."""


def write_cli_file(path, instantiator, class_path):
    net = Net(lr=5)
    net.hparams.update(_instantiator=instantiator, _class_path=class_path)
    return write(path, net)


def test_a_file_of_a_command_line_may_name_an_imported_subclass(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[type(Special()).__module__])
    path = write_cli_file(tmp_path / "cli.ckpt", "lightning.pytorch.cli.instantiate_module", f"{__name__}.Special")
    loaded = Net.load_from_checkpoint(path, lr=6)
    assert type(loaded) is Special
    assert loaded.hparams == {"lr": 6, "width": 2}


def test_other_builders_and_classes_are_not_called(tmp_path):
    path = write_cli_file(tmp_path / "a.ckpt", "os.system", f"{__name__}.Net")
    with pytest.raises(ValueError, match="os.system"):
        Net.load_from_checkpoint(path)
    path = write_cli_file(tmp_path / "b.ckpt", "lightning.pytorch.cli.instantiate_module", "json.JSONDecoder")
    with pytest.raises(ValueError, match="json.JSONDecoder"):
        Net.load_from_checkpoint(path)
