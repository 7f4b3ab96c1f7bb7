"""`torch.compile(module)` before `fit`: the same numbers, no graph break at `self.log`, and no second compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import from_compiled, to_uncompiled


@pytest.fixture(autouse=True)
def fresh_compiler():
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled: each recompilation adds one."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


class Talkative(Regression):
    """Dropout, Adam, a learning rate that changes at every step, and every way of logging."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = mse_loss(self(self.dropout(x)), y)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("weighted", 2 * loss, on_epoch=True, batch_size=x.size(0))
        self.log_dict({"total": loss, "number": 0.5, "count": 1, "flag": True}, on_epoch=True, reduce_fx="sum")
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("smallest", loss, on_step=False, on_epoch=True, reduce_fx="min", logger=False)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watcher(pl.Callback):
    """What could be read after each batch, and how many graphs there were by then."""

    def __init__(self):
        self.seen, self.graphs, self.rates = [], [], []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({name: value.clone() for name, value in trainer.callback_metrics.items()})
        self.graphs.append(graphs())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(kind, *, samples=16, val=None, epochs=3, trainer_options=None, **compile_options):
    """Trains a `kind`, compiled if there are `compile_options`. Returns module, trainer and watcher."""
    torch.manual_seed(0)
    module, watcher = kind(), Watcher()
    trainer = make_trainer(max_epochs=epochs, callbacks=[watcher], log_every_n_steps=1, **(trainer_options or {}))
    trainer.fit(torch.compile(module, **compile_options) if compile_options else module, make_loader(samples), val)
    assert trainer.lightning_module is module
    return module, trainer, watcher


def assert_same(compiled, plain, close=torch.equal):
    (module, trainer, watcher), (other, other_trainer, other_watcher) = compiled, plain
    everything = zip(
        [module.state_dict(), trainer.callback_metrics, trainer.logged_metrics, *watcher.seen],
        [other.state_dict(), other_trainer.callback_metrics, other_trainer.logged_metrics, *other_watcher.seen],
        strict=True,
    )
    for values, expected in everything:
        assert list(values) == list(expected)
        assert all(close(values[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------- the numbers, and how often it compiles


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_trains_and_logs_exactly_like_a_plain_one(backend, tmp_path):
    def with_logger(name):
        return {"logger": pl.loggers.CSVLogger(tmp_path, name=name, version="")}

    plain = run(Talkative, trainer_options=with_logger("plain"))
    assert graphs() == 0
    compiled = run(Talkative, trainer_options=with_logger("compiled"), backend=backend, fullgraph=True)
    assert_same(compiled, plain)
    files = [(tmp_path / name / "metrics.csv").read_text() for name in ("compiled", "plain")]
    assert files[0] == files[1]
    assert {"loss_step", "loss_epoch", "weighted_epoch", "total_epoch"} <= set(files[0].split("\n")[0].split(","))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_changing_learning_rate_compiles_nothing_again(backend):
    _, trainer, watcher = run(Talkative, backend=backend, fullgraph=True)
    assert trainer.global_step == len(set(watcher.rates)) == 12, "the learning rate changes at every step"
    assert set(watcher.graphs) == {1} and breaks() == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_learning_rate_that_is_logged_is_no_constant_either(backend):
    if backend != "eager" and torch.__version__ < "2.13":
        pytest.skip("such a torch makes a constant of every number that a graph only returns")

    class Telling(Talkative):
        def training_step(self, batch, batch_idx):
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    compiled = run(Telling, backend=backend, fullgraph=True)
    assert_same(compiled, run(Telling))
    assert set(compiled[2].graphs[1:]) == {2}, "the second batch shows that it changes"


@pytest.mark.slow
def test_inductor_comes_to_the_same():
    class Deterministic(Talkative):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Identity()  # inductor draws other random numbers

    compiled = run(Deterministic, backend="inductor", fullgraph=True)
    assert breaks() == 0 and set(compiled[2].graphs) == {1}
    assert_same(compiled, run(Deterministic), torch.allclose)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
    ],
    ids=["bf16-mixed", "bf16-true", "accumulate", "clip"],
)
def test_options_of_the_trainer_mean_the_same_for_a_compiled_module(options):
    compiled = run(Talkative, trainer_options=options, backend="aot_eager", fullgraph=True)
    assert_same(compiled, run(Talkative, trainer_options=options))


def test_batches_of_several_sizes_are_weighted_by_a_size_the_compiler_made_dynamic():
    class Weighted(Regression):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("passed", loss, on_epoch=True, on_step=False, batch_size=batch[0].size(0))
            self.log("looked_up", loss, on_epoch=True, on_step=False)
            return loss

    compiled = run(Weighted, samples=14, backend="eager", fullgraph=True)
    assert_same(compiled, run(Weighted, samples=14))
    metrics = compiled[1].callback_metrics
    assert metrics["passed"] == metrics["looked_up"]
    assert graphs() == 2, "one for a fixed size, one for all"


# ---------------------------------------------------------------------- where the compiled code is


class Helped(Regression):
    """The step is not compiled, a method that it calls several times is."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for _ in range(3):
            loss = self.helper(loss, 1.0)
            self.log("outside", loss, on_epoch=True)
        return loss

    def helper(self, loss, factor):
        self.log("inside", loss, on_epoch=True, reduce_fx="sum")
        self.log("outside", -loss, on_epoch=True)
        return loss * factor


class Decorated(Helped):
    helper = torch.compile(Helped.helper, backend="eager", fullgraph=True)


class Broken(Helped):
    def helper(self, loss, factor):
        torch._dynamo.graph_break()
        return super().helper(loss, factor)


def test_a_compiled_helper_logs_as_often_as_it_is_called():
    compiled = run(Decorated)
    assert set(compiled[2].graphs) == {1}
    assert_same(compiled, run(Helped))
    assert compiled[2].seen[0]["outside_step"] > 0, "the newest value is the one logged last"


def test_logging_around_a_graph_break_neither_loses_values_nor_recompiles():
    compiled = run(Broken, backend="eager")
    assert breaks() > 0 and len(set(compiled[2].graphs)) == 1
    assert_same(compiled, run(Helped))


class Inner(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        answer = self.layer(x)
        self.log("inner", answer.mean(), on_epoch=True)
        return answer


class Outer(Regression):
    def __init__(self):
        super().__init__()
        self.layer = Inner()


class OuterCompiledInside(Outer):
    def __init__(self):
        super().__init__()
        self.layer.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize(("kind", "options"), [(Outer, {"backend": "eager"}), (OuterCompiledInside, {})])
def test_a_module_inside_the_module_logs_too(kind, options):
    compiled = run(kind, **options)
    assert set(compiled[2].graphs) == {1}
    assert_same(compiled, run(Outer))


def test_a_value_that_is_changed_in_place_is_logged_as_it_was():
    class Changing(Regression):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            value = loss.detach().clone()
            self.log("value", value, on_epoch=True)
            value.zero_()
            self.log("zero", value)
            return loss

    compiled = run(Changing, backend="aot_eager", fullgraph=True)
    assert compiled[1].callback_metrics["value"] > 0 and compiled[1].callback_metrics["zero"] == 0
    assert_same(compiled, run(Changing))


def test_a_value_logged_with_its_graph_keeps_it():
    class Graph(Regression):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("with", loss, enable_graph=True)
            self.log("without", loss)
            return loss

        def on_before_zero_grad(self, optimizer):
            metrics = self.trainer.callback_metrics
            self.requires = metrics["with"].requires_grad, metrics["without"].requires_grad

    assert run(Graph, epochs=1, backend="eager")[0].requires == (True, False)


def test_metrics_of_torchmetrics_are_logged_from_compiled_code():
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(Regression):
        def __init__(self):
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()
            self.both = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError()], prefix="mean/")

        def training_step(self, batch, batch_idx):
            answer = self(batch[0])
            self.error(answer, batch[1])
            self.both.update(answer, batch[1])
            self.log("error", self.error, on_step=True, on_epoch=True)
            self.log_dict(self.both, on_step=False, on_epoch=True)
            return mse_loss(answer, batch[1])

    compiled, plain = run(Measured, backend="eager"), run(Measured)
    assert_same(compiled, plain)
    assert "mean/MeanAbsoluteError" in compiled[1].callback_metrics


class Validated(Regression):
    def on_validation_epoch_start(self):
        self.say_hello()

    def say_hello(self):
        self.log("hello", torch.ones(()))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True)


class ValidatedWithCompiledHook(Validated):
    say_hello = torch.compile(Validated.say_hello, backend="eager", fullgraph=True)


def test_validation_logs_per_loader_and_not_in_the_name_of_the_next():
    val = [make_loader(8), make_loader(6, seed=2)]
    compiled = run(ValidatedWithCompiledHook, val=val, backend="eager", fullgraph=True)
    assert_same(compiled, run(Validated, val=val))
    assert {"hello", "val_loss_epoch/dataloader_idx_0", "val_loss_epoch/dataloader_idx_1"} <= set(
        compiled[1].callback_metrics
    )


# ---------------------------------------------------------------------- mistakes, and no trainer


@pytest.mark.parametrize(
    "log",
    [
        lambda self, loss: self.log("a", loss, on_step=False, on_epoch=False),
        lambda self, loss: self.log("a", loss, reduce_fx="median"),
        lambda self, loss: self.log("a", loss) or self.log("a", loss, on_epoch=True),
        lambda self, loss: self.log("a", loss.expand(2)),
        lambda self, loss: self.log("a", "much"),
        lambda self, loss: self.log("a", {"b": loss}),
        lambda self, loss: self.log(1, loss),
    ],
    ids=["never", "reduce_fx", "twice", "shape", "string", "dict", "name"],
)
def test_wrong_arguments_are_refused_with_the_same_words(log):
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            log(self, loss)
            return loss

    errors = []
    for options in ({}, {"backend": "eager", "fullgraph": True}):
        with pytest.raises((MisconfigurationException, ValueError, TypeError)) as caught:
            run(Wrong, **options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_logging_where_nothing_may_be_logged_is_refused_at_the_latest_when_the_run_ends():
    class Late(Regression):
        def on_fit_end(self):
            self.say()

        @torch.compile(backend="eager", fullgraph=True)
        def say(self):
            self.log("late", torch.ones(()))

    with pytest.raises(MisconfigurationException, match="on_fit_end"):
        make_trainer().fit(Late(), make_loader())


def test_a_hook_that_logs_before_the_first_batch_needs_no_size_of_it():
    class Texts(Regression):
        def on_train_epoch_start(self):
            self.say()

        @torch.compile(backend="eager", fullgraph=True)
        def say(self):
            self.log("start", torch.ones(()))

        def training_step(self, batch):
            return self.layer.weight.sum()

    trainer = make_trainer()
    trainer.fit(Texts(), DataLoader([1, 2], collate_fn=lambda _: object()))
    assert trainer.callback_metrics["start"] == 1


@pytest.mark.parametrize("view", ["callback_metrics", "logged_metrics", "progress_bar_metrics"])
def test_the_next_hook_reads_what_compiled_code_logged(view):
    class Reading(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            self.seen = dict(getattr(trainer, view))

    reading, trainer = Reading(), make_trainer(limit_train_batches=1)
    trainer.callbacks.append(reading)
    trainer.fit(torch.compile(Talkative(), backend="eager"), make_loader())
    assert reading.seen["loss_step"] > 0


def test_what_is_logged_after_a_run_is_not_found_in_the_next():
    class Failing(Regression):
        fails = True

        @torch.compile(backend="eager")
        def helper(self, loss):
            self.log("never", loss)

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if self.fails:
                self.helper(loss)
                raise ArithmeticError
            return loss

    module, trainer = Failing(), make_trainer()
    with pytest.raises(ArithmeticError):
        trainer.fit(module, make_loader())
    module.helper(torch.ones(()))
    module.fails = False
    trainer.fit(module, make_loader())
    module.helper(torch.ones(()))
    assert trainer.callback_metrics == {}
    trainer.fit(module, make_loader())
    assert trainer.callback_metrics == {}


def test_without_a_trainer_and_in_barebones_compiled_logging_does_nothing():
    module = Regression()
    batch = next(iter(make_loader()))
    torch.compile(module.training_step, backend="eager", fullgraph=True)(batch, 0).backward()
    trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
    trainer.fit(torch.compile(Regression(), backend="eager", fullgraph=True), make_loader())
    assert trainer.global_step == 3 and trainer.callback_metrics == {}


# ---------------------------------------------------------------------- what is compiled, and afterwards


class Counted:
    """A backend that counts how often its graphs run."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def counted(*args):
            self.calls += 1
            return graph.forward(*args)

        return counted


def test_every_verb_runs_the_compiled_methods():
    backend = Counted()
    model = torch.compile(Regression(), backend=backend, fullgraph=True)
    trainer = make_trainer()
    calls = []
    trainer.fit(model, make_loader(12))
    for verb in (trainer.validate, trainer.test, trainer.predict):
        calls.append(backend.calls)
        verb(model, make_loader(12))
    assert [*calls, backend.calls] == [3, 6, 9, 12]
    assert {"val_loss", "test_loss"} & set(trainer.callback_metrics) == set() and trainer.logged_metrics == {}


def test_steps_that_nobody_wrote_stay_unwritten():
    class Trained(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, batch):
            return self.layer(batch[0])

        def training_step(self, batch):
            return mse_loss(self(batch), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    backend, module, trainer = Counted(), Trained(), make_trainer()
    model = torch.compile(module, backend=backend)
    with pytest.warns(UserWarning, match="no `validation_step`"):
        trainer.fit(model, make_loader(), make_loader())
    assert {name for name in vars(module) if name.endswith("_step")} == {"training_step"}
    backend.calls = 0
    outputs = trainer.predict(model, make_loader(12))
    assert backend.calls == len(outputs) == 3, "`predict_step` calls the compiled `forward`"


def test_the_signature_of_a_step_is_seen_through_the_compiler():
    class Pulling(Regression):
        def training_step(self, dataloader_iter):
            batch, self.last, _ = next(dataloader_iter)
            loss = self.loss(batch)
            self.log("loss", loss, on_epoch=True, batch_size=batch[0].size(0))
            return loss

    class Short(Regression):
        def training_step(self, batch):
            loss = self.loss(batch)
            self.log("loss", loss, on_epoch=True)
            return loss

        def validation_step(self, batch):
            self.log("val_loss", self.loss(batch))

    assert_same(run(Pulling, samples=10, backend="eager"), run(Pulling, samples=10))
    val = make_loader(5)
    assert_same(run(Short, val=val, backend="eager", fullgraph=True), run(Short, val=val))


def test_a_second_trainer_does_not_compile_again():
    module = Regression()
    model = torch.compile(module, backend="eager", fullgraph=True)
    for epochs in (1, 2):
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(model, make_loader())
        assert graphs() == 1 and trainer.global_step == 3 * epochs and "train_loss" in trainer.callback_metrics


def test_copies_of_a_module_that_was_trained_compiled_are_independent(tmp_path):
    module, _, _ = run(Regression, backend="eager")
    before = copy.deepcopy(module.state_dict())
    torch.save(module, tmp_path / "module.pt")
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ]
    for other in copies:
        assert "training_step" not in vars(other) and not hasattr(other, "_compiler_ctx")
        make_trainer().fit(other, make_loader())
        assert not torch.equal(other.layer.weight, before["layer.weight"])
        assert torch.equal(module.layer.weight, before["layer.weight"])
    make_trainer().fit(module, make_loader())
    assert not torch.equal(module.layer.weight, before["layer.weight"])


def test_a_module_compiled_in_place_can_be_copied():
    module = Regression()
    module.compile(backend="eager")
    x = torch.ones(1, 4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        torch.nn.init.zeros_(other.layer.weight)
        assert not torch.equal(other(x), module(x))


def test_unwrapping_twice_compiles_once_and_other_options_replace_the_first():
    module = Regression()
    first, second = (torch.compile(module, backend=Counted()) for _ in range(2))
    assert from_compiled(first) is module
    step = module.training_step
    assert from_compiled(first) is module and module.training_step is step
    from_compiled(second)
    batch = next(iter(make_loader()))
    module.training_step(batch, 0)
    assert module._compiler_ctx["dynamo_ctx"] is second.dynamo_ctx and graphs() == 1
    assert module.training_step is not step


def test_to_uncompiled_gives_the_methods_back():
    module = Regression()
    module.test_step = own = lambda batch, batch_idx: None
    from_compiled(torch.compile(module, backend="eager"))
    assert module.test_step is not own
    assert to_uncompiled(module) is module
    assert module.test_step is own and "training_step" not in vars(module) and "_compiler_ctx" not in vars(module)
    with pytest.raises(ValueError, match="not compiled"):
        to_uncompiled(module)
    assert to_uncompiled(torch.compile(module, backend="eager")) is module


def test_what_the_user_compiled_or_disabled_is_left_alone():
    inner, outer = Counted(), Counted()

    class Mixed(Regression):
        @torch.compile(backend=inner)
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

        @torch.compiler.disable
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", mse_loss(self.layer(batch[0]), batch[1]))

    run(Mixed, epochs=1, samples=12, val=make_loader(), backend=outer)
    assert (inner.calls, outer.calls) == (3, 0)
