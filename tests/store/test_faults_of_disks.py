"""Every write of a user's file, with each call of the file system failing in turn: code, old content, no leftovers."""

import errno
import itertools
import os
import shutil
from functools import partial

import pytest

from e4t_cli import files
from e4t_cli.errors import E4TError, ResourceError, UsageError
from e4t_cli.files import put_in_place, staging_directory, write_atomically, writing
from e4t_cli.registry.discovery import find_domain, user_domains_folder
from e4t_cli.registry.scaffold import new_domain
from e4t_cli.registry.store import add_domain
from e4t_cli.temporary import final_path, is_leftover, leftovers, sweep, temporary_path
from tests.faults import faults, tree
from tests.store.conftest import write_domain_folder, write_zip

NUMBERS = {
    errno.ENOSPC: ResourceError, errno.EDQUOT: ResourceError, errno.EFBIG: ResourceError,
    errno.EACCES: UsageError, errno.EPERM: UsageError, errno.EROFS: UsageError, errno.EIO: UsageError,
}  # fmt: skip
numbers = pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
usual, others = (errno.ENOSPC, errno.EACCES), set(NUMBERS) - {errno.ENOSPC, errno.EACCES}
slow_numbers = pytest.mark.parametrize(
    "number", [*usual, *(pytest.param(one, marks=pytest.mark.slow) for one in sorted(others))], ids=errno.errorcode.get
)


def fail_at_every_step(root, number, work, undo, *, lasting=False):
    """Run `work` with one step after the other failing: it reports that and changes nothing, or succeeds."""
    root.mkdir(parents=True, exist_ok=True)
    failed = 0
    for step in range(300):
        before = tree(root)
        try:
            with faults(root, step, OSError(number, os.strerror(number)), lasting=lasting) as seen:
                work()
        except E4TError as error:
            failed += 1
            where = f"step {step} of {seen.names}: {error.message} ({error.hint})"
            assert type(error) is NUMBERS[number], where
            assert ("make room" in (error.hint or "")) == (type(error) is ResourceError), where
            assert "~" not in error.message, where  # but the name that the user gave
            assert tree(root) == before, where
        else:
            undo()
            assert tree(root) == before
            if not seen.reached:
                return failed
    raise AssertionError("it does not end")


@slow_numbers
@pytest.mark.parametrize("lasting", [False, True])
def test_add(folder, tmp_path, number, lasting):
    for source in (folder, write_zip(tmp_path / "dogs.zip", folder)):
        store = user_domains_folder()
        undo = partial(shutil.rmtree, store / "my_dogs")
        assert fail_at_every_step(store, number, partial(add_domain, source), undo, lasting=lasting) > 8


@slow_numbers
def test_add_in_place_of_another(folder, tmp_path, number):
    store, old = user_domains_folder(), write_domain_folder(tmp_path / "old", images=7)
    add_domain(old)

    def undo():
        assert tree(store / "my_dogs") == tree(folder)
        add_domain(old, force=True)

    assert fail_at_every_step(store, number, partial(add_domain, folder, force=True), undo) > 8


@slow_numbers
@pytest.mark.parametrize("lasting", [False, True])
def test_new(folder, tmp_path, number, lasting):
    root = tmp_path / "here"
    work = partial(new_domain, "my_dogs", root / "deep" / "new", weights=folder)
    (root / "deep").mkdir(parents=True)
    undo = partial(shutil.rmtree, root / "deep" / "new")
    assert fail_at_every_step(root, number, work, undo, lasting=lasting) > 15


@numbers
def test_files_and_folders(tmp_path, number):
    root = tmp_path / "here"
    (root / "old").mkdir(parents=True)
    (root / "old" / "file").write_text("kept")
    write_atomically(root / "file", b"old")

    def work():
        with staging_directory(root / "new") as staging, writing(root / "new"):
            write_atomically(staging / "file", b"new")
            (staging / "folder").mkdir()
            write_atomically(staging / "folder" / "file", b"new")
            put_in_place(staging / "folder", root / "old", ours=lambda path: True)
            # Two names cannot change in one step: the second is the last that can fail.

    def undo():
        assert (root / "old" / "file").read_bytes() == b"new"
        (root / "old" / "file").write_text("kept")

    assert fail_at_every_step(root, number, work, undo) > 5


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "plain rename"])
def test_a_name_that_appears_meanwhile_is_never_replaced(tmp_path, monkeypatch, flags):
    """Files, full folders and empty ones; with the system call for it, and without."""
    if not flags:
        monkeypatch.setattr(files, "rename_with_flags", lambda *paths, **options: False)
    for index, (made, there) in enumerate(itertools.product(("file", "folder"), ("file", "empty", "full", "link"))):
        root = tmp_path / str(index)
        (root / "new").mkdir(parents=True)
        write_atomically(root / "new" / "file", b"new")
        path = root / "name"
        if there == "file":
            path.write_bytes(b"old")
        elif there == "link":
            path.symlink_to(root / "nowhere")
        else:
            path.mkdir()
            if there == "full":
                (path / "file").write_bytes(b"old")
        before = tree(root)
        with pytest.raises(FileExistsError):
            put_in_place(root / "new" / "file" if made == "file" else root / "new", path)
        assert tree(root) == before, (made, there)


def test_replacement_without_the_system_call_is_repaired_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "rename_with_flags", lambda *paths, **options: False)
    ends = set()
    for step in range(20):
        root = tmp_path / str(step)
        for name, text in (("old", "old"), (".made~", "new")):
            (root / name).mkdir(parents=True)
            (root / name / "file").write_text(text)
        process = os.fork()
        if not process:
            with faults(root, step, kill=True):
                put_in_place(root / ".made~", root / "old", ours=lambda path: True)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        sweep(root / "old")
        found = (root / "old" / "file").read_text()
        ends.add((code, found))
        assert {path.name for path in root.iterdir()} <= {"old", ".made~"}
        if not code:
            break
    assert ends == {(137, "old"), (137, "new"), (0, "new")}


def test_force_replaces_only_what_e4t_wrote(folder, tmp_path):
    other = write_domain_folder(tmp_path / "other", images=7)
    added = add_domain(folder)
    add_domain(other, force=True)
    assert find_domain("my_dogs").summary == "pre-trained on 7 images"
    (added.folder / "my thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not written by e4t, or holds more") as refused:
        add_domain(folder, force=True)
    assert "domains rm" in refused.value.hint
    assert (added.folder / "my thesis.txt").read_text() == "mine"


def test_a_package_is_replaced_until_somebody_changes_it(tmp_path, folder):
    made = new_domain("my_dogs", tmp_path / "new", weights=folder)
    with pytest.raises(UsageError, match="not an empty folder") as refused:
        new_domain("my_dogs", made)
    assert "--force" in refused.value.hint
    (made / "tests" / "__pycache__").mkdir()
    (made / "tests" / "__pycache__" / "x.pyc").touch()
    new_domain("my_dogs", made, descriptor="hound", force=True)
    assert "hound" in (made / "pyproject.toml").read_text()
    before = tree(made)
    for name in ("pyproject.toml", "README.md", "e4t_domain_my_dogs/extra.py"):
        new = made / name
        text = new.read_text() if new.exists() else None
        new.write_text(f"{text or ''}# mine\n")
        if name == "pyproject.toml":
            new.write_text(f"# mine\n{text}")
        with pytest.raises(UsageError, match="was changed since"):
            new_domain("my_dogs", made, force=True)
        new.unlink() if text is None else new.write_text(text)
    assert tree(made).keys() == before.keys() - {"tests/__pycache__", "tests/__pycache__/x.pyc"}


def test_whose_temporary_names_are_leftovers(tmp_path):
    ours = temporary_path(tmp_path / ("a" * 60))
    assert final_path(ours / "domain") == tmp_path / "domain" and final_path(ours).name == "a" * 48
    ours.touch()
    assert not is_leftover(ours) and list(leftovers(tmp_path, "a" * 60)) == []
    ended = ours.with_name(ours.name.replace(f"-{os.getpid()}-", "-999999999-"))
    ours.rename(ended)
    assert list(leftovers(tmp_path, "a" * 60)) == [ended] == list(leftovers(tmp_path))
    assert list(leftovers(tmp_path, "a")) == []
    for name in (".bashrc~", ".me~", ".a.b~", "x.0123456789abcdef~", ".git"):  # of other programs
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path / ("a" * 60))
    assert sorted(os.listdir(tmp_path)) == sorted([".bashrc~", ".me~", ".a.b~", "x.0123456789abcdef~", ".git"])
