"""How processes come to life and end: scripts that are run again, and calls in spawned and forked processes."""

import _multiprocessing
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from benchmarks.harness import free_port
from fulmen.strategies import DDPStrategy
from fulmen.utilities.errors import MisconfigurationException

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")

# ---------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    "before", [("train.py",), ("-m", "train"), ("-c", "import sys; sys.argv[1:1]; exec(open('train.py').read())")]
)
def test_the_script_is_run_again_for_each_device(script, ended, before):
    code, output = ended(script("plain", "ddp", before=before))
    assert code == 0, output
    words = "4 2 ['test_loss'] finished"
    assert sorted(line for line in output.splitlines() if "done" in line) == [f"done 0 {words}", f"done 1 {words}"]


def test_torchrun_starts_the_processes(script, ended):
    before = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py")
    code, output = ended(script("plain", "ddp", before=before))
    assert code == 0 and output.count("done") == 2, output
    code, output = ended(script("plain", "ddp", before=("-m", "torch.distributed.run", "--standalone", "train.py")))
    assert code != 0 and "started 1 processes, but the Trainer is made for 2" in output


def test_a_taken_port_is_named(script, ended):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = ended(script("plain", "ddp", MASTER_PORT=str(port)))
    assert code == 1 and f"Port {port} is taken" in output and "Unset MASTER_PORT" in output


@pytest.mark.parametrize(("address", "words"), [("nowhere.invalid", "Set MASTER_ADDR"), ("127.0.0.1", "found nobody")])
def test_an_address_where_nobody_answers_is_named(run_python, tmp_path, address, words, capfd):
    port = free_port()
    code = f"""
import os, datetime
os.environ.update(LOCAL_RANK="1", MASTER_ADDR="{address}", MASTER_PORT="{port}", PYTHONWARNINGS="ignore")
import fulmen as pl
from fulmen.strategies import DDPStrategy
from fulmen.engine.cluster import LightningEnvironment
strategy = pl.Trainer(devices=2, accelerator="cpu", logger=False, strategy=DDPStrategy(timeout=datetime.timedelta(seconds=3))).strategy
strategy.setup_environment()
"""
    start = time.monotonic()
    assert run_python(code) == 1
    said = capfd.readouterr().err
    assert f"MASTER_ADDR={address}, MASTER_PORT={port}" in said and words in said
    assert time.monotonic() - start < 300


# ---------------------------------------------------------------------- calls in new processes


class Remembers(pl.callbacks.Callback):
    """State that is worth carrying back, and some that cannot be."""

    def __init__(self):
        self.losses, self.epochs, self.module, self.function = [], 0, None, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.module, self.function = module, lambda: None

    def on_train_epoch_end(self, *_):
        self.epochs += 1


class BuildsLate(Regression):
    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = torch.nn.Linear(1, 1)
            torch.nn.init.ones_(self.late.weight)
            torch.nn.init.ones_(self.late.bias)

    def loss(self, batch):
        return super().loss(batch) + (self.late(batch[1]) - batch[1]).square().mean()


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_results_come_back(start, tmp_path):
    torch.manual_seed(3)
    alone, model = BuildsLate(), BuildsLate()
    alone.load_state_dict(model.state_dict())
    remembers, checkpoint = Remembers(), pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(
        devices=2, strategy=f"ddp_{start}", max_epochs=2, callbacks=[remembers, checkpoint], enable_checkpointing=True
    )
    trainer.fit(model, make_loader(batch_size=2), make_loader())
    make_trainer(max_epochs=2).fit(alone, make_loader(batch_size=4))
    torch.testing.assert_close(model.layer.weight, alone.layer.weight)
    torch.testing.assert_close(model.late.weight, alone.late.weight)
    assert model.late.weight.shape == (1, 1)  # built there, and here to take the weights
    assert len(remembers.losses) == 6 and remembers.epochs == 2 and remembers.module is None
    assert os.path.exists(checkpoint.best_model_path) and checkpoint.best_model_score > 0
    assert trainer.checkpoint_callback is checkpoint
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)
    assert trainer.state.finished and trainer.state.fn == "fit"
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss"}
    assert trainer.callback_metrics["train_loss"] == pytest.approx(remembers.losses[-1])
    # and the next call starts processes again
    trainer.max_epochs = 3
    trainer.fit(model, make_loader(batch_size=2), make_loader())
    assert (trainer.current_epoch, trainer.global_step) == (3, 9)
    results = trainer.validate(model, make_loader(), verbose=False)
    assert results[0]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))


class Unhappy(Regression):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            raise KeyError("no such column")
        return super().training_step(batch, batch_idx)


class OwnError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class UnhappyInItsWay(Regression):
    def training_step(self, batch, batch_idx):
        raise OwnError("a", "b")  # cannot be unpickled


def test_what_a_process_raised_is_raised_here():
    trainer = make_trainer(devices=2, strategy="ddp_fork")
    with pytest.raises(KeyError, match="no such column") as raised:
        trainer.fit(Unhappy(), make_loader())
    assert "of rank 1" in str(raised.value.__cause__) and "in training_step" in str(raised.value.__cause__)
    assert trainer.interrupted
    with pytest.raises(RuntimeError, match="OwnError: a"):
        make_trainer(devices=2, strategy="ddp_fork").fit(UnhappyInItsWay(), make_loader())


def test_a_process_that_dies_is_named():
    class Dies(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1:
                os._exit(3)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="local rank 1 ended with exit code 3"):
        make_trainer(devices=2, strategy="ddp_fork").fit(Dies(), make_loader())


class HasLambda(Regression):
    def __init__(self):
        super().__init__()
        self.activation = {"name": [lambda x: x]}


def test_what_cannot_be_pickled_is_named():
    trainer = make_trainer(devices=2, strategy="ddp_spawn")
    with pytest.raises(MisconfigurationException, match=r"\.activation\['name'\]\[0\]` cannot be pickled.*'ddp'"):
        trainer.fit(HasLambda(), make_loader())
    loader = make_loader()
    loader.collate_fn = lambda batch: batch
    with pytest.raises(MisconfigurationException, match=r"collate_fn` cannot be pickled"):
        make_trainer(devices=2, strategy="ddp_spawn").fit(Regression(), loader)


def test_a_script_without_main_guard_is_told_so(script, ended):
    code, output = ended(script("unguarded", "ddp_spawn"))
    assert code == 1 and "no main guard" in output and "if __name__ == '__main__':" in output


def test_cuda_that_is_in_use_cannot_be_forked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is in use"):
        make_trainer(devices=2, strategy="ddp_fork").fit(Regression(), make_loader())


class HoldsLock(Regression):
    """Has a lock with a name, as progress bars have, until its process ends."""

    def __init__(self, folder, fails):
        super().__init__()
        self.folder, self.fails = folder, fails

    def on_train_start(self):
        self.lock = multiprocessing.get_context("spawn").Lock()
        (self.folder / f"name-{self.global_rank}").write_text(self.lock._semlock.name)
        if self.fails:
            raise ValueError("unhappy")


@pytest.mark.parametrize("fails", [False, True])
def test_processes_leave_no_semaphores(tmp_path, fails):
    """What is left is warned of when the interpreter ends."""
    resource_tracker.ensure_running()
    trainer = make_trainer(devices=2, strategy="ddp_fork")
    with pytest.raises(ValueError, match="unhappy") if fails else nullcontext():
        trainer.fit(HoldsLock(tmp_path, fails), make_loader())
    names = [path.read_text() for path in tmp_path.glob("name-*")]
    assert len(names) == 2
    for name in names:
        with pytest.raises(FileNotFoundError):
            _multiprocessing.sem_unlink(name)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_a_trainer_that_has_not_run_can_be_pickled(strategy):
    trainer = pickle.loads(pickle.dumps(make_trainer(devices=2, strategy=strategy)))
    assert type(trainer.strategy) is DDPStrategy and trainer.strategy.num_processes == 2


def test_one_device_is_a_group_of_one():
    model, alone = Regression(), Regression()
    alone.load_state_dict(model.state_dict())
    make_trainer(devices=1, strategy="ddp_fork").fit(model, make_loader())
    make_trainer().fit(alone, make_loader())
    assert torch.equal(model.layer.weight, alone.layer.weight)


def test_threads_are_shared_out(run_python, tmp_path):
    code = """
import os, torch
os.environ.pop("OMP_NUM_THREADS", None)
from fulmen.engine.launch import divide_cpu_threads
divide_cpu_threads(2)
available = len(os.sched_getaffinity(0))
assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == max(1, available // 2), torch.get_num_threads()
"""
    assert run_python(code) == 0


# ---------------------------------------------------------------------- several nodes

NODE = """
import sys, warnings
warnings.simplefilter("ignore")
from support import Regression, make_loader, make_trainer

trainer = make_trainer(devices=1, num_nodes=2, strategy="ddp")
trainer.fit(Regression(), make_loader())
place = trainer.node_rank, trainer.local_rank, trainer.global_rank, trainer.world_size, trainer.num_nodes
sys.stdout.write(f"place {place} {trainer.global_step}\\n")
"""


def both(outputs):
    assert [code for code, _ in outputs] == [0, 0], outputs
    return sorted(line for _, output in outputs for line in output.splitlines() if line.startswith("place"))


@pytest.mark.parametrize("starter", ["torchrun", "by hand"])
def test_two_nodes(script, ended, tmp_path, starter):
    (tmp_path / "node.py").write_text(NODE)
    port, nodes = str(free_port()), []
    for rank in ("0", "1"):
        if starter == "torchrun":
            place = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}")
            nodes.append(script(before=("-m", "torch.distributed.run", *place, "--nproc-per-node=1", "node.py")))
        else:
            nodes.append(script(before=("node.py",), NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    assert both([ended(node) for node in nodes]) == [f"place {(rank, 0, rank, 2, 2)} 2" for rank in (0, 1)]


def two_hosts():
    """Network namespaces that are joined by a cable, as `ip netns` makes them; or why there are none."""
    if shutil.which("ip") is None:
        return None, "there is no `ip`"
    name = f"fulmen{os.getpid()}"
    steps = [f"netns add {name}-{i}" for i in (0, 1)]
    steps += [f"link add v0 netns {name}-0 type veth peer name v1 netns {name}-1"]
    for i in (0, 1):
        steps += [f"-n {name}-{i} addr add 10.77.0.{i + 1}/24 dev v{i}"]
        steps += [f"-n {name}-{i} link set {device} up" for device in (f"v{i}", "lo")]
    for step in steps:
        done = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
        if done.returncode:
            return name, f"`ip {step}`: {done.stderr.strip()}"
    return name, None


def test_two_hosts_with_a_network_between_them(script, ended, tmp_path):
    (tmp_path / "node.py").write_text(NODE)
    name, problem = two_hosts()
    try:
        if problem:
            pytest.skip(f"two hosts cannot be made here: {problem}")
        nodes = []
        for rank in (0, 1):
            inside = ("import os, sys; os.execvp('ip', ['ip', 'netns', 'exec', *sys.argv[1:]])", f"{name}-{rank}")
            place = {"NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
            command = ("-c", *inside, sys.executable, "node.py")
            nodes.append(script(before=command, **place, GLOO_SOCKET_IFNAME=f"v{rank}"))
        assert both([ended(node) for node in nodes]) == [f"place {(rank, 0, rank, 2, 2)} 2" for rank in (0, 1)]
    finally:
        for rank in (0, 1) if name else ():
            subprocess.run(["ip", "netns", "delete", f"{name}-{rank}"], capture_output=True)


# ---------------------------------------------------------------------- notebooks, and files of a run

TYPED = """
import os, time, warnings
warnings.simplefilter("ignore")
from support import Regression, make_loader, make_trainer

class Model(Regression):
    interrupts = False
    def training_step(self, batch, batch_idx):
        if self.interrupts and batch_idx == 1:
            if self.global_rank == 0:
                os.kill(os.getppid(), 2)
            time.sleep(3)
        return super().training_step(batch, batch_idx)

model = Model()
steps = []
for _ in range(3):
    trainer = make_trainer(devices=2)
    trainer.fit(model, make_loader())
    steps.append(trainer.global_step)

model.interrupts = True
try:
    make_trainer(devices=2).fit(model, make_loader())
except BaseException as error:
    steps.append(type(error).__name__)

model.interrupts = False
trainer.fit_loop.max_epochs = 2
trainer.fit(model, make_loader())
print("steps", *steps, trainer.global_step)
exit()
"""


@pytest.mark.slow
def test_an_interpreter_forks_again_and_again_and_can_be_interrupted(script, ended, tmp_path):
    (tmp_path / "typed").write_text(TYPED)
    with open(tmp_path / "typed") as typed:
        code, output = ended(script(before=("-i", "-q"), stdin=typed))
    assert code == 0 and "steps 2 2 2 KeyboardInterrupt 4" in output, output


def test_all_processes_mean_the_same_files_and_write_them_once(tmp_path):
    class Says(Regression):
        def on_train_end(self):
            (tmp_path / f"rank-{self.global_rank}").write_text(self.trainer.log_dir)

    options = {"logger": pl.loggers.CSVLogger(tmp_path), "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer = make_trainer(devices=2, strategy="ddp_fork", max_epochs=2, **options)
    trainer.fit(Says(), make_loader(), make_loader())
    folder = tmp_path / "lightning_logs" / "version_0"
    assert trainer.log_dir == str(folder) and os.listdir(tmp_path / "lightning_logs") == ["version_0"]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == [str(folder)] * 2
    assert (folder / "metrics.csv").read_text().count("\n") == 1 + 4 + 2  # a header, four steps, two validations
    assert trainer.checkpoint_callback.best_model_path == str(folder / "checkpoints" / "epoch=1-step=4.ckpt")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_of_a_run_that_breaks_is_written_by_rank_0(rank, tmp_path):
    class Breaks(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and self.global_rank == rank:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    callback = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer(devices=2, strategy="ddp_fork", callbacks=callback, enable_checkpointing=True)
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(Breaks(), make_loader())
    assert torch.load(tmp_path / "on_exception.ckpt")["global_step"] == 1
