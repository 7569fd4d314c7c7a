"""`--json`: one object a line in every command, keys in snake case, numbers as numbers."""

import json
import re
from pathlib import Path

import pytest

from e4t_cli.registry.discovery import user_domains_folder

ME = str(Path(__file__).parent.parent.parent / "examples" / "me.png")
DOGS = str(Path(__file__).parent.parent.parent / "examples" / "dogs")
MINI = ["--base", "mini"]
# Entries of these are named by data: bases, files, packages, domains.
DATA = {"weights", "files", "versions", "domains", "sizes"}
COMMANDS = [
    ["domains", "list"], ["domains", "--json"], ["domains", "info", "face"], ["domains", "check", "face"],
    ["domains", "new", "my_dogs"], ["cache", "dir"], ["cache", "ls"], ["cache", "verify"], ["cache", "prune", "-y"],
    ["doctor"], ["info", str(Path(ME).parent.parent / "domains/e4t_domains/packs/face/mini")],
    ["personalize", "face", ME, "S* x", *MINI, "--dry-run"],
    ["personalize", "face", ME, "S* x", *MINI, "--tune-steps", "0", "--steps", "1", "--grid", "--save", "me.e4t"],
    pytest.param(["pretrain", "--domain", "my_dogs", "--data", DOGS, *MINI, "--dry-run"], marks=pytest.mark.slow),
]  # fmt: skip


def check(value, where=()):
    """Check keys and values of one object."""
    for key, one in value.items():
        pattern = r"[a-z0-9][a-z0-9_.+-]*" if where and where[-1] in DATA else r"[a-z0-9][a-z0-9_]*"
        assert re.fullmatch(pattern, key), f"{where}: {key!r}"
        if isinstance(one, dict):
            check(one, (*where, key))
        elif isinstance(one, str) and "revision" not in key:
            number = r"[0-9]+([.][0-9]+)?( ?(bytes|[kMG]?B|px|s|steps))?|[0-9]+×[0-9]+"
            assert not re.fullmatch(number, one), f"{where}: {key} is the text {one!r}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[:2]))
def test_every_line_is_an_object(run, command):
    ended = run(*command, *([] if "--json" in command else ["--json"]))
    assert ended.code == 0, ended.err
    for line in ended.lines:
        told = json.loads(line, parse_constant=pytest.fail)
        assert told["schema"] == 1
        check(told)
    assert ended.lines or command[0] == "cache"


def test_a_command_without_results_prints_nothing(run, monkeypatch):
    monkeypatch.setenv("E4T_DOMAINS", "")
    assert run("domains", "list", "--json").out == ""
    assert run("cache", "ls", "--json").out == ""


def test_an_unreadable_user_domain_hides_no_other(run, tmp_path, monkeypatch, world):
    """Neither one folder nor all of them."""
    from e4t_cli.registry import discovery

    folder = user_domains_folder()
    (folder / "closed").mkdir(parents=True)
    (folder / "sound").symlink_to(world.pack)
    (folder / "loop").symlink_to(folder / "loop")
    monkeypatch.setattr(discovery.os, "access", lambda path, mode: Path(path).name != "closed")
    rows = {row["name"]: row for row in map(json.loads, run("domains", "list", "--json").lines)}
    assert {"face", "cat", "art", "closed", "sound"} <= set(rows) and "loop" not in rows
    assert "cannot be read" in rows["closed"]["reason"]

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(discovery.os, "listdir", closed)
    assert {"face", "cat", "art"} <= {json.loads(line)["name"] for line in run("domains", "list", "--json").lines}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_HOME", "{file}", "cannot be a folder"),
        ("HF_HUB_CACHE", "{file}/x", "cannot be a folder"),
        ("E4T_CACHE_DIR", "{file}", "cannot be a folder"),
        ("E4T_CACHE_DIR", "/" + "x" * 300, "File name too long"),
        ("E4T_CACHE_DIR", "~nobody-of-this-name/x", "there is no home folder"),
        ("XDG_DATA_HOME", "{file}", "cannot be a folder"),
    ],
)
def test_doctor_and_cache_name_the_variable(run, tmp_path, monkeypatch, name, value, words):
    (tmp_path / "file").write_text("")
    for other in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "E4T_CACHE_DIR"):
        monkeypatch.delenv(other, raising=False)
    assert json.loads(run("doctor", "--json").out)["problems"] == []
    monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    ended = run("doctor", "--json")
    (problem,) = json.loads(ended.out)["problems"]
    assert words in problem and (name in problem or "home" in words)
    for command in (["cache", "dir"], ["cache", "ls"], ["domains", "list"], ["cache", "prune", "-y"]):
        ended = run(*command)
        assert ended.code == 0, ended.err
        assert problem in ended.err or command[0] == "domains" or command[1] == "prune"
