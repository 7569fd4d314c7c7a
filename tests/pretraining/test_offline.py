"""Offline, nothing of pre-training opens a connection: a server on the loopback sees no request."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from e4t_cli import pretrain
from e4t_cli.api.dry_run import plan_pretraining
from e4t_cli.datasets.sources import find_source
from e4t_cli.errors import UsageError, WeightsUnavailable
from e4t_cli.pretraining.logging import LoggerConfig, TrainingLogger, check_trackers
from e4t_cli.progress import Progress


@pytest.fixture
def server():
    """A server without files; `requests` are the requested paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def program(server, tmp_path):
    """Run Python with a hub on the loopback; the libraries read its address when imported."""

    def run(*words, **environment):
        unset = ("HF_HUB_OFFLINE", "E4T_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, *words], env={**inherited, **own, **environment}, cwd=tmp_path,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def test_remote_shards_are_refused_before_any_connection(server, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    listed = tmp_path / "shards.txt"
    listed.write_text(f"{server.url}/a.tar\n")
    for data in (f"{server.url}/a.tar", f"{server.url}/a-{{0..3}}.tar", listed):
        for function in (pretrain, plan_pretraining):
            with pytest.raises(WeightsUnavailable, match="not on this machine, and e4t is") as caught:
                function("dogs", data, offline=True)
            assert caught.value.exit_code == 4
    monkeypatch.setenv("E4T_OFFLINE", "1")
    with pytest.raises(WeightsUnavailable):
        pretrain("dogs", listed)
    assert not server.requests
    list(find_source(listed))
    assert server.requests == ["/a.tar"]


def test_the_command_ends_with_code_4(server, program):
    pytest.importorskip("webdataset")
    words = ("-m", "e4t_cli", "pretrain", "--domain", "dogs", "--data", f"{server.url}/a.tar")
    for ended in (program(*words, "--offline"), program(*words, E4T_OFFLINE="1")):
        assert ended.returncode == 4, ended.stderr
        assert "a.tar is not on this machine" in ended.stderr
    assert not server.requests


HUB = """
import sys
from e4t_cli import errors
from e4t_cli.datasets.sources import find_source
try:
    print(len(find_source(sys.argv[1], offline=sys.argv[2] == "offline")))
except errors.E4TError as error:
    print(error.exit_code, error.message)
from datasets import config
from huggingface_hub import constants
assert not config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE  # of other work in the process
"""


def test_a_dataset_of_the_hub_is_refused_before_any_connection(server, program):
    pytest.importorskip("datasets")
    ended = program("-c", HUB, "hf://me/dogs:train", "offline")
    assert ended.stdout.startswith("4 the dataset hf://me/dogs:train could not"), ended
    assert ended.returncode == 0 and not server.requests
    ended = program("-c", HUB, "hf://me/dogs:train", "online")
    assert ended.returncode == 0 and server.requests


def test_a_dataset_on_the_disk_needs_no_connection(server, program, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    table = {"image": [{"bytes": b"no image", "path": None}]}
    path = tmp_path / "dogs.parquet"
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))
    ended = program("-c", HUB, str(path), "offline")
    assert (ended.stdout, ended.returncode) == ("1\n", 0), ended.stderr
    assert not server.requests


def test_trackers_work_offline_or_are_refused(model, tmp_path, monkeypatch):
    import accelerate

    given = {}

    def init_trackers(self, project, *, config, init_kwargs):
        given[project] = init_kwargs

    monkeypatch.setattr(accelerate.Accelerator, "__init__", lambda self, **options: None)
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(accelerate.Accelerator, "trackers", [], raising=False)
    for offline in (True, False):
        config = LoggerConfig(folder=tmp_path, trackers=("wandb",), offline=offline)
        with TrainingLogger(config, model, name=f"{offline}") as logger:
            logger.on_progress(Progress(stage="pretrain", done=1, values={"loss": 1.0}))
    assert given["e4t-True"]["wandb"] == {"mode": "offline", "dir": str(tmp_path)}
    assert given["e4t-False"]["wandb"] == {"dir": str(tmp_path)}
    with pytest.raises(UsageError, match="the tracker mlflow may use the network"):
        pretrain("dogs", [b""], trackers=["tensorboard", "mlflow"], offline=True)
    check_trackers(["mlflow"], offline=False)
    check_trackers(["tensorboard", "wandb", object()], offline=True)
