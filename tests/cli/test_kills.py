"""Every command that writes, ended at every one of its file-system steps, as by SIGKILL, and then run again.

    pytest -m slow tests/cli/test_kills.py -s        prints the counts

After a kill every file of the user is old, complete, or absent, and nothing of others has changed. The same command
again ends with 0, or with 2 where the killed one had finished, and leaves what an undisturbed run leaves: no temporary
files, no checkpoints.
"""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch

import e4t_cli
from e4t_cli.cli import app
from e4t_cli.formats.e4t_diffusion import checkpoint as conversions
from e4t_cli.formats.e4t_diffusion.__main__ import read_pickled_tensors
from e4t_cli.formats.e4t_diffusion.conversion import convert_to_domain_folder
from e4t_cli.nn.unet import feature_widths
from e4t_cli.nn.weight_offsets import projection_shapes
from e4t_cli.registry.discovery import user_domains_folder
from tests.children import use_own_streams
from tests.conftest import drawn_face
from tests.faults import faults, tree

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
FOREIGN = {"thesis.txt": b"mine", ".thesis.txt~": b"an editor's", ".me.e4t.swp": b"another's"}
DOMAINS = "home/e4t/domains"
MOST = 80  # kills of a command; with more steps, a sample of them that is always the same
VARYING = {"training/losses.jsonl"}  # it has seconds in it


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Point everything that belongs to the user into a folder."""

    def move(folder):
        for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            monkeypatch.setenv(name, str(folder / "home"))
        (folder / "home").mkdir(parents=True, exist_ok=True)
        (folder / "work").mkdir(exist_ok=True)
        monkeypatch.chdir(folder / "work")

    return move


@pytest.fixture
def begin(world, home, monkeypatch):
    """Make the state before a command in a folder."""
    monkeypatch.setattr("e4t_cli.api.pretraining.training_templates", lambda domain: ("{}", "a photo of {}"))

    def in_process(request, folder, on_progress):
        return convert_to_domain_folder(request, folder, read_pickled_tensors)

    monkeypatch.setattr(conversions, "_run_child", in_process)

    def begin(folder, prepare):
        shutil.rmtree(folder, ignore_errors=True)
        home(folder)
        for name, data in FOREIGN.items():
            (folder / "work" / name).write_bytes(data)
        (user_domains_folder() / "of_others").mkdir(parents=True)
        (user_domains_folder() / "of_others" / "notes.txt").write_text("mine")
        prepare(folder / "work")

    return begin


def in_child(folder, arguments, step=None):
    """Run a command in a process of its own, ended at a step; returns its exit code, and its messages."""
    log = folder / "messages.txt"
    process = os.fork()
    if not process:
        try:
            handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            use_own_streams()
            if step is None:
                code = app.run(arguments)
            else:
                with faults(folder, step, kill=True) as seen:
                    code = app.run(arguments)
                os.write(2, f"steps: {len(seen.names)}".encode())
        except BaseException as error:
            os.write(2, repr(error).encode())
            code = 99
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, log.read_text(errors="replace")


def state(folder):
    """Return what is there for the user, without the cache, whose files are complete or absent by themselves."""
    found = {name: data for name, data in tree(folder).items() if not name.startswith("home/e4t/pretraining")}
    found.pop("messages.txt", None)
    return {name: sorted_header(data) if name.endswith(".safetensors") else data for name, data in found.items()}


def sorted_header(data):
    """Return a safetensors file with its metadata in order; the library writes them in any."""
    size = 8 + int.from_bytes(data[:8], "little")
    try:
        return json.dumps(json.loads(data[8:size]), sort_keys=True).encode() + data[size:]
    except ValueError:
        return data


def visible(found):
    return {name: data for name, data in found.items() if not any(part.startswith(".") for part in name.split("/"))}


def is_temporary(name):
    return any(part.endswith(("~", ".checkpoints")) and part not in FOREIGN for part in name.split("/"))


def product_of(name):
    """Return the name of the file or folder that appears as a whole, "" of a folder of such; each picture is one."""
    parts = name.split("/")
    length = {"work/outputs": 3, "home/e4t": 3}.get("/".join(parts[:2]), 2)
    length = 4 if name.startswith("home/e4t/domains") else length
    return "/".join(parts[:length]) if len(parts) >= length else ""


def part(found, product):
    names = (name for name in found if f"{name}/".startswith(f"{product}/") and not is_temporary(name))
    return {name: None if varies(name) else found[name] for name in names}


def varies(name):
    return any(name.endswith(one) for one in VARYING)


def count_steps(root, begin, arguments, prepare):
    """Return the number of steps of an undisturbed run."""
    begin(root, prepare)
    code, messages = in_child(root, arguments, 1 << 30)
    assert code == 0, messages
    return int(messages.rpartition("steps: ")[2])


def kill_everywhere(tmp_path, begin, arguments, product, *, prepare=lambda work: None):
    """Kill a command whose product is a path below the root; prints how often, and what that left."""
    root = tmp_path / "k"
    begin(root, prepare)
    before = state(root)
    code, messages = in_child(root, arguments)
    assert code == 0, messages
    complete = state(root)
    assert not [name for name in complete if is_temporary(name)]
    seen, kills, temporary = set(), 0, 0
    steps = count_steps(root, begin, arguments, prepare)
    chosen = range(steps) if steps <= MOST else sorted(random.Random(steps).sample(range(steps), MOST))
    for step in chosen:
        begin(root, prepare)
        code, messages = in_child(root, arguments, step)
        if code == 0 and step > 0.9 * steps:
            continue  # threads write what they find when they find it: the number of steps varies a little
        assert code == 137, messages
        kills += 1
        found = state(root)
        where = f"killed at step {step}"
        for one in {product_of(name) for name in [*before, *complete, *found]} - {""}:
            now, old, new = (part(tree, one) for tree in (found, before, complete))
            assert now in (old, new), f"{where}: {one} has {sorted(now)}"
        temporary += any(is_temporary(name) for name in found)
        names = [(name, hashlib.sha256(data).digest() if isinstance(data, bytes) else data)
                 for name, data in visible(found).items()]  # fmt: skip
        hidden = {product_of(name).rpartition("-")[0] for name in found if is_temporary(name)}
        if (key := repr((names, sorted(hidden)))) in seen:
            continue
        seen.add(key)
        code, messages = in_child(root, arguments)
        ended = part(found, product) == part(complete, product)
        assert code == 0 or (ended and code == 2 and ("exists" in messages or "--force" in messages)), (
            f"{where}: {messages}"
        )
        after = state(root)
        assert not [name for name in after if is_temporary(name)], where
        # A picture that the killed run had finished stays, and the next run's has a number.
        new = {name: data for name, data in after.items() if not name.endswith("-2.png") and not varies(name)}
        assert new.items() <= complete.items(), where
        if code == 0:
            assert new.keys() == {name for name in complete if not varies(name)}, where
    assert kills > 5
    counts = {"steps": steps, "kills": kills, "states": len(seen), "with leftovers": temporary}
    print(json.dumps({"command": arguments[:2], **counts}))


def test_domains_add(tmp_path, begin, world):
    kill_everywhere(tmp_path, begin, ["domains", "add", str(world.pack)], f"{DOMAINS}/my_faces")


def test_domains_add_force(tmp_path, begin, world):
    def prepare(work):
        shutil.copytree(world.pack, user_domains_folder() / "my_faces")
        manifest = user_domains_folder() / "my_faces" / "domain.toml"
        manifest.write_text(manifest.read_text().replace('licence = ""', 'licence = "old"'))

    kill_everywhere(
        tmp_path, begin, ["domains", "add", str(world.pack), "--force"], f"{DOMAINS}/my_faces", prepare=prepare
    )


def test_domains_new(tmp_path, begin, world):
    kill_everywhere(
        tmp_path, begin, ["domains", "new", "my_dogs", "--pack", str(world.pack)], "work/e4t-domain-my-dogs"
    )


def test_personalize_save(tmp_path, begin, world):
    arguments = world.personalize("--save", "me.e4t", "--seed", "1", "--steps", "1", "--grid")
    kill_everywhere(tmp_path, begin, arguments, "work/me.e4t")


def add_concept(world):
    concept = e4t_cli.personalize(world.pack, world.photo, base=world.base, tune_steps=1, seed=4).concept

    def prepare(work):
        shutil.copytree(world.pack, user_domains_folder() / "my_faces")
        concept.save(work / "me.e4t")

    return prepare


@pytest.mark.parametrize("target", ["my-model", "me-lora.safetensors"])
def test_export(tmp_path, begin, world, target):
    more = ["--lora", "4"] if target.endswith("safetensors") else []
    arguments = ["export", "me.e4t", target, "--base", str(world.base), *more]
    kill_everywhere(tmp_path, begin, arguments, f"work/{target}", prepare=add_concept(world))


def test_export_force(tmp_path, begin, world):
    add = add_concept(world)

    def prepare(work):
        add(work)
        assert app.run(["export", "me.e4t", "my-model", "--base", str(world.base), "--dtype", "fp32"]) == 0

    arguments = ["export", "me.e4t", "my-model", "--base", str(world.base), "--force"]
    kill_everywhere(tmp_path, begin, arguments, "work/my-model", prepare=prepare)


def drawings(work):
    (work / "dogs").mkdir()
    for index in range(4):
        drawn_face(index, 64)[0].save(work / "dogs" / f"{index:02}.png")
    (work / "dogs" / "99.png").write_bytes(b"no picture")


@pytest.mark.parametrize("force", [False, True])
def test_pretrain(tmp_path, begin, world, force):
    arguments = [
        "pretrain", "--domain", "my_dogs", "--data", "dogs", "--base", str(world.base), "--steps", "3", "--batch", "2",
        "--checkpoint-every", "1", "--cache", "off", "--sample-every", "3",
    ]  # fmt: skip

    def prepare(work):
        drawings(work)
        if force:
            assert app.run([*arguments[:-1], "--seed", "5"]) == 0

    if force:
        arguments = [*arguments, "--force"]
    kill_everywhere(tmp_path, begin, arguments, f"{DOMAINS}/my_dogs", prepare=prepare)


@pytest.mark.parametrize("save", [False, True])
def test_import(tmp_path, begin, world, model, monkeypatch, save):
    from tests.e4t_diffusion import checkpoints

    configs = checkpoints.write_open_clip_config(tmp_path / "model_configs")
    monkeypatch.setattr(conversions, "configs_folder", lambda: configs)
    widths, projections = sum(feature_widths(model.unet)), projection_shapes(model.unet)
    encoder = checkpoints.encoder_state(widths, model.text_encoder.config.hidden_size)
    theirs = checkpoints.write_checkpoint(tmp_path / "theirs", encoder, checkpoints.offsets_state(projections))
    arguments = ["import", "e4t-diffusion", str(theirs), "--name", "people", "--base", str(world.base)]
    if save:
        unet = {**model.unet.state_dict(), **torch.load(theirs / "weight_offsets.pt", weights_only=True)}
        torch.save(unet, theirs / "unet.pt")
        drawn_face(1, 96)[0].save(theirs / "domain.png")
        arguments += ["--save", "me.e4t"]
    kill_everywhere(tmp_path, begin, arguments, "work/me.e4t" if save else f"{DOMAINS}/people")
