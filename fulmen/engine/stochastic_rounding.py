"""Stochastic rounding: updates of 16-bit weights are made in float32, and rounded so that small ones are not lost.

A step of an optimizer is often smaller than half the distance between two neighbours in bfloat16, as is what an average
with a decay of 0.999 takes in. Rounded to the nearest such a step is nothing, each time; rounded up or down by chance, in
proportion to the distance, it is right on average (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch.optim import Optimizer

HALF_DTYPES = (torch.float16, torch.bfloat16)
# Elements that are widened together: bounds the memory that a step needs on top, to a few times 64 MB.
CHUNK_ELEMENTS = 1 << 24


def step_in_float32(optimizer: Optimizer, seed: int, **kwargs: Any) -> Any:
    """`optimizer.step(**kwargs)`, with 16-bit parameters, gradients and states widened to float32 for its duration.

    bfloat16 states are stored as such again. States of float16 parameters stay in float32: squares of gradients below
    2e-4 are zero in float16, and so is the `eps` that Adam adds to them.

    Arguments:
        seed: of the roundings; equal on all processes, or they would end with different weights.
    """
    # The optimizers of torch treat each parameter by itself: for them a part at a time comes to the same.
    alone = type(optimizer).__module__.startswith("torch.optim")
    groups = optimizer.param_groups
    members = [group["params"] for group in groups]
    outcome = None
    try:
        for number, part in enumerate(_chunk_parameters(members, CHUNK_ELEMENTS if alone else 1 << 62)):
            for group, parameters in zip(groups, part):
                group["params"] = parameters
            with float32_stand_ins(optimizer, seed + 2 * number):
                outcome = optimizer.step(**kwargs)
    finally:
        for group, parameters in zip(groups, members):
            group["params"] = parameters
    return outcome


def _chunk_parameters(members: list[list[Any]], limit: int) -> Iterator[list[list[Any]]]:
    """The parameters that have a gradient, by group, in portions of about `limit` elements; at least one portion."""
    part: list[list[Any]] = [[] for _ in members]
    size = 0
    for index, parameters in enumerate(members):
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if size and size + parameter.numel() > limit:
                yield part
                part = [[] for _ in members]
                size = 0
            part[index].append(parameter)
            size += parameter.numel()
    yield part


@contextmanager
def float32_stand_ins(optimizer: Optimizer, seed: int | None = None) -> Generator[None]:
    """Inside, the optimizer has stand-ins of 32 bits for its parameters of 16, with their gradients and states.

    The parameters themselves stay as they are: autograd forgets who listens to a gradient, such as DDP, when the dtype of
    its parameter changes. Without a seed only states are of interest, which are being loaded.
    """
    own = [p for group in optimizer.param_groups for p in group["params"] if p.dtype in HALF_DTYPES]
    wide = _make_stand_ins(own)
    _swap_parameters(optimizer, own, wide)
    narrow_states = _widen_states([optimizer.state[p] for p in wide if p in optimizer.state])
    try:
        yield
    finally:
        _swap_parameters(optimizer, wide, own)
        if seed is not None:
            bfloat16 = _store_parameters(own, wide, seed)
            _round_states(bfloat16, optimizer.state, narrow_states, seed + 1)


def _store_parameters(own: list[Any], wide: list[Parameter], seed: int) -> list[Any]:
    """Writes stand-ins back into their parameters. Returns those that were rounded by chance."""
    half = [(p.data, w.data) for p, w in zip(own, wide) if p.dtype == torch.float16]
    if half:
        torch._foreach_copy_([data for data, _ in half], [data for _, data in half])
    bfloat16 = [(p, w.data) for p, w in zip(own, wide) if p.dtype == torch.bfloat16]
    _store_rounded([data for _, data in bfloat16], [p.data for p, _ in bfloat16], seed)
    return [p for p, _ in bfloat16]


def _make_stand_ins(own: list[Any]) -> list[Parameter]:
    """float32 copies of parameters and their gradients."""
    wide = [Parameter(data) for data in _to_float32([p.data for p in own])]
    with_grad = [(stand_in, p.grad) for stand_in, p in zip(wide, own) if p.grad is not None]
    for (stand_in, _), grad in zip(with_grad, _to_float32([grad for _, grad in with_grad])):
        stand_in.grad = grad
    return wide


def _widen_states(states: list[dict[str, Any]]) -> dict[tuple[int, str], Tensor]:
    """Makes tensors of 16 bits in states float32. Returns those that were there, by id of the state and name."""
    slots = [
        (state, name, value)
        for state in states
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dtype in HALF_DTYPES
    ]
    for (state, name, _), value in zip(slots, _to_float32([value for _, _, value in slots])):
        state[name] = value
    return {(id(state), name): value for state, name, value in slots}


def _swap_parameters(optimizer: Optimizer, old: list[Any], new: list[Any]) -> None:
    """Other parameters in the optimizer's groups, which inherit the states."""
    successor = {id(before): after for before, after in zip(old, new)}
    for group in optimizer.param_groups:
        group["params"] = [successor.get(id(p), p) for p in group["params"]]
    for before, after in zip(old, new):
        if before in optimizer.state:
            optimizer.state[after] = optimizer.state.pop(before)


def _round_states(parameters: Sequence[Any], states: Any, before: dict[Any, Tensor], seed: int) -> None:
    """Stores the states of bfloat16 parameters as bfloat16, in the tensors that held them before where there are any."""
    found = [(states[p], name) for p in parameters if p in states for name in states[p] if name != "step"]
    found = [slot for slot in found if isinstance(slot[0][slot[1]], Tensor) and slot[0][slot[1]].dtype == torch.float32]
    values = [state[name] for state, name in found]
    for (state, name), value in zip(found, values):
        old = before.get((id(state), name))
        state[name] = torch.empty_like(value, dtype=torch.bfloat16) if old is None else old
    _store_rounded(values, [state[name] for state, name in found], seed)


def _to_float32(tensors: list[Any]) -> list[Tensor]:
    """float32 copies, made by a few large operations instead of many small ones."""
    if len({tensor.device for tensor in tensors}) != 1 or any(tensor.is_sparse for tensor in tensors):
        return [tensor.float() for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).float()
    return [
        part.view(tensor.shape) for part, tensor in zip(flat.split_with_sizes([t.numel() for t in tensors]), tensors)
    ]


def _store_rounded(wide: list[Tensor], narrow: list[Tensor], seed: int) -> None:
    """Rounds by chance, device by device, and writes into the tensors that are there."""
    for device in {tensor.device for tensor in wide}:
        pairs = [(source, target) for source, target in zip(wide, narrow) if source.device == device]
        generator = torch.Generator(device).manual_seed(seed)
        flat = stochastic_round(torch.cat([source.reshape(-1) for source, _ in pairs]), generator)
        parts = flat.split_with_sizes([source.numel() for source, _ in pairs])
        views = [part.view(source.shape) for part, (source, _) in zip(parts, pairs)]
        torch._foreach_copy_([target for _, target in pairs], views)


def stochastic_round(wide: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [n] rounded to bfloat16 [n], up or down by chance, such that the mean is the value.

    Arguments:
        wide: is overwritten. bfloat16 is the upper half of float32, so noise that is added to the lower half
            carries over into the upper one as often as it should.
    """
    bits = wide.view(torch.int32)
    count = wide.numel()
    if wide.device.type == "mps":
        bits.add_(torch.randint(0, 1 << 16, wide.shape, generator=generator, device=wide.device, dtype=torch.int32))
    else:  # four from each draw: drawing is what takes the time
        draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=wide.device)
        draws.random_(-(1 << 63), None, generator=generator)  # all 64 bits; without arguments it fills 63
        bits.add_(draws.view(torch.int16)[:count]).add_(1 << 15)  # -32768 .. 32767 becomes 0 .. 65535
    return wide.view(torch.bfloat16)[1::2]
