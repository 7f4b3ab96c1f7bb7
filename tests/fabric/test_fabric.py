"""`Fabric` on one device: what it makes of its arguments, a loop of one's own, checkpoints, callbacks and loggers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fulmen import Fabric


def test_a_loop_of_ones_own_has_the_bits_of_the_plain_one() -> None:
    def train(fabric: Fabric | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if fabric is not None:
            model, optimizer = fabric.setup(model, optimizer)
        for _ in range(5):
            loss = model(torch.randn(3, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward() if fabric is None else fabric.backward(loss)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = train(None)
    found = train(Fabric(accelerator="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"devices": 0}, ValueError, "devices"),
        ({"devices": []}, ValueError, "devices"),
        ({"accelerator": "cocofruit"}, ValueError, "invalid accelerator name"),
        ({"strategy": "ddpp"}, ValueError, "Did you mean `ddp`"),
        ({"precision": "17"}, ValueError, "invalid"),
        ({"plugins": "foo"}, TypeError, "Found invalid type for plugin"),
        ({"accelerator": "tpu"}, RuntimeError, "tpu"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        Fabric(**{"accelerator": "cpu", **arguments})
