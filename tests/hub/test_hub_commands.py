"""The commands around the hub, as processes and in this one: fetch, cache, doctor, personalize."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from e4t_cli.api import resolve as automatic
from e4t_cli.api.resolve import default_base_name
from e4t_cli.cli import app
from e4t_cli.devices import likely_accelerator
from e4t_cli.hub.bases import PUBLISHED
from e4t_cli.hub.paths import HubAccess, hub_cache, user_cache
from e4t_cli.registry.discovery import find_domain
from tests.hub.fake_hub import FakeHub, Fault
from tests.hub.repositories import publish_stable_diffusion

TIGER = Path(__file__).parents[2] / "examples" / "tiger.png"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    with FakeHub() as hub:
        publish_stable_diffusion(hub, folder)
    return folder


@pytest.fixture
def tiny(hub, made):
    return hub.add("owner/tiny", made)


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command line in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E4T_OFFLINE", raising=False)

    def run(*arguments):
        capfd.readouterr()
        code = app.run(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    yield run
    os.environ.pop("E4T_OFFLINE", None)


def test_fetch_prints_the_folder(hub, tiny, run):
    code, out, err = run("fetch", "owner/tiny")
    assert code == 0, err
    folder = Path(out.strip())
    assert folder.name == tiny and (folder / "model_index.json").is_file()
    assert "fetching" in err and "are free there" in err and "apache-2.0" in err
    code, out, err = run("fetch", "owner/tiny", "--json")
    assert code == 0 and json.loads(out)["revision"] == tiny and "error" not in err


def test_fetch_of_what_there_is_not(hub, run):
    code, out, err = run("fetch", "owner/none")
    assert (code, out) == (4, "") and "there is no repository owner/none" in err
    code, out, err = run("fetch", "nothing", "--json")
    assert code == 2 and json.loads(err.splitlines()[-1])["error"]["code"] == "usage"


def test_fetch_repairs(hub, tiny, run):
    run("fetch", "owner/tiny")
    weights = next(hub_cache().rglob("snapshots/*/vae/*.safetensors")).resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    code, out, _ = run("cache", "verify")
    assert code == 5 and "owner/tiny/vae/" in out and "expected" in out
    assert run("fetch", "owner/tiny")[0] == 0
    code, out, err = run("cache", "verify")
    assert (code, out) == (0, "") and "match their checksums" in err


def test_verify_finds_changes_without_a_new_modification_time(hub, tiny, run):
    """A flipped bit with an unchanged modification time: only reading finds it."""
    run("fetch", "owner/tiny")
    weights = next(hub_cache().rglob("snapshots/*/vae/*.safetensors")).resolve()
    about = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run("cache", "verify")[0] == 5


def test_cache_lists_and_removes(hub, tiny, run, monkeypatch):
    assert run("cache", "ls", "--json")[1] == ""
    run("fetch", "owner/tiny")
    assert run("cache", "dir")[1].splitlines() == [str(hub_cache()), str(user_cache())]
    row = json.loads(run("cache", "ls", "--json")[1])
    assert row["name"] == "owner/tiny" and row["revision"] == tiny and row["size"] > 10_000
    assert "owner/tiny" in run("cache", "ls")[1]

    code, out, err = run("cache", "rm", "owner/tiny")
    assert (code, out) == (2, "") and "nothing was removed" in err and Path(row["path"]).is_dir()
    assert run("cache", "rm", "nothing")[0] == 2
    code, out, _ = run("cache", "rm", "owner/tiny", "-y")
    assert code == 0 and out.strip() == row["path"]
    assert not list(hub_cache().glob("models--owner--tiny*"))
    assert run("cache", "ls", "--json")[1] == ""


def test_cache_removes_a_repository_with_a_dead_link(hub, tiny, run):
    """Which huggingface_hub's own scan of the cache leaves out."""
    from huggingface_hub import scan_cache_dir

    run("fetch", "owner/tiny")
    next(hub_cache().rglob("snapshots/*/vae/*.safetensors")).resolve().unlink()
    assert not scan_cache_dir(hub_cache()).repos
    assert "owner/tiny" in run("cache", "ls")[1]
    assert run("cache", "rm", "owner/tiny", "-y")[0] == 0
    assert not list(hub_cache().glob("models--owner--tiny*"))


def test_cache_shows_what_was_derived(hub, run):
    kept = user_cache() / "pretraining" / "abc"
    kept.mkdir(parents=True)
    (kept / "chunk.safetensors").write_bytes(b"x" * 7)
    row = json.loads(run("cache", "ls", "--json")[1])
    assert (row["name"], row["size"]) == ("pretraining/abc", 7)
    assert run("cache", "rm", row["name"], "-y")[0] == 0 and not kept.exists()


def test_cache_leaves_other_programs_alone(hub, tiny, run):
    theirs = hub_cache() / "models--other--model" / "blobs" / "x.incomplete"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"1")
    os.utime(theirs, (1, 1))
    run("fetch", "owner/tiny")
    assert "models--other" not in run("cache", "ls")[1]
    assert run("cache", "prune", "-y")[0] == 0 and theirs.is_file()


def test_doctor_prints_no_secret(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = run("doctor", "--json")
    about = json.loads(out)
    assert code == 0 and about["has_token"] is True and "hf_secret" not in out + err
    assert about["e4t"] and about["torch"] and about["hub_cache_free"] > 0
    assert "mini" in about["bases"] and not hub.requests


# ── --base auto ──


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(automatic, "likely_accelerator", lambda device="auto": device != "cpu")
    monkeypatch.setattr(automatic, "choose_device", lambda device: SimpleNamespace(type="cuda"))


def test_auto_without_an_accelerator_sends_no_request(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(automatic, "likely_accelerator", lambda device: False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("is_cached", "choose_device"):
        monkeypatch.setattr(automatic, name, refuse)
    name, why = default_base_name(HubAccess(), domain=find_domain("face"))
    assert name == "mini" and "no accelerator" in why and "--base sd14" in why
    name, why = default_base_name(HubAccess(), domain=find_domain("cat"))  # it has no weights for sd14
    assert name == "mini" and "no accelerator" in why and "sd14" not in why


@pytest.mark.parametrize("base", ["sd14", "sd21", "CompVis/stable-diffusion-v1-4"])
@pytest.mark.parametrize("command", ["personalize", "fetch"])
def test_a_base_is_not_fetched_for_a_domain_without_weights_for_it(command, base, run, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    photo = [str(TIGER), "S* in space"] if command == "personalize" else []
    code, out, err = run(command, "cat", *photo, "--base", base)
    assert (code, out) == (4, "") and "has no weights for the base" in err and "e4t pretrain" in err


@pytest.mark.parametrize("command", ["personalize", "fetch"])
def test_nor_one_of_the_hub_whose_name_is_known(command, hub, made, run, tmp_path):
    """A repository without base.toml has its address as its name."""
    photo = [str(TIGER), "S* in space"] if command == "personalize" else []
    unnamed = shutil.copytree(made, tmp_path / "unnamed")
    (unnamed / "base.toml").unlink()
    hub.add("owner/unnamed", unnamed)
    for _ in range(2):  # also where the list of its files is remembered
        code, out, err = run(command, "cat", *photo, "--base", "owner/unnamed")
        assert (code, out) == (4, "") and "e4t pretrain" in err
        assert "has no weights for the base 'owner-unnamed'" in err
    assert hub.count("GET", "*/resolve/*") == 0 and not list(hub_cache().rglob("*.safetensors"))


def test_auto_with_an_accelerator(hub, accelerator, monkeypatch):
    yes = HubAccess(accept_license=True)
    assert default_base_name(yes)[0] == "sd14"
    assert default_base_name(yes, device="cpu")[0] == "mini"
    name, why = default_base_name(yes, domain=find_domain("cat"))
    assert name == "mini" and "cat has no weights for sd14" in why
    name, why = default_base_name(HubAccess())
    assert name == "mini" and "licence" in why
    name, why = default_base_name(HubAccess(offline=True, accept_license=True))
    assert name == "mini" and "offline" in why
    with monkeypatch.context() as broken:
        broken.setattr(automatic, "choose_device", lambda device: SimpleNamespace(type="cpu"))
        name, why = default_base_name(yes)
        assert name == "mini" and "does not work with this torch" in why
        assert default_base_name(yes, confirm=False)[0] == "sd14"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    name, why = default_base_name(yes)
    assert name == "mini" and "the hub does not answer" in why


def test_auto_takes_what_is_here_without_a_question(hub, accelerator, made, monkeypatch):
    from e4t_cli.hub import image_tower as towers
    from e4t_cli.hub.resolve import fetch_base

    monkeypatch.setattr(towers, "has_tower", lambda tower=None: True)
    row = PUBLISHED["sd14"]
    hub.add(row.repository, made, commit=row.revision)
    fetch_base("sd14", HubAccess(accept_license=True))
    shutil.rmtree(user_cache())
    hub.faults.append(Fault("hang"))
    assert default_base_name(HubAccess(offline=True))[0] == "sd14"
    assert default_base_name(HubAccess())[0] == "sd14"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_counted(monkeypatch, hidden):
    import platform

    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not likely_accelerator() and not likely_accelerator("cpu")
    assert likely_accelerator("cuda:1")


# ── the whole way ──


def test_personalize_on_a_base_of_the_hub(hub, tiny, tmp_path, run, monkeypatch):
    """From an id to an image in one command, then offline, then from the saved concept."""
    from PIL import Image

    import e4t_cli
    from e4t_cli.registry.config import PretrainingConfig, TuningConfig
    from e4t_cli.registry.domain import Domain
    from tests.conftest import drawn_face

    drawn_face(1, 96)[0].save(tmp_path / "me.png")
    domain = Domain(
        name="ours",
        descriptor="face",
        tuning=TuningConfig(steps=2, base_learning_rate=1e-6, reg_weight=0.1, batch_size=2),
        prompt_templates=("{}", "a photo of {}"),
    )
    from e4t_cli.registry.discovery import user_domains_folder

    e4t_cli.pretrain(
        domain,
        [drawn_face(index, 64)[0] for index in range(2)],
        base="owner/tiny",
        config=PretrainingConfig(steps=1, batch_size=2),
        folder=user_domains_folder() / "ours",
        device="cpu",
    )
    quick = ("S* on the beach", "--steps", "2", "--seed", "3", "--device", "cpu")
    learn = ("personalize", "ours", "me.png", *quick, "--tune-steps", "1")
    code, out, err = run(*learn, "--base", "owner/tiny", "--save", "me.e4t")
    assert code == 0, err
    first = Image.open(tmp_path / out.splitlines()[1])

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    requests_before = len(hub.requests)
    for command in (
        (*learn, "--base", "tiny", "--offline"),
        ("generate", "me.e4t", *quick, "--offline"),
    ):
        code, out, err = run(*command)
        assert code == 0, err
        assert Image.open(tmp_path / out.splitlines()[0]).tobytes() == first.tobytes()
    assert len(hub.requests) == requests_before


def test_a_dry_run_fetches_nothing(hub, tiny, tmp_path, run):
    from tests.conftest import drawn_face

    drawn_face(1, 96)[0].save(tmp_path / "me.png")
    code, out, err = run("personalize", "face", "me.png", "S* on the beach", "--dry-run", "--base",
                         "sd14")  # fmt: skip
    assert code == 0, err
    assert "the base sd14" in out and "512×512" in out and not hub.requests


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2)])
def test_a_terminal_is_asked(hub, tiny, tmp_path, answer, code):
    import pty

    from e4t_cli.hub.download import fetch_files

    folder = fetch_files("owner/tiny", tiny, ["model_index.json"])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "e4t_cli", "cache", "rm", "owner/tiny"],
        stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=dict(os.environ),
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    out, _ = process.communicate(timeout=60)
    output = os.read(ours, 10_000).decode()
    os.close(ours)
    assert process.returncode == code and "remove owner/tiny" in output and "[y/N]" in output
    assert folder.is_dir() == (answer == "n") and bool(out) == (answer == "y")


def test_an_interrupt_does_not_wait_for_gigabytes(hub, tiny, tmp_path):
    """Ctrl-C in the middle of a file: 130, nothing half-done, and it goes on next time."""
    import signal
    import threading
    import time

    hub.chunk_gate = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-m", "e4t_cli", "fetch", "owner/tiny"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(hub_cache().rglob("*.incomplete")) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGINT)
    threading.Event().wait(0.2)
    hub.chunk_gate.set()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not out, err
    assert "the same command continues" in err and "Traceback" not in err
    assert not list(hub_cache().rglob("*.incomplete"))


def test_auto_prints_one_line(monkeypatch):
    from e4t_cli.api.resolve import resolve_base_name

    monkeypatch.setattr(automatic, "likely_accelerator", lambda device: False)
    events = []
    assert resolve_base_name("auto", HubAccess(on_progress=events.append)) == "mini"
    assert [bool(event.remark) for event in events] == [True] and not events[0].note
    assert resolve_base_name("sd15", HubAccess(on_progress=events.append)) == "sd15" and len(events) == 1
