"""Fixtures of a tiny pre-training run: eight drawn faces, batches of four, a second or two in all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e4t_cli.pretraining.checkpoints import CheckpointOptions
from e4t_cli.pretraining.encoded_images import encode_images
from e4t_cli.pretraining.loop import (
    DomainInfo,
    TrainingCallbacks,
    TrainingOptions,
    pretrain_domain,
)
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.domain import PreparedImage
from tests.conftest import drawn_face

TUNING = TuningConfig(steps=2, base_learning_rate=1e-5, reg_weight=0.1, batch_size=4)
RECIPE = PretrainingConfig(steps=7, base_learning_rate=1e-4, batch_size=4)
PICTURES = 6  # with batches of 4, epochs end in the middle of a step and between steps
ROOT = Path(__file__).parents[2]
RUN = Path(__file__).with_name("run.py")


def pretrain_domain_with(model, data, *, config, tuning=TUNING, **options):
    """`pretrain_domain` with plain keywords, sorted into its groups of options."""

    def taken(group, **renamed):
        names = {one.name: one.name for one in fields(group)} | renamed
        return {name: options.pop(key) for name, key in names.items() if key in options}

    info = {"name": "face", "descriptor": "face", "templates": ("{}", "a photo of {}")}
    domain = DomainInfo(tuning=tuning, **{**info, **taken(DomainInfo)})
    names = {"folder": "checkpoints", "every": "checkpoint_every"}
    groups = {
        "checkpoints": CheckpointOptions(**taken(CheckpointOptions, **names)),
        "options": TrainingOptions(**taken(TrainingOptions)),
        "callbacks": TrainingCallbacks(**taken(TrainingCallbacks)),
    }
    return pretrain_domain(model, data, domain=domain, config=config, **groups, **options)


@pytest.fixture
def data(model):
    faces = [drawn_face(index) for index in range(PICTURES)]
    return encode_images(model, [PreparedImage(image=image, mask=mask) for image, mask in faces], batch_size=4)


@pytest.fixture
def pretrain(model, data):
    def run(config=RECIPE, *, pictures=data, **options):
        return pretrain_domain_with(model, pictures, config=config, **{"seed": 3, **options})

    return run


class Interrupted(Exception):
    pass


def interrupt_after(step):
    def stop(state):
        if state.step == step:
            raise Interrupted

    return stop


def weights(domain):
    """All tensors of a domain under their names."""
    found = {f"encoder.{key}": value for key, value in domain.encoder.state_dict().items()}
    for path, (left, right) in domain.offsets.items():
        found |= {f"{path}.left": left, f"{path}.right": right}
    return found


def same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


def same_files(one, other):
    """Whether two checkpoints hold the same bits: weights and the optimiser's state."""
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


def environment(home):
    inherited = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "src", "domains"))
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return {**inherited, **own, "HOME": str(home)}


class Run:
    """`run.py` as a separate process; its output is in a file."""

    def __init__(self, log):
        self.log = log
        self.log.touch()

    def output(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words, seconds=120):
        end = time.monotonic() + seconds
        while words not in self.output():
            assert time.monotonic() < end, f"waited {seconds} s for {words!r}: {self.output()}"
            assert self.code() is None, f"ended without {words!r}: {self.output()}"
            time.sleep(0.01)

    def wait(self, seconds=240):
        end = time.monotonic() + seconds
        while self.code() is None:
            assert time.monotonic() < end, f"still there after {seconds} s: {self.output()}"
            time.sleep(0.01)
        return self.code()


class Alone(Run):
    """One process, forked from a server that has imported everything."""

    def __init__(self, log, server, arguments):
        super().__init__(log)
        server.stdin.write(json.dumps([str(log), *map(str, arguments)]) + "\n")
        server.stdin.flush()
        self.number = int(server.stdout.readline())

    def code(self):
        result = self.log.with_name(self.log.name + ".exit")
        return int(result.read_text()) if result.exists() else None

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.number, number)


class Together(Run):
    """Several processes and their launcher."""

    def __init__(self, log, arguments, processes):
        super().__init__(log)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(RUN), *map(str, arguments)],
                cwd=ROOT, env=environment(log.parent), stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def code(self):
        return self.process.poll()

    def send(self, number):
        self.process.send_signal(number)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("server")
    with subprocess.Popen(
        [sys.executable, str(RUN), "serve"], cwd=ROOT, env=environment(home),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()  # it has nothing to clean up


@pytest.fixture
def start(tmp_path, request):
    """Start `run.py` with some arguments, alone or as several processes."""
    started = []

    def begin(*arguments, processes=1):
        log = tmp_path / f"run-{len(started)}.txt"
        if processes == 1:
            started.append(Alone(log, request.getfixturevalue("server"), arguments))
        else:
            started.append(Together(log, arguments, processes))
        return started[-1]

    yield begin
    for one in started:
        if one.code() is None:
            one.send(signal.SIGKILL)
            one.wait()


@pytest.fixture
def world(base_folder, data, tmp_path):
    """The first arguments of `run.py`, with folders of this test's own."""
    data.save(tmp_path / "encoded.safetensors")

    def arguments(name, **numbers):
        folder = tmp_path / name
        options = [f"{key}={value}" for key, value in numbers.items()]
        return (
            base_folder, tmp_path / "encoded.safetensors", folder / "checkpoints", folder / "pack",
            *options,
        )  # fmt: skip

    return arguments
