import os
import stat
import threading

import pytest

from e4t_cli import files
from e4t_cli.files import sha256_of, write_atomically


def test_bytes_and_functions(tmp_path):
    write_atomically(tmp_path / "a", b"one")
    write_atomically(str(tmp_path / "a"), lambda file: file.write(b"two") and None)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]
    assert sha256_of(tmp_path / "a").startswith("3fc4ccfe7458")


def test_what_exists_stays_if_it_must(tmp_path):
    write_atomically(tmp_path / "a", b"one", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", b"two", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_many_writers_one_name(tmp_path):
    """Of eight at once, exactly one gets a name that may not be overwritten."""
    won = []

    def write(index):
        try:
            write_atomically(tmp_path / "a", str(index).encode(), overwrite=False)
            won.append(index)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "a").read_bytes() == str(won[0]).encode()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    write_atomically(tmp_path / "a", b"old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", interrupted)
    assert os.listdir(tmp_path) == []


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("not supported")

    monkeypatch.setattr(files.os, "link", refuse)
    write_atomically(tmp_path / "a", b"one", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"one"
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "a", b"two", overwrite=False)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_the_umask_is_the_users(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"one")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "a", b"one")
