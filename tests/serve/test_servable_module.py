"""Modules that are asked over HTTP: a real server, real requests, real training around them."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest
import torch
from support import make_trainer

from fulmen.demos import BoringModel
from fulmen.serve import ServableModule, ServableModuleValidator
from fulmen.serve.http_server import post_json, serve_module
from fulmen.utilities.errors import MisconfigurationException


class Servable(BoringModel, ServableModule):
    """Answers with what the layer makes of ones."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.asked = []

    def configure_payload(self):
        return {"body": {"x": [[1.0] * 32]}}

    def configure_serialization(self):
        return {"x": torch.tensor}, {"output": torch.Tensor.tolist}

    def serve_step(self, x):
        self.asked.append((self.training, torch.is_grad_enabled(), torch.rand(1).item()))
        return {"output": self.norm(self(x))}

    def configure_response(self):
        self.norm.eval()
        return {"output": self.norm(self(torch.ones(1, 32))).tolist()}


def fit(module, **options):
    validator = ServableModuleValidator(**{"port": 0, **options})
    trainer = make_trainer(limit_train_batches=2, limit_val_batches=0, callbacks=[validator])
    trainer.fit(module)
    return validator, trainer


def test_the_answer_is_that_of_the_module_in_eval_mode_and_training_goes_on():
    torch.manual_seed(1)
    module = Servable()
    expected = module.configure_response()
    module.norm.train()
    validator, trainer = fit(module)
    assert validator.successful is True and validator.resp.status_code == 200
    assert validator.resp.json() == expected
    assert [asked[:2] for asked in module.asked] == [(False, False)]
    assert trainer.global_step == 2 and all(part.training for part in module.modules())
    assert validator.state_dict() == {"successful": True, "optimization": None, "server": "fastapi"}
    # The same run without it draws the same numbers.
    torch.manual_seed(5)
    first = Servable()
    fit(first)
    torch.manual_seed(5)
    second = Servable()
    make_trainer(limit_train_batches=2, limit_val_batches=0).fit(second)
    assert torch.equal(first.layer.weight, second.layer.weight)


class Wrong(Servable):
    def configure_response(self):
        return {"output": [[5.0, 5.0]]}


class Raises(Servable):
    def serve_step(self, x):
        raise ValueError("the module is unhappy")


class NotByName(Servable):
    def serve_step(self, x):
        return self(x)


class NoBody(Servable):
    def configure_payload(self):
        return {"x": 1}


class NotSerialized(Servable):
    def configure_serialization(self):
        return {"x": torch.tensor}, {}


@pytest.mark.parametrize(
    ("module", "words", "successful"),
    [
        (Wrong, r"expected to respond with .*5.0, 5.0.*, but it responded with", True),
        (Raises, r"cannot be served(.|\n)*the module is unhappy", False),
        (NotByName, r"must return results by name, not a `Tensor`", False),
        (NotSerialized, r"Tensor is not JSON serializable", False),
        (NoBody, r"must return a dictionary with the key 'body', not \{'x': 1\}", None),
    ],
)
def test_what_is_wrong_ends_the_run_or_is_a_warning(module, words, successful):
    with pytest.raises(MisconfigurationException, match=words):
        fit(module())
    with pytest.warns(UserWarning, match=words):
        validator, trainer = fit(module(), exit_on_failure=False)
    assert trainer.global_step == 2 and validator.successful is successful


def test_what_takes_too_long_is_given_up():
    class Slow(Servable):
        def serve_step(self, x):
            time.sleep(1.0)
            return super().serve_step(x)

    with pytest.raises(MisconfigurationException, match=r"did not answer within 0.1 s: .*Raise `timeout`"):
        fit(Slow(), timeout=0.1)


def test_modules_and_arguments_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match=r"subclass of `ServableModule`, and `BoringModel` is not"):
        fit(BoringModel())
    with pytest.raises(NotImplementedError, match="optimization='trace'"):
        ServableModuleValidator(optimization="trace")
    with pytest.raises(NotImplementedError, match="server='torchserve'"):
        ServableModuleValidator(server="torchserve")
    with pytest.raises(TypeError, match="abstract"):
        ServableModule()


def test_a_server_answers_until_it_is_closed():
    module = Servable().eval()
    with serve_module(module) as address:
        with urllib.request.urlopen(f"{address}/ping") as answer:
            assert json.load(answer) == {"status": "ok"}
        request = {"body": {"x": [[0.0] * 32, [1.0] * 32]}}
        answers = [post_json(f"{address}/serve", request, 30) for _ in range(2)]
        assert answers[0] == answers[1] and len(answers[0].json()["output"]) == 2
        assert post_json(f"{address}/elsewhere", request, 30).status_code == 404
        missing = post_json(f"{address}/serve", {"body": {}}, 30)
        assert missing.status_code == 500 and not missing.ok and "KeyError: 'x'" in missing.text
        port = int(address.rpartition(":")[2])
        with (
            pytest.raises(OSError, match=f"port {port} of 127.0.0.1.*0 for one that is free"),
            serve_module(module, port=port),
        ):
            pass
    with pytest.raises(OSError):
        post_json(f"{address}/serve", request, 5)
