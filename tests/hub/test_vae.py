"""`--vae OWNER/NAME[@REVISION]`: a VAE of the hub, recorded with its commit and found again."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from e4t_cli.cli import app
from e4t_cli.errors import E4TError, IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.formats.concept import Concept
from e4t_cli.hub.addons import Addon, BaseAddons
from e4t_cli.hub.bases import find_base
from e4t_cli.hub.paths import HubAccess, hub_cache
from e4t_cli.hub.vae import fetch_addons, fetch_vae, wanted_source
from e4t_cli.images.png_metadata import read_metadata

MINI = find_base("mini").folder / "vae"


def write_vae(folder, shift=0.2):
    """Write `mini`'s VAE with brighter images."""
    shutil.copytree(MINI, folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] + shift
    os.unlink(file)
    save_file(tensors, file)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    (folder / "code.py").write_text("raise SystemExit('never')")
    return folder


@pytest.fixture
def soft(hub, tmp_path):
    """ "owner/soft-vae", its files at the top."""
    return hub.add("owner/soft-vae", write_vae(tmp_path / "repositories" / "soft"))


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command line in this process; returns its code, what it printed, and stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("E4T_OFFLINE", raising=False)
    Image.new("RGB", (64, 64), (200, 120, 60)).save("photo.png")

    def run(*arguments):
        capfd.readouterr()
        code = app.run([str(one) for one in arguments])
        for name in ("E4T_OFFLINE", "HF_HUB_OFFLINE"):  # as `--offline` leaves them
            os.environ.pop(name, None)
        return code, *capfd.readouterr()

    return run


PERSONALIZE = (
    "personalize",
    "cat",
    "photo.png",
    "S* on the beach",
    "--base",
    "mini",
    "--tune-steps",
    "1",
    "--steps",
    "1",
)
PERSONALIZE = (*PERSONALIZE, "--seed", "1")


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


# ── one picture, and the same again ──


def test_a_concept_and_its_pictures_find_the_same_revision_again(hub, soft, run, tmp_path):
    code, out, err = run(*PERSONALIZE, "--vae", "owner/soft-vae", "--save", "me.e4t", "-o", "one.png")
    assert code == 0, err
    assert "apache-2.0" in err and not list(hub_cache().rglob("*.bin")) and not list(hub_cache().rglob("*.py"))
    (vae,) = read_metadata(Path("one.png").read_bytes()).details["addons"]
    assert vae["source"] == f"owner/soft-vae@{soft}" and vae["name"] == "soft-vae"
    assert [one.source for one in Concept.load("me.e4t").addons] == [f"owner/soft-vae@{soft}"]
    assert "VAE: soft-vae" in read_metadata(Path("one.png").read_bytes()).parameters
    plain = run(*PERSONALIZE, "-o", "plain.png")
    assert plain[0] == 0 and pixels("plain.png") != pixels("one.png")

    # The branch moves on: neither command follows it.
    hub.add("owner/soft-vae", write_vae(tmp_path / "repositories" / "softer", shift=-0.3))
    assert run("cache", "rm", "owner/soft-vae", "-y")[0] == 0
    for number, given in enumerate(([], ["--vae", "owner/soft-vae"], ["--vae", f"owner/soft-vae@{soft}"])):
        for how in (["--like", "one.png"], ["S* on the beach", "--steps", "1", "--seed", "1"]):
            target = f"{number}{len(how)}.png"
            code, _, err = run("generate", "me.e4t", *how, *given, "-o", target)
            assert code == 0, err
            assert pixels(target) == pixels("one.png") and "another picture" not in err
    # A file with the same bytes is the same VAE.
    file = next((tmp_path / "repositories" / "soft").glob("*.safetensors"))
    code, _, err = run("generate", "me.e4t", "--like", "one.png", "--vae", file, "-o", "file.png")
    assert code == 0 and pixels("file.png") == pixels("one.png"), err
    assert "another concept" not in run("generate", "me.e4t", "--like", "file.png", "-o", "b.png")[2]
    # Another one is refused, and the hint gives the right one.
    code, _, err = run("generate", "me.e4t", "S* at sea", "--vae", MINI)
    assert code == 5 and f"add --vae owner/soft-vae@{soft}" in err
    # Exports need no --vae either.
    code, _, err = run("export", "me.e4t", "model", "--offline")
    assert code == 0, err
    exported = load_file("model/vae/diffusion_pytorch_model.safetensors")
    original = load_file(MINI / "diffusion_pytorch_model.safetensors")
    change = exported["decoder.conv_out.bias"].float() - original["decoder.conv_out.bias"].float()
    assert change.min() > 0.1


def test_without_a_network(hub, soft, run):
    wanted = [*PERSONALIZE, "--vae", "owner/soft-vae", "-o", "a.png", "--offline"]
    for dry in ([], ["--dry-run"]):
        code, out, err = run(*wanted, *dry)
        assert (code, out) == (4, "") and "the VAE owner/soft-vae is not on this machine, and e4t is offline" in err
        assert "e4t fetch owner/soft-vae" in err
    code, out, err = run("fetch", "owner/soft-vae", "--json")
    assert code == 0 and json.loads(out)["type"] == "vae" and json.loads(out)["revision"] == soft
    requests = len(hub.requests)
    assert run(*wanted, "--save", "me.e4t")[0] == 0
    assert run("generate", "me.e4t", "S* at sea", "--steps", "1", "--offline", "-o", "b.png")[0] == 0
    assert len(hub.requests) == requests
    assert "owner/soft-vae" in run("cache", "ls")[1]
    assert run("cache", "rm", "owner/soft-vae", "-y")[0] == 0
    code, _, err = run("generate", "me.e4t", "S* at sea", "--steps", "1", "--offline", "-o", "c.png")
    assert code == 4 and f"e4t fetch owner/soft-vae@{soft}" in err


def test_a_plan_fetches_nothing(hub, soft, run):
    code, out, err = run(*PERSONALIZE, "--vae", "owner/soft-vae", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["to_fetch"] == "the VAE owner/soft-vae", err
    assert json.loads(out)["download_bytes"] is None and hub.requests == []
    assert run(*PERSONALIZE, "--vae", "owner/soft-vae", "--save", "me.e4t", "-o", "a.png")[0] == 0
    plan = run(*PERSONALIZE, "--vae", "owner/soft-vae", "--dry-run", "--json")
    assert json.loads(plan[1])["to_fetch"] == ""
    assert run("cache", "rm", "owner/soft-vae", "-y")[0] == 0
    plan = run("generate", "me.e4t", "S* at sea", "--dry-run", "--json")
    assert plan[0] == 0 and json.loads(plan[1])["to_fetch"] == f"the VAE owner/soft-vae@{soft}", plan[2]
    assert not list(hub_cache().rglob("*.safetensors"))


def test_damage_is_found_and_repaired(hub, soft, run):
    folder = fetch_vae("owner/soft-vae", HubAccess())
    weights = (folder / "diffusion_pytorch_model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    code, _, err = run(*PERSONALIZE, "--vae", "owner/soft-vae", "-o", "a.png")
    assert code == 5 and "is damaged" in err and "e4t fetch owner/soft-vae" in err
    assert run("fetch", "owner/soft-vae")[0] == 0
    assert run(*PERSONALIZE, "--vae", "owner/soft-vae", "-o", "a.png")[0] == 0


# ── what is wanted, and where it is ──


def test_in_the_folder_vae_of_a_whole_model(hub, tmp_path):
    folder = tmp_path / "whole"
    write_vae(folder / "vae")
    (folder / "unet").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    commit = hub.add("owner/whole", folder)
    found = fetch_addons(BaseAddons.parse(vae="owner/whole@main"), HubAccess())
    assert found.vae_source == f"owner/whole@{commit}" and not (found.vae / "unet").exists()
    (addon,) = found.check()
    assert addon.name == "whole" and Addon.from_dict(addon.as_dict()) == addon


def test_what_exists_or_is_called_like_a_file_is_never_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_vae(tmp_path / "owner" / "vae")
    for given in ("owner/vae", "./owner/none", "/owner/none", "a/b/c", "vae", "owner/x.safetensors", "owner/x.ckpt"):
        assert BaseAddons.parse(vae=given).vae_source == "", given
    assert BaseAddons.parse(vae="owner/vae").check()[0].source == ""
    for given in ("owner/none", "owner/none@main", "owner/none@refs/pr/3", f"a/b@{'0' * 40}"):
        found = BaseAddons.parse(vae=given)
        assert (found.vae, found.vae_source, bool(found)) == (None, given, True)
        with pytest.raises(UsageError, match="was not fetched"):
            found.check()
    assert BaseAddons.parse(vae="owner/none@../x").vae_source == ""


def test_a_concept_decides_on_the_revision_that_is_not_given():
    recorded = [Addon(kind="vae", name="b", sha256="0", source="a/b@1"), Addon(kind="lora", name="x", sha256="1")]
    assert wanted_source(BaseAddons(), recorded) == wanted_source(BaseAddons.parse(vae="a/b"), recorded) == "a/b@1"
    for given in ("a/b@2", "a/c"):
        assert wanted_source(BaseAddons.parse(vae=given), recorded) == given
    assert wanted_source(BaseAddons(), recorded[1:]) == wanted_source(BaseAddons.parse(vae="x.pt"), recorded) == ""


# ── what is wrong, in one sentence ──


def published(hub, folder, change, **settings):
    write_vae(folder)
    change(folder)
    hub.add("owner/wrong", folder, **settings)


def configured(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def only_pickles(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def another_layout(folder):
    (folder / "diffusion_pytorch_model.bin").unlink()
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "pruned.safetensors")


WRONG = {
    "only pickles": (only_pickles, {}, IntegrityError, "owner/wrong has its VAE as a pickle only"),
    "one file": (another_layout, {}, IntegrityError, "no VAE in diffusers' layout"),
    "no config": (lambda folder: (folder / "config.json").unlink(), {}, IntegrityError, "owner/wrong has"),
    "another model": (configured(_class_name="ControlNetModel"), {}, IntegrityError, "but a ControlNetModel"),
    "other latents": (configured(latent_channels=16), {}, IntegrityError, "latents of 16 channels"),
    "absurd sizes": (configured(block_out_channels=[10**9]), {}, IntegrityError, "block_out_channels"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), {}, IntegrityError, "config of owner/wrong"),
    "gated": (lambda folder: None, {"gated": True}, WeightsUnavailable, "accepted its terms"),
    "a licence": (lambda folder: None, {"licence": "cc-by-nc-4.0"}, WeightsUnavailable, "has not been accepted"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_repositories_are_refused_before_their_weights(hub, tmp_path, run, kind):
    change, settings, error, words = WRONG[kind]
    published(hub, tmp_path / "wrong", change, **settings)
    with pytest.raises(error, match=words) as raised:
        fetch_addons(BaseAddons.parse(vae="owner/wrong"), HubAccess())
    assert "\n" not in raised.value.message and raised.value.hint
    assert not list(hub_cache().rglob("*.safetensors"))
    code, out, err = run(*PERSONALIZE, "--vae", "owner/wrong", "--save", "me.e4t")
    assert (code, out) == (error.exit_code, "") and words in err and "Traceback" not in err
    assert not os.path.exists("me.e4t")


def test_what_there_is_not(hub, soft):
    for source, words in (("owner/none", "no repository owner/none"), ("owner/soft-vae@none", "no revision 'none'")):
        with pytest.raises(WeightsUnavailable, match=words):
            fetch_vae(source, HubAccess())
    with pytest.raises(E4TError, match="cannot be a repository"):
        fetch_vae("owner/a..b", HubAccess())


def test_other_files_are_checked_before_a_vae_is_fetched(hub, soft):
    with pytest.raises(UsageError, match=r"no file missing\.safetensors"):
        fetch_addons(BaseAddons.parse(vae="owner/soft-vae", loras=["missing.safetensors"]), HubAccess())
    assert hub.requests == []


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("--lora", "owner/style"), ("--lora", "owner/style:0.5"), ("--lora", "owner/style:ink.safetensors"),
        ("--embedding", "owner/words"), ("--embedding", "owner/words:toy.safetensors"),
    ],
)  # fmt: skip
def test_loras_and_embeddings_of_the_hub_are_told_how_to_get(hub, run, option, given):
    code, out, err = run(*PERSONALIZE, option, given)
    assert (code, out) == (2, "") and hub.requests == []
    assert f"hf download {given.partition(':')[0]} " in err and f"then {option} " in err
