"""Batch norm over several processes, compared with BatchNorm over the whole batch.

Errors are relative to the largest entry of the tensor that is compared. The ranks are real processes; all that they are
asked is asked in one go for each number of ranks (`answers`), and the tests read what came back.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch.autograd.profiler import profile
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fulmen
from fulmen.engine.sync_batchnorm import SyncBatchNorm, TorchSyncBatchNorm

SHAPES = {"1d": (5,), "1d-long": (5, 7), "2d": (5, 4, 3), "3d": (5, 2, 3, 2)}
KINDS = {"1d": nn.BatchNorm1d, "1d-long": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}
SPLITS = {  # samples by rank
    2: {"even": (4, 4), "uneven": (1, 7), "empty": (0, 6)},
    3: {"even": (3, 3, 3), "uneven": (1, 6, 2), "empty": (4, 0, 5)},
    4: {"even": (2, 2, 2, 2), "uneven": (5, 1, 3, 1), "empty": (0, 6, 0, 3)},
}
# dtypes of input and parameters, and the largest error: in half precision, two steps from one number to the next
TYPES = {
    "float32": (torch.float32, torch.float32, 1e-6),
    "float64": (torch.float64, torch.float64, 1e-12),
    "bf16-mixed": (torch.bfloat16, torch.float32, 2**-6),
    "bf16-true": (torch.bfloat16, torch.bfloat16, 2**-6),
    "16-mixed": (torch.float16, torch.float32, 2**-9),
}
VARIANTS = {
    "plain": {},
    "no affine": {"affine": False},
    "cumulative average": {"momentum": None},
    "no tracking": {"track_running_stats": False},
}
STEPS = 2
EXACT = ("float32", "float64")
GRID = [
    case
    for case in itertools.product(SHAPES, ("even", "uneven", "empty"), TYPES, VARIANTS)
    if case[3] == "plain" or (case[2] in EXACT and case[0] != "1d-long")
]


def make_layer(shape, types, variant, seed=5):
    torch.manual_seed(seed)
    layer = KINDS[shape](5, dtype=TYPES[types][1], **VARIANTS[variant])
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def make_batch(num_samples, shape, types, seed):
    """Inputs and output gradients of all ranks together."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, num_samples, *SHAPES[shape], generator=generator, dtype=torch.float64)
    return (3 + 2 * x).to(TYPES[types][0]), dy.to(TYPES[types][0])


def part(tensor, sizes):
    """What this rank sees of a batch that lies along the first dimension."""
    return tensor.split(list(sizes))[dist.get_rank()]


def one_pass(layer, x, dy):
    """Output, input gradient, and the gradients of the parameters that this pass alone gives."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, [parameter.grad.clone() for parameter in layer.parameters()]


def error(ours, expected):
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((ours.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


@contextmanager
def recorded(collectives, waits):
    """Writes down which collectives run, and which operations wait for the device to know a value."""
    with profile() as profiler:
        yield
    names = [event.name for event in profiler.function_events]
    collectives += [name for name in names if name.startswith("c10d::")]
    waits += [name for name in names if name in WAITS]


# What the ranks are asked ---------------------------------------------------------------------------------------------


def grid(device="cpu"):
    """One rank's share of each case of the grid."""
    splits, found = SPLITS[dist.get_world_size()], {}
    for case in GRID:
        shape, split, types, variant = case
        layer = SyncBatchNorm.convert(make_layer(shape, types, variant)).to(device)
        passes = []
        for step in range(STEPS):
            whole = make_batch(sum(splits[split]), shape, types, step)
            passes.append(one_pass(layer, *(part(tensor.to(device), splits[split]) for tensor in whole)))
        found[case] = passes, layer.state_dict()
    return found


def far_from_zero():
    sizes = SPLITS[dist.get_world_size()]["uneven"]
    x, dy = far_batch(sum(sizes))
    layer = SyncBatchNorm(3)
    return one_pass(layer, part(x, sizes), part(dy, sizes)), layer.state_dict()


def far_batch(num_samples):
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(2, num_samples, 3, 8, 8, generator=generator)
    return 1e4 + x, dy


def collectives():
    layer = SyncBatchNorm.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    forward, backward, of_parameters, evaluation, waits = [], [], [], [], []
    with recorded(forward, waits):
        y = layer(torch.randn(4, 3, requires_grad=True))
    with recorded(backward, waits):
        y.sum().backward()
    data = torch.randn(4, 3)  # no gradient wanted
    y = SyncBatchNorm(3)(data)
    with recorded(of_parameters, waits):
        y.sum().backward()
    with recorded(evaluation, waits):
        tracked = SyncBatchNorm(3).eval()(data)
        of_batch = SyncBatchNorm(3, track_running_stats=False).eval()(data)
    same = torch.equal(tracked, nn.BatchNorm1d(3).eval()(data))
    same_of_batch = torch.equal(of_batch, F.batch_norm(data, None, None, training=True))
    return forward, backward, of_parameters, evaluation, waits, same and same_of_batch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(2, 4, 3, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64)
        self.linear, self.last = nn.Linear(36, 6).double(), nn.BatchNorm1d(6, momentum=None, dtype=torch.float64)
        self.out = nn.Linear(6, 1).double()

    def forward(self, x):
        x = F.relu(self.first(self.conv(x)))
        return self.out(self.last(self.linear(x.flatten(1))))


def trained(sizes_of_step=None):
    """The state of a small network after some steps; with sizes, each rank sees its part under DDP."""
    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, sizes_of_step = net, sizes_of_step or []
    if sizes_of_step:
        model = nn.parallel.DistributedDataParallel(SyncBatchNorm.convert(net))
    for step, num_samples in enumerate(SAMPLES_OF_STEP):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, num_samples, 2, 5, 5, generator=generator, dtype=torch.float64)
        y = y.mean((1, 2, 3))[:, None]
        scale = 1 / num_samples
        if sizes_of_step:
            x, y = part(x, sizes_of_step[step]), part(y, sizes_of_step[step])
            scale *= dist.get_world_size()  # DDP divides by it
        optimizer.zero_grad()
        ((model(x) - y).square().sum() * scale).backward()
        optimizer.step()
    return net.state_dict()


SAMPLES_OF_STEP = (12, 13, 9, 12, 10, 12)


def training():
    """Even and uneven, and the second rank without samples in one of the steps."""
    num_ranks, sizes = dist.get_world_size(), []
    for step, num_samples in enumerate(SAMPLES_OF_STEP):
        shares = [num_samples // num_ranks] * num_ranks
        if step == 3:
            shares[1] = 0
        shares[0] += num_samples - sum(shares)
        sizes.append(shares)
    return trained(sizes)


def accumulation():
    sizes = SPLITS[dist.get_world_size()]["uneven"]
    layer = SyncBatchNorm.convert(make_layer("2d", "float64", "plain"))
    for step in range(3):
        x, dy = (part(tensor, sizes) for tensor in make_batch(sum(sizes), "2d", "float64", step))
        layer(x).backward(dy)
    return layer.weight.grad, layer.bias.grad


def without_gradients():
    sizes = SPLITS[dist.get_world_size()]["uneven"]
    layer = SyncBatchNorm.convert(make_layer("1d", "float64", "plain"))
    x, _ = make_batch(sum(sizes), "1d", "float64", 0)
    with torch.no_grad():
        y = layer(part(x, sizes))
    return y, y.requires_grad, layer.running_var


def repeated_forward(use_reentrant):
    """Activation checkpointing runs forward again in backward."""
    sizes = SPLITS[dist.get_world_size()]["uneven"]
    layer = SyncBatchNorm.convert(make_layer("2d", "float64", "plain"))
    x, dy = (part(tensor, sizes) for tensor in make_batch(sum(sizes), "2d", "float64", 0))
    x.requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(dy)
    return x.grad, layer.weight.grad


def too_few():
    """One value on the last rank, none elsewhere; then one on each."""
    last = dist.get_rank() == dist.get_world_size() - 1
    layer = SyncBatchNorm(3)
    try:
        layer(torch.ones(int(last), 3))
        said = ""
    except ValueError as raised:
        said = str(raised)
    untouched = layer.num_batches_tracked.item() == 0
    x = torch.full((1, 3), float(dist.get_rank()))
    return said, untouched, layer(x).detach(), layer.running_mean


def nothing_at_all():
    layer = SyncBatchNorm(3, momentum=None)
    *_, gradients = passed = one_pass(layer, torch.ones(0, 3, 2, 2), torch.ones(0, 3, 2, 2))
    return [tensor.shape for tensor in passed[:2]], gradients, layer.state_dict()


def subgroups():
    """The first two ranks form one group; each of the others one of its own."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([0, 1]), *(dist.new_group([other]) for other in range(2, num_ranks))]
    layer = SyncBatchNorm.convert(make_layer("2d", "float64", "plain"), groups[max(0, rank - 1)])
    whole = make_batch(2 * num_ranks, "2d", "float64", 0)
    outside = SyncBatchNorm(3, process_group=groups[0])  # for ranks that are not in it
    data = torch.randn(4, 3)
    outside_is_plain = rank < 2 or torch.equal(outside(data), nn.BatchNorm1d(3)(data))
    return one_pass(layer, *(part(tensor, [2] * num_ranks) for tensor in whole)), outside_is_plain


def lazy():
    sizes = SPLITS[dist.get_world_size()]["uneven"]
    layer = SyncBatchNorm.convert(nn.LazyBatchNorm2d(dtype=torch.float64))
    x, _ = make_batch(sum(sizes), "2d", "float64", 0)
    return layer(part(x, sizes)).detach(), type(SyncBatchNorm.revert(layer))


def channels_last():
    sizes = SPLITS[dist.get_world_size()]["uneven"]
    found = {}
    for shape, layout in (("2d", torch.channels_last), ("3d", torch.channels_last_3d)):
        layer = SyncBatchNorm.convert(make_layer(shape, "float64", "plain"))
        x, dy = make_batch(sum(sizes), shape, "float64", 0)
        mixed = one_pass(layer, part(x, sizes).contiguous(memory_format=layout), part(dy, sizes))
        found[shape] = mixed, [tensor.is_contiguous(memory_format=layout) for tensor in mixed[:2]]
    return found


def autocast():
    layer, linear = SyncBatchNorm(3), nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(torch.randn(4, 3))
        y = layer(hidden)
    y.sum().backward()
    return hidden.dtype, y.dtype, layer.weight.grad.dtype, linear.weight.grad.dtype


def second_derivative():
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(SyncBatchNorm(3)(x).pow(2).sum(), x, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as raised:
        return str(raised)


def everything():
    asked = (grid, far_from_zero, collectives, training, accumulation, without_gradients, too_few, nothing_at_all)
    asked += (subgroups, lazy, channels_last, autocast, second_derivative)
    answers = {function.__name__: function() for function in asked}
    return {**answers, "repeated_forward": [repeated_forward(way) for way in (False, True)]}


class Answers:
    """What the ranks answered; `answers.grid` has one entry by rank."""

    def __init__(self, num_ranks):
        self.num_ranks, self.splits = num_ranks, SPLITS[num_ranks]
        self.by_rank = run_ranks(num_ranks, everything)

    def __getattr__(self, name):
        return [answer[name] for answer in self.by_rank]


@pytest.fixture(scope="module", params=list(SPLITS), ids="{} ranks".format)
def answers(request):
    return Answers(request.param)


# What they should have answered ---------------------------------------------------------------------------------------


def errors_of_pass(ours, expected):
    """Of passes by rank, put together, against a pass over the whole batch."""
    (ys, dxs, by_rank), (y, dx, gradients) = zip(*ours), expected
    found = {"output": error(torch.cat(ys), y), "input gradient": error(torch.cat(dxs), dx)}
    for name, parts, gradient in zip(("weight gradient", "bias gradient"), zip(*by_rank), gradients):
        found[name] = error(torch.stack([one.double() for one in parts]).sum(0).to(gradient.dtype), gradient)
    return found


def errors_of_case(splits, grids, case, device="cpu"):
    shape, split, types, variant = case
    layer, found, by_rank = make_layer(shape, types, variant).to(device), [], [answer[case] for answer in grids]
    for step in range(STEPS):
        whole = (tensor.to(device) for tensor in make_batch(sum(splits[split]), shape, types, step))
        found.append(errors_of_pass([passes[step] for passes, _ in by_rank], one_pass(layer, *whole)))
    for _, state in by_rank:
        assert list(state) == list(layer.state_dict())
        assert all(torch.equal(value, by_rank[0][1][name]) for name, value in state.items())
        found.append({name: error(value, layer.state_dict()[name]) for name, value in state.items()})
    return {name: max(errors.get(name, 0) for errors in found) for errors in found for name in errors}


@pytest.mark.parametrize("case", GRID, ids=", ".join)
def test_a_split_batch_gives_what_batch_norm_gives_for_the_whole(answers, case):
    errors = errors_of_case(answers.splits, answers.grid, case)
    assert len(errors) > 1 and max(errors.values()) <= TYPES[case[2]][2], errors


def test_values_far_from_zero_are_normalised_as_well_as_their_mean_can_be_known(answers):
    x, dy = far_batch(sum(answers.splits["uneven"]))
    layer = nn.BatchNorm2d(3).double()
    y, dx, _ = one_pass(layer, x.double(), dy.double())
    passes, states = zip(*answers.far_from_zero)
    # float32 has steps of 1e-3 at 1e4, and the standard deviation is 1; BatchNorm is as far off
    assert error(torch.cat([y for y, *_ in passes]).double(), y) < 5e-4
    assert error(torch.cat([dx for _, dx, _ in passes]).double(), dx) < 1e-4
    assert all(error(state["running_var"].double(), layer.running_var) < 1e-5 for state in states)
    # the shorter way to a variance has no correct digit here
    naive = (x**2).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2
    assert error(naive.double(), x.double().var((0, 2, 3))) > 0.5


def test_there_is_one_collective_in_each_direction_and_no_wait_for_the_device(answers):
    for forward, backward, of_parameters, evaluation, waits, _ in answers.collectives:
        assert forward == ["c10d::_allgather_base_"] * 2  # two layers
        assert backward == ["c10d::allreduce_"] * 2
        assert of_parameters == evaluation == waits == []


def test_evaluation_is_that_of_batch_norm(answers):
    assert all(same for *_, same in answers.collectives)


def test_training_under_ddp_ends_where_training_on_the_whole_batch_does(answers):
    expected = trained()
    for state in answers.training:
        assert list(state) == list(expected)
        errors = {name: error(state[name], expected[name]) for name in state}
        assert max(errors.values()) <= 1e-12, errors


def test_gradients_accumulate(answers):
    sizes = answers.splits["uneven"]
    layer = make_layer("2d", "float64", "plain")
    for step in range(3):
        x, dy = make_batch(sum(sizes), "2d", "float64", step)
        layer(x).backward(dy)
    for ours, parameter in zip(zip(*answers.accumulation), layer.parameters()):
        assert error(sum(ours), parameter.grad) <= 1e-12


def test_training_mode_without_gradients_counts_too(answers):
    x, _ = make_batch(sum(answers.splits["uneven"]), "1d", "float64", 0)
    layer = make_layer("1d", "float64", "plain")
    ys, with_graph, variances = zip(*answers.without_gradients)
    assert error(torch.cat(ys), layer(x).detach()) <= 1e-12
    assert not any(with_graph)
    assert all(error(variance, layer.running_var) <= 1e-12 for variance in variances)


def test_activation_checkpointing_gives_the_same_gradients(answers):
    layer = make_layer("2d", "float64", "plain")
    _, dx, (weight, _) = one_pass(layer, *make_batch(sum(answers.splits["uneven"]), "2d", "float64", 0))
    for ours in zip(*answers.repeated_forward):
        assert error(torch.cat([part for part, _ in ours]), dx) <= 1e-12
        assert error(sum(part for _, part in ours), weight) <= 1e-12


def test_one_value_among_all_ranks_is_refused_by_all_and_one_each_is_not(answers):
    expected, layer = torch.arange(answers.num_ranks).float()[:, None].expand(-1, 3), nn.BatchNorm1d(3)
    messages, untouched, ys, means = zip(*answers.too_few)
    assert all(message.startswith("Expected more than 1 value per channel when training") for message in messages)
    assert all(untouched)
    assert error(torch.cat(ys), layer(expected).detach()) <= 1e-6
    assert all(error(mean, layer.running_mean) <= 1e-6 for mean in means)


def test_a_batch_that_is_empty_everywhere_moves_nothing(answers):
    layer = nn.BatchNorm2d(3, momentum=None)
    *_, gradients = one_pass(layer, torch.ones(0, 3, 2, 2), torch.ones(0, 3, 2, 2))
    for shapes, ours, state in answers.nothing_at_all:
        assert shapes == [(0, 3, 2, 2)] * 2
        assert all(torch.equal(a, b) for a, b in zip(ours, gradients, strict=True))
        assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


def test_statistics_stay_within_the_process_group(answers):
    x, dy = make_batch(2 * answers.num_ranks, "2d", "float64", 0)
    groups = [slice(0, 4), *(slice(2 * rank, 2 * rank + 2) for rank in range(2, answers.num_ranks))]
    passes, outside_is_plain = zip(*answers.subgroups)
    assert all(outside_is_plain)
    for members, where in zip((passes[:2], *([one] for one in passes[2:])), groups, strict=True):
        expected = one_pass(make_layer("2d", "float64", "plain"), x[where], dy[where])
        assert max(errors_of_pass(members, expected).values()) <= 1e-12


def test_a_lazy_layer_synchronises_from_its_first_batch_on(answers):
    x, _ = make_batch(sum(answers.splits["uneven"]), "2d", "float64", 0)
    ys, kinds = zip(*answers.lazy)
    assert error(torch.cat(ys), nn.BatchNorm2d(5, dtype=torch.float64)(x).detach()) <= 1e-12
    assert set(kinds) == {nn.BatchNorm2d}


@pytest.mark.parametrize("shape", ["2d", "3d"])
def test_the_memory_format_is_kept(answers, shape):
    passes, kept = zip(*(answer[shape] for answer in answers.channels_last))
    batch = make_batch(sum(answers.splits["uneven"]), shape, "float64", 0)
    expected = one_pass(make_layer(shape, "float64", "plain"), *batch)
    assert max(errors_of_pass(passes, expected).values()) <= 1e-12
    assert all(flag for flags in kept for flag in flags)


def test_autocast_keeps_the_dtype_that_batch_norm_gives(answers):
    half, full = torch.bfloat16, torch.float32
    assert answers.autocast == [(half, half, full, full)] * answers.num_ranks


def test_a_second_derivative_is_refused(answers):
    assert all("once_differentiable" in message for message in answers.second_derivative)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
def test_a_split_batch_on_a_gpu_gives_what_batch_norm_gives_for_the_whole():
    grids = run_ranks(2, grid, "cuda")
    for case in GRID:
        errors = errors_of_case(SPLITS[2], grids, case, "cuda")
        assert max(errors.values()) <= TYPES[case[2]][2], (case, errors)


# One process ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_bitwise_batch_norm(shape, variant):
    ours, theirs = SyncBatchNorm.convert(make_layer(shape, "float32", variant)), make_layer(shape, "float32", variant)
    batch = make_batch(4, shape, "float32", 0)
    (y, dx, gradients), (their_y, their_dx, their_gradients) = one_pass(ours, *batch), one_pass(theirs, *batch)
    states = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    pairs = [(y, their_y), (dx, their_dx), *zip(gradients, their_gradients, strict=True), *states]
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_process_group_it_is_batch_norm_bit_by_bit(shape, variant):
    assert_bitwise_batch_norm(shape, variant)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_rank_is_batch_norm_bit_by_bit(one_rank, shape):
    assert_bitwise_batch_norm(shape, "plain")


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


class Narrow(nn.BatchNorm1d):
    """A user's layer with a check of its own."""

    def _check_input_dim(self, input):
        super()._check_input_dim(input)
        if input.shape[1] > 8:
            raise ValueError("too wide")


class Shifted(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


def make_model():
    kinds = [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), Narrow(3)]
    parametrize.register_parametrization(kinds[1], "weight", Scaled())
    return nn.ModuleDict({"kinds": nn.ModuleList(kinds), "other": nn.InstanceNorm1d(3), "linear": nn.Linear(3, 3)})


def test_layers_stay_the_objects_they_were_and_go_back_to_their_class():
    model = make_model()
    layers, kinds = list(model.modules()), [type(layer) for layer in model.modules()]
    parameters, buffers = list(model.parameters()), list(model.buffers())
    attributes, keys = [set(vars(layer)) for layer in layers], list(model.state_dict())
    model["kinds"][2].eval()
    calls = []
    model["kinds"][0].register_forward_hook(lambda *_: calls.append("hook"))

    assert SyncBatchNorm.convert(SyncBatchNorm.convert(model)) is model
    assert [isinstance(layer, SyncBatchNorm) for layer in model["kinds"]] == [True] * 5
    assert not isinstance(model["kinds"][3], nn.SyncBatchNorm)  # which DDP refuses on a CPU
    assert isinstance(model["kinds"][0], nn.BatchNorm1d)
    assert sum(isinstance(layer, SyncBatchNorm) for layer in model.modules()) == 5
    for now, before in ((model.modules(), layers), (model.parameters(), parameters), (model.buffers(), buffers)):
        assert all(a is b for a, b in zip(now, before, strict=True))
    assert list(model.state_dict()) == keys
    assert [layer.training for layer in model["kinds"]] == [True, True, False, True, True]
    model["kinds"][0](torch.randn(4, 3))
    assert calls == ["hook"]

    assert SyncBatchNorm.revert(model) is model
    assert [type(layer) for layer in model.modules()] == kinds
    assert [set(vars(layer)) for layer in model.modules()] == attributes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_the_module_itself_may_be_the_layer():
    layer = nn.BatchNorm2d(3)
    assert SyncBatchNorm.convert(layer) is layer and type(layer).__name__ == "SyncBatchNorm2d"
    assert type(SyncBatchNorm.revert(layer)) is nn.BatchNorm2d


def test_a_converted_layer_checks_its_input_as_before():
    layers = SyncBatchNorm.convert(nn.ModuleList([nn.BatchNorm2d(3), Narrow(9)]))
    with pytest.raises(ValueError, match="4D"):
        layers[0](torch.randn(4, 3))
    with pytest.raises(ValueError, match="too wide"):
        layers[1](torch.randn(4, 9))
    with pytest.raises(ValueError, match="1 dimensions, but needs at least 2"):
        SyncBatchNorm(3)(torch.randn(3))


def test_a_layer_with_a_forward_of_its_own_is_left_alone_with_a_warning():
    model = nn.Sequential(Shifted(3))
    with pytest.warns(UserWarning, match="`Shifted` has a `forward` of its own"):
        SyncBatchNorm.convert(model)
    assert type(model[0]) is Shifted


def test_a_layer_that_was_made_to_synchronise_stays_one():
    layer = SyncBatchNorm(3)
    assert type(SyncBatchNorm.revert(SyncBatchNorm.convert(layer))) is SyncBatchNorm


def test_state_dicts_go_both_ways():
    plain, synchronised = make_layer("2d", "float32", "plain"), SyncBatchNorm(5)
    plain(make_batch(4, "2d", "float32", 0)[0])
    synchronised.load_state_dict(plain.state_dict())
    fresh = nn.BatchNorm2d(5)
    fresh.load_state_dict(SyncBatchNorm.convert(copy.deepcopy(plain)).state_dict())
    for one in (synchronised, fresh):
        assert all(torch.equal(one.state_dict()[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_of_converted_layers_are_converted_too(duplicate):
    layer = SyncBatchNorm.convert(make_layer("2d", "float32", "plain"))
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert twin.weight is not layer.weight and torch.equal(twin.weight, layer.weight)
    assert type(SyncBatchNorm.revert(twin)) is nn.BatchNorm2d and isinstance(layer, SyncBatchNorm)


def test_the_plugin_converts_and_reverts():
    plugin, model = TorchSyncBatchNorm(), make_model()
    kinds = [type(layer) for layer in model.modules()]
    assert isinstance(plugin.apply(model)["kinds"][0], SyncBatchNorm)
    assert [type(layer) for layer in plugin.revert(model).modules()] == kinds


def test_the_layer_is_a_public_name():
    assert fulmen.SyncBatchNorm is SyncBatchNorm


# The tool that runs the ranks -----------------------------------------------------------------------------------------


def fails_on_the_second():
    if dist.get_rank() == 1:
        raise LookupError("nothing there")
    dist.barrier()


def test_a_rank_that_fails_ends_all_and_its_traceback_comes_first():
    with pytest.raises(RuntimeError) as raised:
        run_ranks(2, fails_on_the_second)
    before, _, after = str(raised.value).partition("rank 1:")
    assert "rank 0:" not in before and "fails_on_the_second" in after.partition("LookupError: nothing there")[0]
    assert not multiprocessing.active_children()
