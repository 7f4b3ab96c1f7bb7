"""Files of other versions read here, and ours read there: each made, and resumed, by the real package.

    python -m trials.interchange [--versions 1.6.5 2.6.6] [--folder DIR] [--golden FILE]

Makes an environment in a temporary folder (or uses the one in DIR), which borrows torch from this interpreter and gets
each version of pytorch-lightning in a folder of its own. Needs a package index; not part of the suite.

- *position*: files, saved inside of different hooks, after which training continues at the epoch, batch and step at which
  the run that wrote them continued.
- *states*: files of which weights and optimizer state are there bit for bit when that next batch is trained.
- *callbacks*: files after which `ModelCheckpoint` knows as many files in the end as in the unstopped run.
- *end*: files of a whole number of epochs, from which the run ends in the weights of the unstopped one.

Rows of versions that read their own files are there to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fulmen
from benchmarks import harness

VERSIONS = ("1.6.5", "1.7.7", "1.8.6", "1.9.5", "2.0.9.post0", "2.2.5", "2.4.0", "2.5.5", "2.6.6")
# name, (hook, epoch, batch) in which the file is written, more arguments for the Trainer
CASES = {
    "batch_end": (("on_train_batch_end", 1, 1), {}),
    "last_batch_end": (("on_train_batch_end", 1, 3), {}),
    "window": (("on_train_batch_end", 1, 0), {"accumulate_grad_batches": 2}),
    "validation_end": (("on_validation_end", 1, None), {}),
    "inner_validation": (("on_validation_end", 1, None), {"val_check_interval": 2}),
    "epoch_end": (("on_train_epoch_end", 1, None), {}),
    "epoch_start": (("on_train_epoch_start", 1, None), {}),
}
WHOLE = ("epoch_end", "epoch_start", "validation_end", "last_batch_end")  # whole epochs have been trained

SCRIPT = """
import importlib, json, logging, sys, warnings
warnings.simplefilter("ignore")
import numpy, torch
if not hasattr(numpy, "Inf"):  # versions of before numpy 2
    numpy.Inf, numpy.NaN = numpy.inf, numpy.nan
from torch.utils.data import DataLoader, TensorDataset
package, version, resume, tasks = json.loads(sys.argv[1])
pl = importlib.import_module(package)
callbacks = importlib.import_module(package + ".callbacks")
for name in ("pytorch_lightning", "fulmen"):
    logging.getLogger(name).setLevel(logging.ERROR)

class Model(pl.LightningModule):
    def __init__(self, width=2):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).pow(2).mean())
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

if "1" < version < "1.8":  # these ask whether a scheduler is one in words that torch has changed
    Model.lr_scheduler_step = lambda self, scheduler, optimizer_idx, metric: scheduler.step()

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

class Watch(callbacks.Callback):
    next = states = None
    def __init__(self, task):
        self.task, self.saved = task, resume
    def save(self, trainer, hook, batch=None):
        if not self.saved and [hook, trainer.current_epoch, batch] == self.task["when"]:
            trainer.save_checkpoint(self.task["file"])
            self.saved = True
    def on_train_batch_start(self, trainer, module, batch, batch_idx, *_):
        if self.saved and self.next is None:
            self.next = {"epoch": trainer.current_epoch, "batch": batch_idx, "global_step": trainer.global_step}
            if resume:
                file = torch.load(self.task["file"], weights_only=False)
                optimizer = trainer.optimizers[0].state_dict()["state"]
                self.states = same(dict(module.state_dict()), dict(file["state_dict"])) and same(
                    optimizer, file["optimizer_states"][0]["state"])
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *_):
        self.save(trainer, "on_train_batch_end", batch_idx)
    def on_validation_end(self, trainer, module):
        self.save(trainer, "on_validation_end")
    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "on_train_epoch_end")
    def on_train_epoch_start(self, trainer, module):
        self.save(trainer, "on_train_epoch_start")

def run(task):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)
    watch, stopping = Watch(task), callbacks.EarlyStopping("val_loss", patience=9)
    kept = callbacks.ModelCheckpoint(task["folder"], monitor="val_loss", save_top_k=2)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, callbacks=[watch, kept, stopping], num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=task["folder"], **task["arguments"])
    model = Model()
    trainer.fit(model, loader, loader, ckpt_path=task["file"] if resume else None)
    end = [parameter.tolist() for parameter in model.parameters()]
    return {"next": watch.next, "states": watch.states, "end": end, "kept": len(kept.best_k_models)}

results = []
for task in tasks:
    try:
        results.append(run(task))
    except Exception as error:
        results.append({"error": f"{type(error).__name__}: {error}", "next": None, "states": None, "end": None, "kept": None})
print("RESULTS " + json.dumps(results))
"""


class Package:
    """A version of a package, ready to run."""

    def __init__(self, name: str, version: str, folder: Path) -> None:
        self.name = name
        self.version = version
        self.folder = folder
        self.python = sys.executable
        self.paths = [str(Path(fulmen.__file__).parents[1])]
        if name != "fulmen":
            self.python = str(folder / "env" / "bin" / "python")
            self.paths = [str(folder / version)]
            if version < "2":
                self.paths.append(str(folder / "old-torchmetrics"))

    def run(self, folder: Path, resume: bool, files: dict[str, Path]) -> dict[str, dict]:
        """What became of a run that writes, or resumes from, the file of each case."""
        names = {case: {"when": when, "arguments": arguments} for case, (when, arguments) in CASES.items()}
        tasks = [{**names[case], "file": str(file), "folder": str(folder / case)} for case, file in files.items()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(self.paths), "OMP_NUM_THREADS": "1"}
        command = [self.python, "-c", SCRIPT, json.dumps((self.name, self.version, resume, tasks))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULTS ")), None)
        if line is None:
            raise RuntimeError(f"{self.name} {self.version}: {done.stderr[-2000:]}")
        return dict(zip(files, json.loads(line.removeprefix("RESULTS "))))


def install_versions(folder: Path, versions: list[str]) -> None:
    """The environment, and each version in a folder."""
    env = folder / "env"
    pip = [str(env / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not env.exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        borrowed = [path for path in sys.path if path.endswith("site-packages")]
        target = next(env.glob("lib/python*/site-packages"))
        (target / "borrowed.pth").write_text("\n".join(borrowed))
        subprocess.run([*pip, "setuptools<80", "lightning-utilities", "tensorboardX", "pyyaml"], check=True)
    wanted = {version: [f"pytorch-lightning=={version}"] for version in versions}
    if any(version < "2" for version in versions):
        wanted["old-torchmetrics"] = ["torchmetrics==0.11.4", "pyDeprecate==0.3.2", "lightning-lite==1.8.6"]
    for name, packages in wanted.items():
        if not (folder / name).exists():
            subprocess.run([*pip, "--no-deps", "--target", str(folder / name), *packages], check=True)


def exchange_files(writer: Package, reader: Package, folder: Path) -> list[str]:
    """How many of the files continue as they should; prints what does not."""
    own = folder / f"{writer.name}-{writer.version}-{reader.version}"
    own.mkdir()
    files = {case: own / f"{case}.ckpt" for case in CASES}
    written = writer.run(own, False, files)
    read = reader.run(own, True, files)
    for case, result in read.items():
        if "error" in result:
            print(f"{writer.version} -> {reader.version}, {case}: {result['error']}")
    same = {key: [written[case][key] == read[case][key] for case in CASES] for key in ("next", "kept")}
    states = [read[case]["states"] is True for case in CASES]
    end = [written[case]["end"] == read[case]["end"] for case in WHOLE]
    return [f"{sum(right)}/{len(right)}" for right in (same["next"], states, same["kept"], end)]


def write_golden_file(folder: Path, version: str, target: Path) -> None:
    """Files of a version as text, for the suite: one in full, of the others what tells where they are."""
    import torch

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, dict):
            return {str(key): plain(child) for key, child in value.items()}
        return [plain(child) for child in value] if isinstance(value, (list, tuple)) else value

    cases = {}
    with harness.scratch_folder() as scratch:
        files = {case: scratch / f"{case}.ckpt" for case in CASES}
        written = Package("pytorch_lightning", version, folder).run(scratch / "kept", False, files)
        for case, file in files.items():
            content = plain(torch.load(file, weights_only=True))
            content = json.loads(json.dumps(content).replace(str(scratch / "kept" / case), "/run/kept"))
            if case != "epoch_end":
                loops = {"fit_loop": content["loops"]["fit_loop"]}
                content = {key: content[key] for key in ("epoch", "global_step")} | {"loops": loops}
            own = {key: written[case][key] for key in ("next", "end")}
            cases[case] = {"arguments": CASES[case][1], **own, "content": content}
    target.write_text(json.dumps({"version": version, "cases": cases}, separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--folder", type=Path, help="where the packages are, or will be")
    parser.add_argument("--golden", type=Path, help="only write files of the first version here, as text")
    options = parser.parse_args()
    with harness.scratch_folder() as scratch:
        folder = options.folder or scratch
        folder.mkdir(parents=True, exist_ok=True)
        install_versions(folder, list(options.versions))
        if options.golden:
            write_golden_file(folder, options.versions[0], options.golden)
            return
        ours = Package("fulmen", fulmen.__version__, folder)
        rows = []
        for version in options.versions:
            theirs = Package("pytorch_lightning", version, folder)
            rows.append((f"{version} -> fulmen", *exchange_files(theirs, ours, scratch)))
            if version >= "2":  # older ones do not know the names of today
                rows.append((f"fulmen -> {version}", *exchange_files(ours, theirs, scratch)))
                rows.append((f"{version} -> {version}", *exchange_files(theirs, theirs, scratch)))
    header = ("written by -> resumed by", "position", "states", "callbacks", "end")
    harness.print_table("Files", SimpleNamespace(name="fulmen", version=fulmen.__version__), header, rows)


if __name__ == "__main__":
    main()
