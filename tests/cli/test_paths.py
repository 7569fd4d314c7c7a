"""Impossible, unreadable and unusual paths wherever a command takes one: a promised code, one sentence, no waiting.

pytest -m slow tests/cli/test_paths.py -s        prints the counts
"""

import ctypes
import json
import os
import shutil
from collections import Counter

import pytest

import e4t_cli
from tests.children import complaint, run_in_child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TINY = ["--base", "base", "--steps", "1", "--offline"]
PLACES = [
    "nowhere", "nowhere/at/all", "", ".", "..", "/", "-", "-x", "./-x", "folder", "folder/", "file", "file/", "file/x",
    "dangling", "loop", "loop/x", "fifo", "/dev/null", "/dev/full", "/dev/full/x", "locked/x", "locked", "unreadable",
    "read-only/x", "~", "~/x", "~nobody-here/x", "x" * 300, "x/" * 3000, "x" * 5000, "日本" * 100, "a\nb", "\x1b[31ma",
    "a\0b", "\udcff", " ", "*", "../x", "a:b", "http://localhost/x", "hf://owner/name", "file.png", "folder.e4t",
]  # fmt: skip
READING = {
    "info": ["info", "PATH"],
    "generate": ["generate", "PATH", "S* on the beach", *TINY],
    "personalize": ["personalize", "./pack", "PATH", "S* on the beach", "--tune-steps", "1", *TINY],
    "domain": ["personalize", "PATH", "me.png", "S* on the beach", "--tune-steps", "1", *TINY],
    "mask": ["personalize", "./pack", "me.png", "S* on the beach", "--mask", "PATH", "--tune-steps", "1", *TINY],
    "prompts": ["generate", "me.e4t", "-f", "PATH", *TINY],
    "like": ["generate", "me.e4t", "--like", "PATH", *TINY],
    "base": ["generate", "me.e4t", "S* on the beach", "--base", "PATH", "--offline"],
    "data": ["pretrain", "--domain", "my_dogs", "--base", "base", "--steps", "1", "--offline", "--data", "PATH"],
    "domains add": ["domains", "add", "PATH", "--offline"],
    "domains check": ["domains", "check", "PATH"],
    "domains new --pack": ["domains", "new", "my_dogs", "--pack", "PATH"],
    "export from": ["export", "PATH", "exported", "--base", "base", "--offline"],
    "import": ["import", "e4t-diffusion", "PATH", "--name", "people", "--base", "base", "--offline"],
}
WRITING = {
    "generate -o": ["generate", "me.e4t", "S* on the beach", *TINY, "-o", "PATH"],
    "personalize --save": [
        "personalize", "./pack", "me.png", "S* on the beach", "--tune-steps", "1", *TINY, "--save", "PATH"],
    "save prepared": [
        "personalize", "./pack", "me.png", "S* on the beach", "--tune-steps", "1", *TINY, "--save-prepared", "PATH"],
    "export": ["export", "me.e4t", "PATH", "--base", "base", "--offline"],
    "export --lora": ["export", "me.e4t", "PATH", "--lora", "2", "--base", "base", "--offline"],
    "domains new": ["domains", "new", "my_dogs", "PATH"],
}  # fmt: skip
KINDS = {**READING, **WRITING}
QUICK = ("info", "domains add", "domains new")


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A folder with a path of every kind."""
    root = tmp_path_factory.mktemp("paths")
    for name in ("pack", "base"):
        shutil.copytree(getattr(world, name), root / name)
    shutil.copy(world.photo, root / "me.png")
    (root / "home/e4t/domains").mkdir(parents=True)
    shutil.copytree(world.pack, root / "home/e4t/domains/my_faces")
    e4t_cli.personalize(world.pack, root / "me.png", base=root / "base", tune_steps=1).concept.save(root / "me.e4t")
    for name in ("folder", "folder.e4t", "locked", "read-only"):
        (root / name).mkdir()
    for name in ("file", "file.png", "-x", "unreadable", "locked/x"):
        (root / name).write_text("a text\n")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    (root / "unreadable").chmod(0)
    (root / "locked").chmod(0)
    (root / "read-only").chmod(0o555)
    yield root
    (root / "locked").chmod(0o700)


def begin(root):
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ[name] = str(root / "home")
    os.chdir(root)
    # Permissions bind this user as well, if it is root: without its capabilities.
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, none):
        raise OSError("capset")


def tried(kind, place, log):
    codes, complaints = Counter(), []
    before = set(os.listdir(place))
    for path in PLACES:
        if (kind, path) == ("prompts", "fifo"):
            continue  # its writer is waited for, as of `-f <(...)`
        arguments = [path if one == "PATH" else one for one in KINDS[kind]]
        code, err, grown = run_in_child(log, arguments, lambda: begin(place))
        codes[code] += 1
        if wrong := complaint(code, err, grown):
            complaints.append(f"{kind} {path[:40]!r}: {wrong}: {err[-400:]}")
        for name in set(os.listdir(place)) - before:
            shutil.rmtree(place / name) if (place / name).is_dir() else os.unlink(place / name)
        for folder in ("folder", "read-only", "folder.e4t", "home"):
            for name in os.listdir(place / folder):
                if name != "e4t":
                    target = place / folder / name
                    shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.rmtree(place / "home/e4t/domains/my_dogs", ignore_errors=True)
    return codes, complaints


@pytest.mark.parametrize("kind", QUICK)
def test_paths_of_quick_commands(place, tmp_path, kind):
    codes, complaints = tried(kind, place, tmp_path / "messages.txt")
    assert not complaints, "\n".join(complaints)
    assert codes.total() - codes[0] > len(PLACES) // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_paths(place, tmp_path, kind):
    codes, complaints = tried(kind, place, tmp_path / "messages.txt")
    print(json.dumps({"kind": kind, "runs": codes.total(), "codes": {str(code): codes[code] for code in codes}}))
    assert not complaints, "\n".join([f"{len(complaints)}:", *complaints])
