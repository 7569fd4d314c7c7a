"""Invariants of `add_domain`: complete and verified, or nothing is added (reliability rows F1, F2, F8, F9, D9)."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from e4t_cli.errors import InputError, IntegrityError, ResourceError, UsageError
from e4t_cli.registry.discovery import find_domain, installed_domains, user_domains_folder
from e4t_cli.registry.store import add_domain
from e4t_cli.registry.weights import weights_state
from e4t_cli.temporary import machine, temporary_path
from tests.store.conftest import FILES, manifest_text, write_domain_folder, write_zip


def stored():
    """What is in the user's folder: names, hidden ones too."""
    folder = user_domains_folder()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def test_a_folder_is_added(folder):
    added = add_domain(folder)
    assert added.folder == user_domains_folder() / "my_dogs"
    assert added.manifest.limits == "dogs only"
    dogs = find_domain("my_dogs")
    assert dogs == added.domain
    state = weights_state(dogs, "toy")
    assert (state.state, state.size) == ("ready", sum(map(len, FILES.values())))
    assert stored() == ["my_dogs"]


@pytest.mark.parametrize("prefix", ["", "my dogs (1)/"])
def test_a_zip_is_added(folder, tmp_path, prefix):
    add_domain(write_zip(tmp_path / "dogs.zip", folder, prefix))
    for name, data in FILES.items():
        assert (user_domains_folder() / "my_dogs" / name).read_bytes() == data
    assert stored() == ["my_dogs"]


def test_only_what_the_manifest_lists_comes_along(folder):
    (folder / "run.py").write_text("print('no')")
    (folder / "weights.pkl").write_bytes(b"\x80\x04.")
    added = add_domain(folder)
    assert {path.name for path in added.folder.iterdir()} == {"domain.toml", *FILES}


def test_the_bytes_that_are_kept_are_those_that_were_checked(folder):
    """D11: the folder changes while it is copied; the copy matches its manifest or is dropped."""
    path = folder / "encoder.safetensors"

    def change(progress):
        if progress.done < progress.total:
            (folder / "offsets.safetensors").write_bytes(FILES["offsets.safetensors"][:-1] + b"!")

    with pytest.raises(IntegrityError, match=r"offsets\.safetensors .* is damaged: its SHA-256 is"):
        add_domain(folder, on_progress=change)
    assert path.is_file()
    assert stored() == []


def test_what_is_there_stays(folder, tmp_path):
    add_domain(folder)
    other = write_domain_folder(tmp_path / "other", images=7)
    with pytest.raises(UsageError, match="already") as caught:
        add_domain(other)
    assert caught.value.hint == "replace it with --force; e4t domains rm my_dogs removes it"
    assert "images = 1234" in (user_domains_folder() / "my_dogs" / "domain.toml").read_text()
    assert stored() == ["my_dogs"]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_a_name_that_is_taken_is_said_before_anything_is_copied(folder, tmp_path, monkeypatch, packed):
    add_domain(folder)
    source, events = write_zip(tmp_path / "dogs.zip", folder) if packed else folder, []
    monkeypatch.setattr("zipfile.ZipFile.extract", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(UsageError, match="already"):
        add_domain(source, on_progress=events.append)
    assert events == [] and stored() == ["my_dogs"]
    (user_domains_folder() / "my_dogs" / "domain.toml").unlink()  # no whole domain: not even with --force
    with pytest.raises(UsageError, match="my_dogs"):
        add_domain(source, force=True, on_progress=events.append)
    assert events == []


def test_of_two_at_once_one_wins(folder):
    def attempt(_):
        try:
            return str(add_domain(folder).folder)
        except UsageError as error:
            return error.message

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, range(4)))
    assert sum("already" in result for result in results) == 3
    assert stored() == ["my_dogs"]
    find_domain("my_dogs")


def test_the_name_of_an_installed_domain_serves_it(tmp_path):
    """A domain folder for `cat` on a base of the user is weights for the installed domain."""
    add_domain(write_domain_folder(tmp_path / "x", name="cat"))
    cat = find_domain("cat")
    assert cat.descriptor == "cat" and "toy" not in cat.weights
    assert weights_state(cat, "toy").state == "ready"


# ── what is refused ──


def refused(source, kind, says):
    before = stored()
    with pytest.raises(kind, match=says):
        add_domain(source)
    assert stored() == before
    assert [row.name for row in installed_domains() if row.package == "user"] == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "no folder or zip nowhere"),
        ("some.zip", r"no folder or zip some\.zip"),
        ("someone/dogs", "needs a revision"),
        ("", "neither a folder"),
        ("a\0b", "neither a folder"),
        ("https://example.org/x.zip", "no folder or zip"),
    ],
)
def test_what_is_not_there(source, says):
    refused(source, UsageError, says)


def test_a_folder_without_a_manifest(tmp_path):
    refused(tmp_path, UsageError, r"no domain\.toml")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), "has no file encoder"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, its manifest says"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), "SHA-256"),
        (lambda path: (path.unlink(), path.mkdir()), "not a plain file|bytes"),
    ],
    ids=["gone", "short", "other", "folder"],
)
def test_files_that_differ_from_the_manifest(folder, change, says):
    change(folder / "encoder.safetensors")
    refused(folder, IntegrityError, says)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_F9_a_pipe_is_not_waited_for(folder):
    path = folder / "encoder.safetensors"
    path.unlink()
    os.mkfifo(path)
    refused(folder, IntegrityError, "not a plain file")


def test_F9_links_may_not_lead_out(folder, tmp_path):
    path = folder / "encoder.safetensors"
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    refused(folder, IntegrityError, "link to another place")
    path.unlink()
    path.symlink_to(path)
    refused(folder, IntegrityError, "no file")


def test_a_link_inside_is_a_file(folder):
    path = folder / "encoder.safetensors"
    path.rename(folder / "blob")
    path.symlink_to("blob")
    assert not (add_domain(folder).folder / path.name).is_symlink()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "C:x.safetensors", "a\\\\b.safetensors", "~.safetensors",
     "a\\u0000.safetensors", ".x.safetensors", "con.safetensors", "x.pt", "x.bin", "x.pkl", "x.py",
     "x", "x.safetensors.exe", "ünïcode.safetensors", "x/y.safetensors"],
)  # fmt: skip
def test_F9_F1_file_names(folder, name):
    text = manifest_text().replace("encoder.safetensors", name)
    (folder / "domain.toml").write_text(text)
    refused(folder, IntegrityError, "cannot be used: files|cannot be used: .*safetensors")


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "C:evil", "a b", "", "con", ".", "..", "~", "Dogs", "a" * 65, "é"]
)
def test_F9_domain_names(folder, name):
    (folder / "domain.toml").write_text(manifest_text(name=name))
    refused(folder, IntegrityError, "cannot be used: name")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (manifest_text().replace("schema = 1", "schema = 2"), "newer e4t"),
        (manifest_text().replace("schema = 1\n", ""), "schema"),
        (manifest_text(trust="me"), "trust"),
        (manifest_text(images="many"), "images"),
        (manifest_text(files={}), "lists no files"),
        (manifest_text() + "[sizes2]\n", "sizes2"),
        ("not toml at all", "not TOML"),
    ],
)
def test_F8_manifests(folder, text, says):
    (folder / "domain.toml").write_text(text)
    refused(folder, IntegrityError, says)


def test_F8_a_manifest_of_100_MB_is_not_read(folder):
    with (folder / "domain.toml").open("wb") as file:
        file.truncate(100_000_000)
    started = time.process_time()
    refused(folder, IntegrityError, "larger than a manifest can be")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("content", [b"\x80\x04}.", b"<html>", b"", b"\xff" * 7 + b"\x7f{}"])
def test_F2_other_files_under_the_right_name(tmp_path, content):
    files = {**FILES, "encoder.safetensors": content}
    refused(
        write_domain_folder(tmp_path / "odd", files),
        IntegrityError,
        "not a usable safetensors file",
    )


def test_an_invalid_json(tmp_path):
    files = {**FILES, "config.json": b"[" * 100_000}
    refused(write_domain_folder(tmp_path / "odd", files), IntegrityError, "is not JSON")


def test_D9_no_room(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    refused(folder, ResourceError, "bytes on disk, 10 are free")


def test_D9_the_disk_fills_up(folder, monkeypatch):
    import errno

    def full(path, data, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("e4t_cli.registry.store.write_atomically", full)
    refused(folder, ResourceError, "disk is full")


def test_a_store_that_cannot_be_written_to(folder, monkeypatch):
    def closed(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", closed)
    refused(folder, UsageError, "cannot be written: Permission denied")


def test_a_text_file_is_no_zip(tmp_path):
    (tmp_path / "dogs.zip").write_text("hello")
    refused(tmp_path / "dogs.zip", InputError, "is not a zip")


def test_leftovers_of_a_crash_go_and_running_ones_stay(folder):
    root = user_domains_folder()
    ended, mine = f".adding.{machine()}-999999999-00000000~", temporary_path(root / "adding").name
    old, young = f".removing.{'0' * 8}-1-00000000~", f".adding.{'0' * 8}-1-00000000~"  # of another machine
    for name in (ended, mine, old, young):
        (root / name / "domain").mkdir(parents=True)
        (root / name / "domain" / "domain.toml").touch()
    os.utime(root / old, (0, 0))
    assert [row.name for row in installed_domains() if row.package == "user"] == []
    add_domain(folder)
    assert stored() == sorted([mine, young, "my_dogs"])
