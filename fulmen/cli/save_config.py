"""`SaveConfigCallback`: the configuration of a run, kept beside what the run writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from fulmen.callbacks.callback import Callback
from fulmen.cli.parser import LightningArgumentParser
from fulmen.storage.filesystem import get_filesystem
from fulmen.utilities.introspection import is_overridden

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


class SaveConfigCallback(Callback):
    """Writes the whole configuration into the folder of the run, before the run begins.

    Arguments:
        parser: The parser that made the configuration.
        config: The configuration.
        config_filename: Name of the file.
        overwrite: Replace a file that is there. Otherwise it is an error, so that no run hides another.
        multifile: Write parts that came from files of their own into files of these names.
        save_to_log_dir: False writes no file; for subclasses that implement `save_config`.

    Raises:
        ValueError: for `save_to_log_dir=False` without a `save_config`.
        RuntimeError: at the start of the run, if the file exists.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, config_filename: str = "config.yaml",
        overwrite: bool = False, multifile: bool = False, save_to_log_dir: bool = True,
    ) -> None:  # fmt: skip
        self.parser = parser
        self.config = config
        self.config_filename = config_filename
        self.overwrite = overwrite
        self.multifile = multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False
        if not save_to_log_dir and not is_overridden("save_config", self, SaveConfigCallback):
            raise ValueError(
                "`save_to_log_dir=False` only makes sense when subclassing SaveConfigCallback to implement "
                "`save_config`: otherwise nothing would be saved. Use `LightningCLI(save_config_callback=None)`."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file, and calls `save_config`, on the first process."""
        if self.already_saved:
            return
        path = self._path_in(trainer) if self.save_to_log_dir else None
        if path is not None and not self.overwrite:
            exists = trainer.is_global_zero and get_filesystem(path).isfile(path)
            if trainer.strategy.broadcast(exists):
                raise RuntimeError(
                    f"{type(self).__name__} expected {path} to NOT exist: it is of a previous run. Delete it, set "
                    "`LightningCLI(save_config_callback=None)` to save no configuration, or "
                    '`LightningCLI(save_config_kwargs={"overwrite": True})` to replace it.'
                )
        if trainer.is_global_zero:
            if path is not None:
                self._write_file(path)
            self.save_config(trainer, pl_module, stage)
            self.already_saved = True
        self.already_saved = trainer.strategy.broadcast(self.already_saved)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """For subclasses: keep the configuration elsewhere too, such as in a logger. Called on the first process."""

    def _path_in(self, trainer: Trainer) -> str:
        folder = trainer.log_dir  # the same on all processes
        if folder is None:
            raise RuntimeError(
                f"{type(self).__name__} has no folder for {self.config_filename}: the logger has none. Pass "
                "`Trainer(default_root_dir=...)`, or `LightningCLI(save_config_callback=None)`."
            )
        return os.path.join(folder, self.config_filename)

    def _write_file(self, path: str) -> None:
        get_filesystem(path).makedirs(os.path.dirname(path) or ".", exist_ok=True)
        keep_null = dump_options(self.parser)
        self.parser.save(self.config, path, overwrite=self.overwrite, multifile=self.multifile, **keep_null)


def dump_options(parser: LightningArgumentParser) -> dict[str, bool]:
    """Keep what is null in a dump; jsonargparse has renamed this option in 4.49."""
    return {"skip_unset" if hasattr(parser, "instantiate") else "skip_none": False}
