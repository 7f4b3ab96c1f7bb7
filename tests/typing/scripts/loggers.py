"""What a type checker knows of loggers and profilers."""

from typing import Any

from typing_extensions import assert_type

from fulmen import LightningModule, Trainer
from fulmen.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from fulmen.profilers import AdvancedProfiler, Profiler


class Printer(Logger):
    @property
    def name(self) -> str:
        return "printer"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        print(metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


profiler: Profiler = AdvancedProfiler()
trainer = Trainer(logger=[Printer(), CSVLogger("."), TensorBoardLogger(".")], profiler=profiler)
Trainer(logger=WandbLogger())
Trainer(logger=False, profiler="pytorch")
for logger in trainer.loggers:
    assert_type(logger, Logger)


class Net(LightningModule):
    def on_train_start(self) -> None:
        if isinstance(self.logger, TensorBoardLogger):
            assert_type(self.logger, TensorBoardLogger)
