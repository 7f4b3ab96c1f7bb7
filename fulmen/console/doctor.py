"""``fulmen doctor``: what a run will find on this machine, in one table."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fulmen.console.commands import OWN_VERSION

if TYPE_CHECKING:
    from fulmen.console.machine import Value


class OptionalPackage(NamedTuple):
    """A package that fulmen uses where it is installed, the extra that brings it ("" if none does), and what for."""

    distribution: str
    extra: str
    brings: str


OPTIONAL_PACKAGES = (
    OptionalPackage("rich", "bar", "progress bars and summaries in colour"),
    OptionalPackage("tensorboard", "tensorboard", "`TensorBoardLogger`"),
    OptionalPackage("ray", "ray", "being a worker of Ray Train"),
    OptionalPackage("jsonargparse", "cli", "`LightningCLI`"),
    OptionalPackage("matplotlib", "examples", "pictures of the examples, plots of learning rates"),
    OptionalPackage("scikit-learn", "examples", "the digits of `fulmen demo`"),
    OptionalPackage("wandb", "services", "`WandbLogger`"),
    OptionalPackage("mlflow", "services", "`MLFlowLogger`"),
    OptionalPackage("comet-ml", "services", "`CometLogger`"),
    OptionalPackage("torchmetrics", "", "metrics as objects in `self.log`"),
    OptionalPackage("numpy", "", "arrays as batches and hyper-parameters"),
    OptionalPackage("fsspec", "", "checkpoints and logs under URLs"),
    OptionalPackage("PyYAML", "", "reading hparams.yaml"),
    OptionalPackage("omegaconf", "", "configurations as hyper-parameters"),
    OptionalPackage("psutil", "", "`DeviceStatsMonitor` on the CPU"),
    OptionalPackage("onnx", "", "`to_onnx`"),
    OptionalPackage("bitsandbytes", "", "weights of 4 and 8 bits"),
    OptionalPackage("transformer-engine", "", "training in 8 bits"),
    OptionalPackage("deepspeed", "", "`DeepSpeedStrategy`"),
)
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "the GPUs that are seen",
    "CUBLAS_WORKSPACE_CONFIG": "whether cuBLAS is deterministic",
    "OMP_NUM_THREADS": "threads of each process",
    "PYTHONHASHSEED": "the order of sets",
    "MASTER_ADDR": "where processes meet", "MASTER_PORT": "where processes meet",
    "WORLD_SIZE": "how many processes there are", "RANK": "which of them this is",
    "LOCAL_RANK": "which of this machine", "NODE_RANK": "which machine this is", "GROUP_RANK": "which machine this is",
    "SLURM_JOB_ID": "the job of SLURM", "SLURM_NTASKS": "how many processes SLURM starts",
    "LSB_JOBID": "the job of LSF", "KUBERNETES_PORT": "the cluster of Kubernetes",
    "POSSIBLE_USER_WARNINGS": "whether probable mistakes are said",
    "WANDB_PROJECT": "the project of `WandbLogger`", "WANDB_MODE": "whether wandb sends anything",
    "MLFLOW_TRACKING_URI": "the server of `MLFlowLogger`",
    "WANDB_API_KEY": "the account of wandb", "COMET_API_KEY": "the account of Comet",
}  # fmt: skip
PREFIXES = ("FULMEN_", "GLOO_", "NCCL_", "PL_", "TORCH_", "PYTORCH_")
SECRET_ENDINGS = ("_KEY", "_TOKEN", "_PASSWORD", "_SECRET")
SMALL_SHARED_MEMORY_MIB = 256

Sections = dict[str, dict[str, "Value"]]


class Findings(NamedTuple):
    """What was found.

    Attributes:
        sections: "versions", "devices", "backends", "start methods", "packages" and "environment": value by name.
        problems: what keeps runs from working here, with a fix; the command ends with status 1 if there are any.
        advice: what may hinder some runs.
    """

    sections: Sections
    problems: list[str]
    advice: list[str]


def examine_machine() -> Findings:
    """Looks at this interpreter, what is installed for it, and the machine.

    Example:
        >>> examine_machine().sections["versions"]["fulmen"]
        '0...'
    """
    versions: dict[str, Value] = {"fulmen": OWN_VERSION, "python": platform.python_version()}
    sections: Sections = {"versions": {**versions, "system": platform.platform(), "interpreter": sys.executable}}
    problems = []
    try:
        machine = importlib.import_module("fulmen.console.machine")
    except Exception as error:  # a library that torch was built for may be missing: that is what the command is for
        sections["versions"]["torch"] = _find_version("torch")
        problems.append(f"torch cannot be imported: {error}. Install it as https://pytorch.org says.")
    else:
        sections["versions"].update(machine.describe_torch())
        sections["devices"] = machine.describe_devices()
        sections["backends"] = machine.describe_backends()
        problems += machine.find_torch_problems()
    sections["start methods"] = dict.fromkeys(multiprocessing.get_all_start_methods(), True)
    sections["packages"] = {one.distribution: _find_version(one.distribution) for one in OPTIONAL_PACKAGES}
    sections["environment"] = _describe_environment()
    if _find_version("tqdm") is None:
        problems.append("tqdm is not installed, which draws the progress bar. Run `pip install tqdm`.")
    return Findings(sections, problems, list(_find_advice()))


def _find_version(distribution: str) -> str | None:
    names = ("mlflow", "mlflow-skinny") if distribution == "mlflow" else (distribution,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _describe_environment() -> dict[str, Value]:
    names = [name for name in sorted(os.environ) if name in VARIABLES or name.startswith(PREFIXES)]
    return {name: "(set)" if name.endswith(SECRET_ENDINGS) else os.environ[name] for name in names}


def _find_advice() -> Iterator[str]:
    if os.path.isdir("/dev/shm"):
        size_mib = shutil.disk_usage("/dev/shm").total // 2**20
        if size_mib < SMALL_SHARED_MEMORY_MIB:
            fix = "Start the container with `--shm-size=2g`, or load data with `num_workers=0`."
            yield f"/dev/shm has {size_mib} MiB, through which the workers of a DataLoader hand over batches. {fix}"
    if not os.access(os.curdir, os.W_OK):
        yield f"{os.getcwd()} cannot be written to. Pass `Trainer(default_root_dir=...)`, or start elsewhere."
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        yield "`RANK` is set and `WORLD_SIZE` is not: a run does not know how many processes there are. Set or unset both."


def install_line(package: OptionalPackage) -> str:
    """The command that installs a package."""
    return f'pip install "fulmen[{package.extra}]"' if package.extra else f"pip install {package.distribution}"


def format_table(findings: Findings) -> str:
    """The findings as text: a line per name, with what the value means or how a missing package is installed."""
    notes = {one.distribution: f"{one.brings}: `{install_line(one)}`" for one in OPTIONAL_PACKAGES}
    lines = []
    for section, entries in findings.sections.items():
        lines += ["", section]
        for name, value in entries.items():
            words = {"None": "-", "True": "yes", "False": "no"}
            shown = words.get(str(value), str(value))
            note = VARIABLES.get(name, "") if section == "environment" else ""
            if section == "packages" and value is None:
                note = notes[name]
            lines.append(f"  {name:22} {shown:24} {note}".rstrip())
    for heading, sentences in (("advice", findings.advice), ("problems", findings.problems)):
        lines += ["", heading, *(f"  {sentence}" for sentence in sentences or ["none"])]
    return "\n".join(lines[1:])


def run_doctor(arguments: Sequence[str] | None = None) -> None:
    """The command line; ends with status 1 if there are problems."""
    parser = argparse.ArgumentParser(
        prog="fulmen doctor", description="Says what is installed here, what is missing and what is wrong.",
        epilog="Ends with status 1 if something keeps runs from working here.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    findings = examine_machine()
    if options.json:
        missing = {
            one.distribution: install_line(one) for one in OPTIONAL_PACKAGES if not _find_version(one.distribution)
        }
        content = {**findings.sections, "install": missing, "problems": findings.problems, "advice": findings.advice}
        print(json.dumps(content, indent=2))
    else:
        print(format_table(findings))
    if findings.problems:
        sys.exit(1)
