"""`e4t domains …`: what its commands print, refuse and leave behind."""

import json
import os
import shutil
import sys

import pytest

from e4t_cli.cli import console as consoles
from e4t_cli.registry.discovery import user_domains_folder
from tests.plugins.conftest import install, site  # noqa: F401  # fixtures
from tests.store.conftest import FILES, write_domain_folder


@pytest.fixture(autouse=True)
def every_domain(monkeypatch):
    monkeypatch.delenv("E4T_DOMAINS", raising=False)


@pytest.fixture
def folder(tmp_path):
    return write_domain_folder(tmp_path / "some where")


# ── add, list, info ──


def test_add_and_look(run, folder):
    added = run("domains", "add", str(folder))
    assert (added.code, added.out) == (0, f"{user_domains_folder() / 'my_dogs'}\n")
    assert "licence: CC0-1.0" in added.err
    assert "e4t personalize my_dogs PHOTO" in added.err
    row = next(row for row in run("domains", "list").lines if row.startswith("my_dogs"))
    assert "user" in row and "toy ready" in row and "CC0-1.0" in row
    told = run("domains", "info", "my_dogs").out
    for name, data in FILES.items():
        line = next(line for line in told.splitlines() if line.startswith(f"toy: {name}"))
        assert f"{len(data)} bytes, SHA-256 " in line
    for said in ("1,234", "dogs only", "CC0-1.0", "1,000 steps", "aaaaaaaaaaaa"):
        assert said in told
    again = run("domains", "add", str(folder))
    assert again.code == 2 and "already" in again.err and again.out == ""


def test_info_for_machines(run, folder):
    run("domains", "add", str(folder), "-q")
    told = json.loads(run("domains", "info", "my_dogs", "--json").out)
    pack = told["weights"]["toy"]
    assert told["source"] == "user"
    assert pack["state"] == "ready" and pack["size"] == sum(map(len, FILES.values()))
    assert pack["files"]["offsets.safetensors"]["bytes"] == len(FILES["offsets.safetensors"])
    assert len(pack["files"]["offsets.safetensors"]["sha256"]) == 64
    assert (pack["images"], pack["limits"], pack["licence"]) == (1234, "dogs only", "CC0-1.0")


def test_states_in_the_list(run, install):  # noqa: F811
    """Ready, to fetch with its size, none published, not here, broken: each in a few words."""
    install(
        "e4t-zoo",
        zoo="""
        from e4t_cli import Domain, TuningConfig
        zoo = Domain(
            name="zoo", descriptor="dog", licence="MIT",
            tuning=TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4),
            weights={"far": "hub:me/zoo@" + "0" * 40, "lost": "package:no_such/packs"},
            download_sizes={"far": 184_200_000},
        )
        """,
    )
    row = next(row for row in run("domains", "list").lines if row.startswith("zoo"))
    assert "mini none published; far 184 MB to fetch; lost not on this machine" in row
    told = run("domains", "info", "zoo").out
    assert "e4t fetch zoo --base far" in told
    broken = user_domains_folder() / "zoo2"
    broken.mkdir(parents=True)
    (broken / "domain.toml").write_text("schema = 9")
    assert any(line.startswith("zoo2  user") and "newer e4t" in line
               for line in run("domains", "list").lines)  # fmt: skip


def test_a_pack_that_lacks_a_file_is_broken_in_the_list(run, folder):
    run("domains", "add", str(folder))
    (user_domains_folder() / "my_dogs" / "encoder.safetensors").unlink()
    row = next(row for row in run("domains", "list").lines if row.startswith("my_dogs"))
    assert "toy broken" in row


@pytest.mark.parametrize("source", ["nowhere", "someone/dogs"])
def test_add_what_is_not_there(run, source):
    ended = run("domains", "add", source)
    assert ended.code == 2 and ended.out == ""


# ── rm ──


def test_rm_asks_somebody(run, folder, monkeypatch):
    run("domains", "add", str(folder))
    own = user_domains_folder() / "my_dogs"
    ended = run("domains", "rm", "my_dogs")  # nobody sits there
    assert ended.code == 2 and own.is_dir()
    assert "-y removes without asking" in ended.err
    asked = []
    monkeypatch.setattr(consoles.Console, "ask", lambda self, text: asked.append(text) or False)
    assert run("domains", "rm", "my_dogs").code == 2 and own.is_dir()
    assert str(own) in asked[0]
    monkeypatch.setattr(consoles.Console, "ask", lambda self, text: True)
    assert run("domains", "rm", "my_dogs").out == f"{own}\n"
    assert not own.exists()


def test_rm_yes(run, folder):
    run("domains", "add", str(folder))
    ended = run("domains", "rm", "my_dogs", "-y", "--json")
    assert json.loads(ended.out)["type"] == "removed"
    assert run("domains", "rm", "my_dogs", "-y").code == 2
    assert "pip uninstall" not in run("domains", "rm", "face", "-y").err


# ── new ──


def test_new(run, tmp_path):
    made = run("domains", "new", "my_dogs", "--descriptor", "dog")
    assert (made.code, made.out) == (0, "e4t-domain-my-dogs\n")
    assert "pip install -e e4t-domain-my-dogs" in made.err
    assert (tmp_path / "e4t-domain-my-dogs" / "pyproject.toml").is_file()
    assert run("domains", "new", "my_dogs").code == 2
    assert run("domains", "new", "face", "elsewhere").code == 2
    assert run("domains", "new", "a/b").code == 2
    assert sorted(os.listdir(tmp_path)) == ["e4t-domain-my-dogs"]


# ── check ──


def test_check_says_everything(run, world):
    ended = run("domains", "check", str(world.pack))
    assert ended.code == 0
    assert [line.split()[0] for line in ended.lines] == ["ok"] * len(ended.lines)
    assert any("weights for tiny" in line and "not checked" in line for line in ended.lines)
    assert "licence: it states none" in ended.out


def test_check_reads_the_weights(run, world, tmp_path):
    pack = shutil.copytree(world.pack, tmp_path / "pack")
    path = pack / "encoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ended = run("domains", "check", "./pack", "--json")
    assert ended.code == 1
    rows = [json.loads(line) for line in ended.lines]
    assert [row["subject"] for row in rows if not row["ok"]] == ["weights for tiny"]
    assert "SHA-256" in next(row["message"] for row in rows if not row["ok"])
    assert json.loads(ended.err)["error"]["message"].startswith("1 of the checks failed")


def test_check_of_what_does_not_load(run, install):  # noqa: F811
    install("e4t-broken", broken="1 / 0")
    ended = run("domains", "check", "broken")
    assert ended.code == 1
    assert "FAILED  domain: " in ended.out and "ZeroDivisionError" in ended.out


def test_check_compares_the_pack_with_its_base(run):
    """The pack of cat fits mini; one whose descriptor is no single word of mini's does not."""
    from e4t_cli.registry.discovery import find_domain, weights_folder

    cat = weights_folder(find_domain("cat"), "mini")
    assert run("domains", "check", str(cat)).code == 0
    odd = shutil.copytree(cat, user_domains_folder() / "cat")
    card = (odd / "domain.toml").read_text()
    (odd / "domain.toml").write_text(card.replace('descriptor = "cat"', 'descriptor = "catlike ear"'))
    ended = run("domains", "check", str(odd))
    assert ended.code == 1 and "tokens to the base mini; it has to be one" in ended.out
    (odd / "domain.toml").write_text(card.replace('base_fingerprint = "', 'base_fingerprint = "0'))
    assert "made for another base than this mini" in run("domains", "check", str(odd)).out


# ── the shell ──


def completed(start, words):
    asked = {
        "_E4T_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": words,
    }
    out, _ = start(env=asked).communicate(timeout=60)
    return out.split()


def test_completion(start, folder):
    from e4t_cli.registry.store import add_domain

    add_domain(folder)
    assert completed(start, "e4t domains rm ") == ["my_dogs"]
    assert completed(start, "e4t domains info my") == ["my_dogs"]
    assert {"add", "check", "info", "list", "new", "push", "rm"} <= set(completed(start, "e4t domains "))


@pytest.mark.parametrize(
    "command", [["list"], ["info", "my_dogs"], ["add", "{}"], ["rm", "my_dogs", "-y"], ["new", "dogs"]]
)
def test_no_model_library_is_loaded(tmp_path, folder, command):
    """C5: looking, adding and removing need no torch and no Pillow; beginning needs the tokenizer, without torch."""
    import subprocess

    from e4t_cli.registry.store import add_domain

    if "{}" not in command:
        add_domain(folder)
    words = ["domains", *(word.format(folder) for word in command)]
    forbidden = {"torch", "diffusers"} | (set() if command[0] == "new" else {"transformers", "PIL"})
    code = (
        "import sys; from e4t_cli.cli.app import run\n"
        f"assert run({words!r}) == 0\n"
        f"assert not {forbidden} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_broken_domain_does_not_widen_the_table():
    from e4t_cli.cli.domains import _row
    from e4t_cli.registry.discovery import Listing

    row = _row(Listing(name="x", package="plugin", load=lambda: None, reason="did not load: " + "y" * 500))
    assert max(map(len, row[:-1])) < 20 and row[-1].endswith("yyy")  # the last column is not padded
