"""Reports to the controller of a Kubeflow `TrainJob`, taken by a real HTTPS server."""

from __future__ import annotations

import http.server
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.integrations import KubeflowProgress
from fulmen.integrations.kubeflow import VARIABLES

ROOT = Path(__file__).parents[2]
PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/lab/trainjobs/mnist/status"
URL, CERTIFICATE, TOKEN = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that nobody trusts but who has it, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    names = ["-subj", "/CN=controller", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(
        [*command, "-keyout", folder / "key", "-out", folder / "ca.crt", "-days", "2", *names],
        check=True,
        capture_output=True,
    )
    return folder / "ca.crt", folder / "key"


class Controller(http.server.ThreadingHTTPServer):
    """Takes reports as Kubeflow's does: refuses those of another path or token, and writes the others down."""

    daemon_threads = True

    def __init__(self, certificate, key, token: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.token = token
        self.reports: list[tuple[float, str, dict]] = []
        self.refused: list[int] = []


class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        token = self.server.token.read_text().strip()
        status = 404 if self.path != PATH else 200 if self.headers["Authorization"] == f"Bearer {token}" else 401
        if status == 200 and self.headers["Content-Type"] == "application/json":
            self.server.reports.append((time.monotonic(), token, json.loads(content)))
        else:
            self.server.refused.append(status)
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def controller(certificate, tmp_path, monkeypatch):
    """Such a server, with the variables of its job set."""
    token = tmp_path / "token"
    token.write_text("first\n")
    with Controller(*certificate, token) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv(URL, f"https://127.0.0.1:{server.server_port}{PATH}")
        monkeypatch.setenv(CERTIFICATE, str(certificate[0]))
        monkeypatch.setenv(TOKEN, str(token))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def metrics_of(report: dict) -> dict[str, str]:
    return {metric["name"]: metric["value"] for metric in report["metrics"]}


def fit(model=None, **kwargs) -> pl.Trainer:
    trainer = make_trainer(**{"max_epochs": 2, **kwargs})
    trainer.fit(model or Regression(), make_loader(), make_loader())
    return trainer


class NewToken(Regression):
    """While it trains, the token changes."""

    def __init__(self, token: Path) -> None:
        super().__init__()
        self.token = str(token)

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            time.sleep(0.3)  # the first report is on its way
            Path(self.token).write_text("second")
        return super().training_step(batch, batch_idx)


def test_a_run_reports_at_its_start_and_at_its_end(controller):
    trainer = fit(NewToken(controller.token))
    _, tokens, reports = zip(*controller.reports)
    assert not controller.refused
    assert len(reports) == 2  # another one would be due after 5 s
    first, last = reports[0]["trainerStatus"], reports[-1]["trainerStatus"]
    assert first["progressPercentage"] == 0 and "estimatedRemainingSeconds" not in first
    assert last["progressPercentage"] == 100 and last["estimatedRemainingSeconds"] == 0
    assert tokens[0] == "first" and tokens[-1] == "second"  # it is read for each report
    assert all(list(report) == ["trainerStatus"] and report["trainerStatus"]["lastUpdatedTime"] for report in reports)
    assert metrics_of(first)["global_step"] == "0"
    found = metrics_of(last)
    assert (found["epoch"], found["global_step"]) == ("2", "6")
    assert float(found["val_loss"]) == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert float(found["train_loss"]) == pytest.approx(trainer.callback_metrics["train_loss"].item())


def test_reports_are_five_seconds_apart_and_progress_is_that_of_the_limit_that_ends_the_run_first(controller):
    class Stops(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                time.sleep(5.5)  # a report is due
            return super().training_step(batch, batch_idx)

    fit(Stops(), max_epochs=4, max_steps=10)
    middle = controller.reports[1][2]["trainerStatus"]
    assert middle["progressPercentage"] == 50  # 5 of 10 steps; of the 12 batches it is less
    assert 4 <= middle["estimatedRemainingSeconds"] <= 7  # as long as the first half took
    assert controller.reports[1][0] - controller.reports[0][0] > 4.9
    assert len(controller.reports) == 3


def test_a_run_that_fails_reports_how_far_it_came(controller):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise ValueError("unhappy")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="unhappy"):
        fit(Fails())
    last = controller.reports[-1][2]["trainerStatus"]
    assert last["progressPercentage"] == 50 and metrics_of(last)["global_step"] == "3"


def test_names_and_numbers_of_metrics_are_cut_to_what_the_server_takes(controller):
    class Talks(Regression):
        def training_step(self, batch, batch_idx):
            self.log_dict({f"value_{index}": float(index) for index in range(300)})
            self.log("x" * 100, 1 / 3)
            return super().training_step(batch, batch_idx)

    fit(Talks(), max_epochs=1)
    metrics = controller.reports[-1][2]["trainerStatus"]["metrics"]
    assert len(metrics) == 256 and not controller.refused
    assert all(0 < len(metric["name"]) <= 64 and 0 < len(metric["value"]) <= 64 for metric in metrics)


class Deaf:
    """Servers that are of no use, each with its address."""

    def __init__(self) -> None:
        self.silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and never says a word
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = closed.getsockname()[1]
        self.ports = {"refuses": nobody, "is silent": self.silent.getsockname()[1]}


@pytest.mark.parametrize("server", ["refuses", "is silent", "distrusts", "has no token", "is another"])
def test_a_server_of_no_use_changes_nothing(controller, monkeypatch, tmp_path, caplog, server):
    deaf = Deaf()
    if server in deaf.ports:
        monkeypatch.setenv(URL, f"https://127.0.0.1:{deaf.ports[server]}{PATH}")
    elif server == "distrusts":
        monkeypatch.setenv(URL, os.environ[URL].replace("/lab/", "/other/"))
    elif server == "has no token":
        monkeypatch.setenv(TOKEN, str(tmp_path / "none"))
    else:
        monkeypatch.setenv(CERTIFICATE, ssl.get_default_verify_paths().cafile or str(Path(torch.__file__)))
    torch.manual_seed(1)
    model = Regression()
    started = time.monotonic()
    trainer = fit(model)
    seconds = time.monotonic() - started
    for name in VARIABLES:
        monkeypatch.delenv(name)
    torch.manual_seed(1)
    other = Regression()
    fit(other)
    assert torch.equal(model.layer.weight, other.layer.weight) and trainer.global_step == 6
    assert seconds < 4  # the one that is silent may hold up the end of a run this short for 2 s
    assert controller.reports == []
    said = [record.message for record in caplog.records if "Kubeflow" in record.message]
    assert len(said) == (0 if server == "is silent" else 1)
    deaf.silent.close()


def test_without_the_variables_there_is_no_callback_and_half_of_them_are_named(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not any(isinstance(callback, KubeflowProgress) for callback in make_trainer().callbacks)
    monkeypatch.setenv(URL, "https://127.0.0.1")
    monkeypatch.setenv(TOKEN, "/token")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer()
    assert not any(isinstance(callback, KubeflowProgress) for callback in trainer.callbacks)
    said = [str(one.message) for one in caught if "Kubeflow" in str(one.message)]
    assert len(said) == 1
    assert f"{URL}, {TOKEN} is set, but not {CERTIFICATE}" in said[0] and "Set all three" in said[0]


@pytest.mark.slow
def test_of_a_job_started_by_torchrun_rank_zero_reports(controller, tmp_path):
    script = "from support import *\nmake_trainer(devices=2, max_epochs=1).fit(Regression(), make_loader(16))\n"
    (tmp_path / "train.py").write_text(script)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = [report["trainerStatus"] for _, _, report in controller.reports]
    assert [status["progressPercentage"] for status in statuses] == [0, 100]
    assert metrics_of(statuses[-1])["global_step"] == "2"  # 16 samples on two processes in batches of 4
