"""The configuration of a run is kept beside what the run writes, and never hides that of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import make_cli, names_of

from fulmen.cli import SaveConfigCallback

ON = {"save_config_callback": SaveConfigCallback}


def test_the_file_can_be_run_again(tmp_path):
    cli = make_cli("fit", "--model.width=9", "--seed_everything=4", trainer={"logger": True}, **ON)
    path = Path(cli.trainer.log_dir) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["seed_everything"] == 4
    assert config["model"] == {"width": 9, "scale": 1.0}
    assert config["trainer"]["precision"] is None
    assert names_of(cli.trainer.callbacks)[-1] == "SaveConfigCallback"
    again = make_cli("fit", "--config", str(path))
    assert (again.model.width, again.config.fit.seed_everything) == (9, 4)


def test_a_file_of_another_run_is_not_replaced_unless_asked_to(tmp_path):
    make_cli("fit", **ON)
    with pytest.raises(RuntimeError, match="SaveConfigCallback expected .*config.yaml to NOT exist"):
        make_cli("fit", "--model.width=9", **ON)
    assert yaml.safe_load(Path("config.yaml").read_text())["model"]["width"] == 3
    make_cli("fit", "--model.width=9", save_config_kwargs={"overwrite": True}, **ON)
    assert yaml.safe_load(Path("config.yaml").read_text())["model"]["width"] == 9
    make_cli("fit", save_config_kwargs={"config_filename": "mine.yaml"}, **ON)
    assert Path("mine.yaml").is_file()


def test_parts_that_came_from_files_keep_their_files(tmp_path):
    source = tmp_path / "from"
    source.mkdir()
    (source / "part.yaml").write_text("width: 41\n")
    make_cli("fit", "--model", str(source / "part.yaml"), trainer={"default_root_dir": "to"},
             save_config_kwargs={"multifile": True}, **ON)  # fmt: skip
    assert yaml.safe_load(Path("to/config.yaml").read_text())["model"] == "part.yaml"
    assert yaml.safe_load(Path("to/part.yaml").read_text())["width"] == 41


def test_nothing_is_saved_in_a_development_run_or_when_switched_off(tmp_path):
    assert "SaveConfigCallback" not in names_of(make_cli("fit", "--trainer.fast_dev_run=1", **ON).trainer.callbacks)
    make_cli("fit")
    assert not list(tmp_path.rglob("config.yaml"))


class ToLogger(SaveConfigCallback):
    calls = []

    def save_config(self, trainer, pl_module, stage):
        self.calls.append(stage)
        text = self.parser.dump(self.config)
        trainer.logger.log_hyperparams({"config": yaml.safe_load(text)["model"]})


def test_a_logger_can_get_it_instead_of_the_folder(tmp_path):
    options = {"save_config_callback": ToLogger, "trainer": {"logger": True}}
    cli = make_cli("fit", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}",
                   save_config_kwargs={"save_to_log_dir": False}, **options)  # fmt: skip
    assert ToLogger.calls == ["fit"]
    assert not list(tmp_path.rglob("config.yaml"))
    logged = yaml.safe_load((Path(cli.trainer.log_dir) / "hparams.yaml").read_text())
    assert logged["config"] == {"width": 3, "scale": 1.0}
    # Another run of the same Trainer does not save it again.
    cli.trainer.validate(cli.model, cli.datamodule)
    assert ToLogger.calls == ["fit"]


def test_saving_nowhere_is_refused():
    with pytest.raises(
        ValueError, match="`save_to_log_dir=False` only makes sense when subclassing SaveConfigCallback"
    ):
        SaveConfigCallback(None, None, save_to_log_dir=False)
