"""One pre-training of a domain at a time, whatever happened to the one before."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from e4t_cli.errors import UsageError
from e4t_cli.pretraining import lock
from e4t_cli.pretraining.lock import locked
from e4t_cli.temporary import machine


@pytest.fixture(params=["flock", "no flock"])
def locks(request, monkeypatch):
    """The operating system's locks, or a file system that has none."""
    if request.param == "no flock":
        fcntl = pytest.importorskip("fcntl")

        def refuse(*arguments):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_second_learns_who_is_at_it(tmp_path, locks):
    with locked(tmp_path / "work", "my_dogs"):
        with (
            pytest.raises(
                UsageError, match=f"'my_dogs' is being pre-trained already, by process {os.getpid()} on"
            ) as at,
            locked(tmp_path / "work", "my_dogs"),
        ):
            pass
        assert "wait for it" in at.value.hint and "since 20" in at.value.message
        (tmp_path / "work" / "step-00000001.safetensors").touch()
    assert os.listdir(tmp_path / "work") == ["step-00000001.safetensors"]
    with locked(tmp_path / "work", "my_dogs"):
        pass


def test_nothing_is_left_of_a_run_that_kept_nothing(tmp_path, locks):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "work", "my_dogs"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"process": "x"}'])
def test_a_lock_of_a_dead_process_is_taken_over(tmp_path, locks, content):
    if content is None:
        content = json.dumps({"machine": machine(), "process": 999_999_999, "host": "here", "since": "2020"})
    (tmp_path / lock.NAME).write_text(content)
    with locked(tmp_path, "my_dogs"):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()


def test_of_another_machine_without_locks_nothing_is_known(tmp_path, locks, request):
    (tmp_path / lock.NAME).write_text('{"machine": "another1", "process": 1, "host": "far", "since": "2020"}')
    if "no flock" in request.node.name:
        with pytest.raises(UsageError, match="process 1 on far, since 2020") as refused, locked(tmp_path, "x"):
            pass
        assert str(tmp_path / lock.NAME) in refused.value.hint
    else:
        with locked(tmp_path, "x"):
            pass


def test_a_killed_process_holds_nothing(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from e4t_cli.pretraining.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'x'): os._exit(137)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 137
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] != os.getpid()
    with locked(tmp_path, "x"):
        pass


def test_of_many_at_once_one_has_it(tmp_path):
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, refused
        for _ in range(30):
            try:
                with locked(tmp_path / "work", "x"):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except UsageError:
                refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert os.listdir(tmp_path) == []
