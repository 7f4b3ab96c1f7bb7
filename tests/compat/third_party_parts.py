"""More extensions as third parties write them for Lightning 2.6: loops, loggers, bars, callbacks, data and optimizers.

Like `third_party.py`, whose tools it uses, it runs with either package.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
from typing import Any

import third_party
import torch
import torchmetrics
from third_party import (
    FABRIC,
    ROOT,
    Net,
    RememberingLogger,
    case,
    find,
    make_loader,
    make_trainer,
    new_path,
    pl,
    weights_of,
)
from torch import nn

RunningStage = find("trainer.states", "RunningStage")
TrainerFn = find("trainer.states", "TrainerFn")

# ---------------------------------------------------------------------- loops


class Noting(Net):
    """Notes where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def training_step(self, batch, batch_idx):
        self.told.append(f"t{batch_idx}")
        return super().training_step(batch, batch_idx)

    def on_validation_start(self):
        self.told.append("s" if self.trainer.sanity_checking else "v")

    def on_train_start(self):
        self.told.append("start")

    def on_train_epoch_start(self):
        self.told.append("[")

    def on_train_epoch_end(self):
        self.told.append("]")

    def on_train_end(self):
        self.told.append("end")


@case
def a_fit_loop_with_parts_of_its_own() -> Any:
    class Own(find("loops.fit_loop", "_FitLoop")):
        def setup_data(self):
            module.told.append("data")
            super().setup_data()

        def on_advance_start(self):
            module.told.append("before")
            super().on_advance_start()

        def advance(self):
            module.told.append("advance")
            super().advance()

        def on_advance_end(self):
            super().on_advance_end()
            module.told.append("after")

        @property
        def done(self):
            return super().done or module.told.count("after") == 2

    module = Noting()
    trainer = make_trainer(num_sanity_val_steps=1)
    trainer.fit_loop = Own(trainer, max_epochs=5)
    trainer.fit(module, make_loader(8), make_loader(4))
    known = isinstance(trainer.fit_loop, find("loops.fit_loop", "_FitLoop"))
    return " ".join(module.told), trainer.current_epoch, trainer.max_epochs, known, weights_of(module)


@case
def a_fit_loop_that_runs_by_itself() -> Any:
    class Own(find("loops.fit_loop", "_FitLoop")):
        def run(self):
            self.setup_data()
            if self.skip:
                return
            self.reset()
            self.on_run_start()
            while not self.done:
                try:
                    self.on_advance_start()
                    self.advance()
                    self.on_advance_end()
                except StopIteration:
                    break
            self.on_run_end()

    module = Noting()
    trainer = make_trainer(num_sanity_val_steps=1)
    trainer.fit_loop = Own(trainer, 1, 2)
    trainer.fit(module, make_loader(8), make_loader(4))
    return " ".join(module.told), trainer.min_epochs, trainer.global_step, weights_of(module)


@case
def an_epoch_loop_that_chooses_when_to_validate() -> Any:
    class Own(find("loops.training_epoch_loop", "_TrainingEpochLoop")):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.validated_at = 0

        def _should_check_val_fx(self, data_fetcher):
            if self.restarting and self.global_step % self.trainer.val_check_batch == 0:
                return False
            due = self.global_step % 2 == 0 and self.global_step != self.validated_at and not self._should_accumulate()
            self.validated_at = self.global_step if due else self.validated_at
            return due or (data_fetcher.done and super()._should_check_val_fx(data_fetcher))

        def advance(self, data_fetcher):
            super().advance(data_fetcher)
            module.told.append("done")

        def on_advance_end(self, data_fetcher):
            super().on_advance_end(data_fetcher)
            module.told.append(str(self.batch_progress.current.ready))

    module = Noting()
    trainer = make_trainer(max_epochs=2)
    kind = find("loops.training_epoch_loop", "_TrainingEpochLoop")
    known = isinstance(trainer.fit_loop.epoch_loop, kind)
    trainer.fit_loop.epoch_loop = Own(trainer, trainer.min_steps, trainer.max_steps)
    trainer.fit(module, make_loader(), make_loader(4))
    return " ".join(module.told), trainer.global_step, known, isinstance(trainer.fit_loop.epoch_loop, kind)


class ReportingLoop(find("loops.evaluation_loop", "_EvaluationLoop")):
    reported: list[str] = []

    @staticmethod
    def _print_results(results, stage):
        for found in results:
            ReportingLoop.reported += [f"{stage} {name} {value.item():.4f}" for name, value in found.items()]

    def on_run_end(self):
        results = super().on_run_end()
        return [{**found, "more": 1.0} for found in results]


@case
def evaluation_loops_of_a_trainer_of_its_own() -> Any:
    class Own(pl.Trainer):
        def __init__(self, inference_mode: bool = True, **kwargs: Any) -> None:
            super().__init__(inference_mode=inference_mode, **kwargs)
            kinds = ((TrainerFn.TESTING, RunningStage.TESTING), (TrainerFn.VALIDATING, RunningStage.VALIDATING))
            self.test_loop, self.validate_loop = (
                ReportingLoop(self, *kind, inference_mode=inference_mode) for kind in kinds
            )

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Own(accelerator="cpu", **quiet)
    ReportingLoop.reported.clear()
    (tested,) = trainer.test(Net(), make_loader())
    (validated,) = trainer.validate(Net(), make_loader())
    return ReportingLoop.reported, sorted(tested), sorted(validated), isinstance(trainer.test_loop, ReportingLoop)


@case
def a_prediction_loop() -> Any:
    class Own(find("loops.prediction_loop", "_PredictionLoop")):
        def on_run_end(self):
            super().on_run_end()
            return "mine"

    trainer = make_trainer()
    trainer.predict_loop = Own(trainer)
    return trainer.predict(Net(), make_loader(4))


# ---------------------------------------------------------------------- loggers and profilers


@case
def a_logger() -> Any:
    class Own(find("loggers.logger", "Logger")):
        @property
        def name(self):
            return "own"

        @property
        def version(self):
            return "0.1"

        @property
        @find("loggers.logger", "rank_zero_experiment")
        def experiment(self):
            return "the experiment"

        @find("utilities", "rank_zero_only")
        def log_hyperparams(self, params, *args, **kwargs):
            calls.append(f"hyper-parameters {dict(params)}")

        @find("utilities", "rank_zero_only")
        def log_metrics(self, metrics, step):
            calls.append(f"{sorted(metrics)} {step}")

        def after_save_checkpoint(self, checkpoint_callback):
            calls.append(f"saved {os.path.basename(checkpoint_callback.best_model_path)}")

        def log_graph(self, model, input_array=None):
            calls.append("graph")

        @find("utilities", "rank_zero_only")
        def finalize(self, status):
            calls.append(status)

    class Tuned(Net):
        def __init__(self, size=1):
            super().__init__()
            self.save_hyperparameters()

    calls: list[str] = []
    folder = tempfile.mkdtemp()
    logger = Own()
    callback = pl.callbacks.ModelCheckpoint(monitor="train_loss")
    options = {"default_root_dir": folder, "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = make_trainer(logger=logger, callbacks=[callback], **options)
    trainer.fit(Tuned(), make_loader(), make_loader())
    files = [os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names]
    return calls, files, logger.experiment, (logger.save_dir, logger.root_dir, logger.log_dir, logger.group_separator)


@case
def several_loggers_and_one_that_does_nothing() -> Any:
    first = RememberingLogger()
    trainer = make_trainer(logger=[first, find("loggers", "CSVLogger")(tempfile.mkdtemp())], log_every_n_steps=1)
    trainer.fit(Net(), make_loader())
    nothing = find("loggers.logger", "DummyLogger")()
    answers = nothing.experiment.add_image("x", 1), nothing.experiment.nop(), nothing.name, nothing.version
    rows = [sorted(row) for row in first.seen]
    return rows, type(trainer.logger).__name__, answers, type(nothing[0].anything).__name__ == "method"


@case
def a_logger_of_fabric() -> Any:
    class Own(find("loggers.logger", "Logger", FABRIC)):
        name = "own"
        version = 1

        @property
        @find("loggers.logger", "rank_zero_experiment", FABRIC)
        def experiment(self):
            return 5

        def log_metrics(self, metrics, step=None):
            calls.append(f"{metrics} {step}")

        def log_hyperparams(self, params):
            calls.append(f"{params}")

    calls: list[str] = []
    fabric = importlib.import_module(FABRIC).Fabric(accelerator="cpu", devices=1, loggers=Own())
    fabric.log("a", 1.0, step=3)
    fabric.log_dict({"b": 2})
    fabric.logger.log_hyperparams({"size": 1})
    fabric.logger.finalize("success")
    return calls, fabric.logger.experiment, fabric.logger.root_dir, fabric.logger.group_separator


@case
def a_profiler() -> Any:
    class Own(find("profilers", "Profiler")):
        def __init__(self, dirpath=None, filename=None):
            super().__init__(dirpath=dirpath, filename=filename)
            self.open = []

        def start(self, action_name):
            self.open.append(action_name)
            seen.add(action_name)

        def stop(self, action_name):
            self.open.remove(action_name)

        def summary(self):
            return f"{len(self.open)} open"

    class Profiled(Net):
        def training_step(self, batch, batch_idx):
            with self.trainer.profiler.profile("mine"):
                return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            pass

    seen: set[str] = set()
    folder = tempfile.mkdtemp()
    make_trainer(profiler=Own(folder, "times")).fit(Profiled(), make_loader())
    (name,) = os.listdir(folder)
    wanted = {"mine", "run_training_batch", "run_training_epoch", "[Strategy]SingleDeviceStrategy.training_step"}
    wanted |= {"[LightningModule]Profiled.optimizer_step", "[LightningModule]Profiled.on_train_epoch_end"}
    with open(os.path.join(folder, name)) as file:
        return sorted(wanted & seen), name, file.read().strip()


# ---------------------------------------------------------------------- bars and callbacks


@case
def a_bar_from_nothing() -> Any:
    class Bar(find("callbacks", "ProgressBar")):
        def __init__(self):
            super().__init__()
            self.on = True

        def disable(self):
            self.on = False

        def enable(self):
            self.on = True

        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            seen.append(f"{self.total_train_batches} batches, mine: {self.trainer is trainer}")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            seen.append(f"{batch_idx} {sorted(self.get_metrics(trainer, pl_module))}")

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if self.has_dataloader_changed(dataloader_idx):
                seen.append(f"loader {dataloader_idx}: {self.total_val_batches_current_dataloader}")

        def on_validation_end(self, trainer, pl_module):
            self.reset_dataloader_idx_tracker()

    class Shown(Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("shown", loss, prog_bar=True)
            self.log("both", loss, prog_bar=True, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    seen: list[str] = []
    bar = Bar()
    make_trainer(callbacks=[bar], enable_progress_bar=True).fit(
        Shown(), make_loader(8), [make_loader(8), make_loader(4)]
    )
    words = (bar.sanity_check_description, bar.train_description, bar.validation_description, bar.test_description)
    return seen, words, bar.predict_description


@case
def a_tqdm_bar() -> Any:
    class Bar(find("callbacks", "TQDMProgressBar")):
        def init_train_tqdm(self):
            bar = super().init_train_tqdm()
            bar.set_description("running")
            seen.append("train")
            return bar

        def init_validation_tqdm(self):
            seen.append("validation")
            return super().init_validation_tqdm()

        def init_sanity_tqdm(self):
            seen.append("sanity")
            return super().init_sanity_tqdm()

        def init_test_tqdm(self):
            seen.append("test")
            return super().init_test_tqdm()

        def init_predict_tqdm(self):
            seen.append("predict")
            return super().init_predict_tqdm()

        def get_metrics(self, trainer, pl_module):
            items = super().get_metrics(trainer, pl_module)
            items.pop("v_num", None)
            items["extra"] = 7
            return items

        def on_train_epoch_start(self, trainer, *args):
            super().on_train_epoch_start(trainer, *args)
            seen.append(self.train_progress_bar.total)
            self.train_progress_bar.set_description(f"epoch {trainer.current_epoch}")

    seen: list[Any] = []
    screen = io.StringIO()
    bar = Bar(refresh_rate=1)
    with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
        trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=1)
        module = Net()
        trainer.fit(module, make_loader(), make_loader())
        trainer.test(module, make_loader(), verbose=False)
        trainer.predict(module, make_loader())
    return seen, "extra=7" in screen.getvalue(), bar.refresh_rate, bar.is_enabled


@case
def callbacks_with_states() -> Any:
    class Counter(pl.Callback):
        def __init__(self, what="x"):
            self.what = what
            self.count = 0

        @property
        def state_key(self):
            return self._generate_state_key(what=self.what)

        def setup(self, trainer, pl_module, stage):
            seen.append(f"setup {self.what} {stage}")

        def teardown(self, trainer, pl_module, stage):
            seen.append(f"teardown {self.what} {stage}")

        def on_train_batch_end(self, *args):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state_dict):
            self.count = state_dict["count"]

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint[f"of {self.what}"] = self.count

        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            seen.append(f"loaded {checkpoint[f'of {self.what}']}")

    seen: list[str] = []
    path = new_path()
    trainer = make_trainer(callbacks=[Counter("a"), Counter("b")])
    trainer.fit(Net(), make_loader())
    trainer.save_checkpoint(path)
    keys = [key.rpartition(".")[2] for key in torch.load(path, weights_only=False)["callbacks"]]
    counter = Counter("b")
    make_trainer(callbacks=[counter], max_epochs=2).fit(Net(), make_loader(), ckpt_path=path)
    return keys, counter.count, seen


@case
def callbacks_of_installed_packages() -> Any:
    name = "third_party_factory"
    folder = tempfile.mkdtemp()
    info = os.path.join(folder, f"{name}-1.0.dist-info")
    os.makedirs(info)
    groups = {
        "lightning.pytorch.callbacks_factory": [f"a = {name}:one", f"b = {name}:two"],
        "lightning.fabric.callbacks_factory": [f"c = {name}:any_object"],
    }
    files = {
        os.path.join(
            folder, f"{name}.py"
        ): f"import {ROOT} as pl\nclass A(pl.Callback): pass\nclass B(pl.Callback): pass\n"
        "def one(): return A()\ndef two(): return [A(), B()]\ndef any_object(): return B()\n",
        os.path.join(info, "METADATA"): f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        os.path.join(info, "entry_points.txt"): "\n".join(
            line for group, entries in groups.items() for line in (f"[{group}]", *entries)
        ),
    }
    for path, text in files.items():
        with open(path, "w") as file:
            file.write(text)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        trainer = make_trainer()
        fabric = importlib.import_module(FABRIC).Fabric(accelerator="cpu", devices=1)
    finally:
        sys.path.remove(folder)
    return [type(callback).__name__ for callback in trainer.callbacks], [type(c).__name__ for c in fabric._callbacks]


@case
def callbacks_of_a_module() -> Any:
    class Stopping(pl.callbacks.EarlyStopping):
        pass

    class Own(Net):
        def configure_callbacks(self):
            stopping = pl.callbacks.EarlyStopping("train_loss", patience=9)
            return [stopping, pl.callbacks.ModelCheckpoint(monitor="train_loss"), Stopping("train_loss")]

    trainer = make_trainer(callbacks=[pl.callbacks.EarlyStopping("x"), pl.callbacks.LambdaCallback()])
    trainer.fit(Own(), make_loader())
    return [type(callback).__name__ for callback in trainer.callbacks]


# ---------------------------------------------------------------------- data, optimizers and metrics


@case
def a_datamodule_from_datasets() -> Any:
    class Own(pl.LightningDataModule):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.moved = True
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.last_loader = dataloader_idx
            return batch

    class Given(Own):
        def __init__(self, size, other=2):
            super().__init__()
            self.save_hyperparameters()

    class Several(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val", self.loss(batch))

    dataset = make_loader().dataset
    data = Own.from_datasets(
        val_dataset=[dataset, dataset], test_dataset=dataset, predict_dataset=dataset, batch_size=4
    )
    trainer = make_trainer()
    module = Several()
    trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    predicted = trainer.predict(module, datamodule=data)
    kinds = type(data).__name__, type(Own.from_datasets(dataset).train_dataloader().sampler).__name__
    given = dict(Given.from_datasets(dataset, size=5).hparams)
    return kinds, data.moved, data.last_loader, round(tested["test_loss"], 4), len(predicted), given


@case
def a_scheduler_that_is_not_torchs() -> Any:
    class Timm:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.epochs = []

        def step(self, epoch, metric=None):
            self.epochs.append(epoch)

        def state_dict(self):
            return {"epochs": self.epochs}

        def load_state_dict(self, state_dict):
            self.epochs = state_dict["epochs"]

    class Own(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.scheduler = Timm(optimizer)
            return [optimizer], [{"scheduler": self.scheduler, "interval": "epoch"}]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch)

    class Without(Own):
        lr_scheduler_step = Net.lr_scheduler_step

    module = Own()
    make_trainer(max_epochs=3).fit(module, make_loader())
    try:
        make_trainer().fit(Without(), make_loader())
    except Exception as error:
        return module.scheduler.epochs, type(error).__name__


@case
def gradients_clipped_by_the_module() -> Any:
    class Own(Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            seen.append(f"{type(optimizer).__name__} {gradient_clip_val} {gradient_clip_algorithm}")
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")

    seen: list[str] = []
    module = Own()
    make_trainer(limit_train_batches=2).fit(module, make_loader())
    return seen, weights_of(module)


@case
def optimizers_in_manual_optimization() -> Any:
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(4, 1)
            nn.init.zeros_(self.other.weight)
            nn.init.zeros_(self.other.bias)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            seen.append(
                f"{isinstance(first, wrapper)} {isinstance(first, torch.optim.Optimizer)} {type(first).__name__}"
            )
            self.toggle_optimizer(first)
            seen.append(str([parameter.requires_grad for parameter in self.parameters()]))
            first.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
            self.untoggle_optimizer(first)
            x, y = batch
            with second.toggle_model(sync_grad=batch_idx % 2 == 0):
                loss = nn.functional.mse_loss(self.other(x), y)
                second.zero_grad()
                self.manual_backward(loss)
                second.step(closure=lambda: loss)
            raw = self.optimizers(use_pl_optimizer=False)[1]
            seen.append(f"{type(raw).__name__} {type(second.optimizer).__name__}")
            for scheduler in self.lr_schedulers():
                scheduler.step()

        def configure_optimizers(self):
            first = torch.optim.SGD(self.layer.parameters(), lr=0.1)
            second = torch.optim.Adam(self.other.parameters(), lr=0.01)
            return [first, second], [torch.optim.lr_scheduler.StepLR(one, 1) for one in (first, second)]

    wrapper = find("core.optimizer", "LightningOptimizer")
    seen: list[str] = []
    module = Own()
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(module, make_loader())
    rates = [round(group["lr"], 8) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return seen, weights_of(module), trainer.global_step, rates


@case
def metrics_that_are_not_torchmetrics_own() -> Any:
    class Average(torchmetrics.Metric):
        full_state_update = False

        def __init__(self):
            super().__init__()
            self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
            self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, x):
            self.total += x.sum()
            self.count += x.numel()

        def compute(self):
            return self.total / self.count

    class Own(Net):
        def __init__(self):
            super().__init__()
            self.average = Average()
            self.several = torchmetrics.MetricCollection({"a": Average(), "b": torchmetrics.MeanMetric()}, prefix="p/")

        def training_step(self, batch, batch_idx):
            self.average(batch[1])
            self.log("average", self.average, on_step=True, on_epoch=True)
            self.several(batch[1])
            self.log_dict(self.several, on_step=False, on_epoch=True)
            return self.loss(batch)

    trainer = make_trainer(max_epochs=2)
    trainer.fit(Own(), make_loader())
    return {name: round(float(value), 5) for name, value in sorted(trainer.callback_metrics.items())}


@case
def a_strategy_of_fabric() -> Any:
    class Own(find("strategies", "SingleDeviceStrategy", FABRIC)):
        def setup_module(self, module):
            calls.append("module")
            return super().setup_module(module)

        def setup_optimizer(self, optimizer):
            calls.append("optimizer")
            return super().setup_optimizer(optimizer)

        def module_to_device(self, module):
            calls.append("to device")
            super().module_to_device(module)

        def backward(self, tensor, module, *args, **kwargs):
            super().backward(tensor * 2, module, *args, **kwargs)

        def clip_gradients_norm(self, module, optimizer, max_norm, norm_type=2.0, error_if_nonfinite=True):
            calls.append(f"clip {max_norm}")
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, error_if_nonfinite)

    class Rounding(find("plugins.precision", "Precision", FABRIC)):
        precision = "own"

        def convert_input(self, data):
            calls.append("in")
            return data

        def convert_output(self, data):
            calls.append("out")
            return data

        @contextlib.contextmanager
        def forward_context(self):
            calls.append("forward")
            yield

        def optimizer_step(self, optimizer, **kwargs):
            calls.append("step")
            return super().optimizer_step(optimizer, **kwargs)

    calls: list[str] = []
    strategy = Own(torch.device("cpu"), precision=Rounding())
    fabric = importlib.import_module(FABRIC).Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    net = nn.Linear(4, 1, bias=False)
    nn.init.ones_(net.weight)
    module, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(module(torch.ones(2, 4)).mean())
    norm = fabric.clip_gradients(module, optimizer, max_norm=1.0)
    optimizer.step()
    return calls, weights_of(net), round(float(norm), 4)


if __name__ == "__main__":
    third_party.print_cases(__name__)
