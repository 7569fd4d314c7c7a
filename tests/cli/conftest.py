"""A world small enough to run every command in: a tiny base, a pack made for it, a photo."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from e4t_cli.cli import app


@dataclass(frozen=True)
class World:
    """Paths of the tiny world."""

    base: Path
    pack: Path
    photo: Path

    def personalize(self, *more: str, prompts: tuple[str, ...] = ("S* on the beach",)) -> list[str]:
        """Return a command line that takes about a second."""
        return [
            "personalize", str(self.pack), str(self.photo), *prompts, "--base", str(self.base),
            "--steps", "2", "--tune-steps", "1", *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def world(base_folder, tmp_path_factory) -> World:
    """A domain called my_faces, pre-trained for two steps on four drawings."""
    import e4t_cli
    from e4t_cli.registry.config import PretrainingConfig, TuningConfig
    from e4t_cli.registry.domain import Domain
    from tests.conftest import drawn_face

    root = tmp_path_factory.mktemp("world")
    domain = Domain(
        name="my_faces",
        descriptor="face",
        tuning=TuningConfig(steps=2, base_learning_rate=1e-6, reg_weight=0.1, batch_size=2),
        prompt_templates=("{}", "a photo of {}"),
    )
    pack = e4t_cli.pretrain(
        domain,
        [drawn_face(index, 64)[0] for index in range(4)],
        base=base_folder,
        config=PretrainingConfig(steps=2, batch_size=2),
        tuning=domain.tuning,
        folder=root / "my_faces",
    )
    photo = root / "me.png"
    drawn_face(1, 96)[0].save(photo)
    return World(base_folder, pack, photo)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        code = app.run(arguments)
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return run


@pytest.fixture
def start(tmp_path):
    """Start a command line as a process of its own, in an empty folder."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **options) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            [sys.executable, "-m", "e4t_cli", *arguments],
            cwd=tmp_path, env=environment, **{**settings, **options},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
