"""Bases and domain weights by name: resolution, which files are fetched, and when licences are confirmed."""

import json
import shutil
from pathlib import Path

import pytest

from e4t_cli.api import resolve
from e4t_cli.errors import IntegrityError, ResourceError, UsageError, WeightsUnavailable
from e4t_cli.hub import download
from e4t_cli.hub import image_tower as towers
from e4t_cli.hub.bases import (
    PUBLISHED,
    HubLocation,
    domain_weights_location,
    find_base,
    hub_location,
    hub_weights_folder,
)
from e4t_cli.hub.download import fetch_files
from e4t_cli.hub.paths import HubAccess, hub_cache, user_cache
from e4t_cli.hub.repo_info import get_repo_info
from e4t_cli.hub.resolve import fetch_base, fetch_domain_weights, is_cached, look_up_base
from tests.hub.fake_hub import Fault
from tests.hub.repositories import publish_stable_diffusion, write_files

YES = HubAccess(accept_license=True)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The files of a tiny Stable Diffusion, made once."""
    from tests.hub.fake_hub import FakeHub

    folder = tmp_path_factory.mktemp("sd") / "tiny"
    with FakeHub() as hub:
        publish_stable_diffusion(hub, folder)
    return folder


@pytest.fixture
def tiny(hub, made):
    return hub.add("owner/tiny", made)


def fetched(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("half", [False, True])
def test_a_base_by_its_id_is_what_it_needs_and_no_more(hub, tiny, half):
    base = fetch_base("owner/tiny", YES, half=half)
    assert (base.name, base.revision, base.resolution) == ("tiny", tiny, 32)
    assert base.identity == f"owner/tiny@{tiny}" and base.tower is None
    names = fetched(base.folder)
    variant = ".fp16" if half else ""
    assert {name for name in names if name.endswith(".safetensors")} == {
        f"unet/diffusion_pytorch_model{variant}.safetensors",
        f"vae/diffusion_pytorch_model{variant}.safetensors",
        f"text_encoder/model{variant}.safetensors",
        "image_tower/model.safetensors",
    }
    assert not [name for name in names if name.endswith((".py", ".bin", ".ckpt"))]
    assert is_cached("owner/tiny", half=half) and look_up_base("owner/tiny", half=half)[2]
    requests_before = len(hub.requests)
    hub.faults.append(Fault("hang"))
    assert fetch_base("owner/tiny", HubAccess(), half=half) == base
    assert fetch_base("tiny", HubAccess(), half=half).folder == base.folder, "by the name it has here"
    assert len(hub.requests) == requests_before


def test_the_same_base_in_either_precision_is_one_base(hub, tiny):
    import torch

    from e4t_cli.models.text_to_image import TextToImageModel

    half = TextToImageModel.load(fetch_base("owner/tiny", YES, half=True))
    full = TextToImageModel.load(fetch_base("owner/tiny", YES))
    again = TextToImageModel.load(fetch_base("owner/tiny", YES, half=True))
    assert full.fingerprint == half.fingerprint
    assert half.unet.dtype == torch.float32
    weight, other = full.unet.conv_in.weight, half.unet.conv_in.weight
    assert not torch.equal(weight, other) and torch.equal(weight.half().float(), other)
    assert torch.equal(again.unet.conv_in.weight, other), "of two files, the one asked for"


def test_a_base_by_its_folder_stays_as_it_was(made, hub):
    base = fetch_base(made, HubAccess())
    assert base.name == "tiny" and base.identity == "" and not hub.requests
    assert fetch_base("mini", HubAccess()) == find_base("mini")


def test_names_of_the_table_are_pinned():
    assert set(PUBLISHED) == {"sd14", "sd15", "sd21-base", "sd21"}
    for name, row in PUBLISHED.items():
        address = hub_location(name)
        assert address.repository == row.repository and address.revision == row.revision
        assert hub_location(row.repository) == address == hub_location(f"{row.repository}@{row.revision}")
        assert len(row.revision) == 40 and row.licence


def test_a_repository_cannot_take_a_name_of_the_table():
    """Domain weights are chosen by that name."""
    for repository in ("sd21/base", "SD21/Base", "sd21.base/x"):
        assert hub_location(repository).name not in PUBLISHED
    assert hub_location("sd21/base").name == "hub-sd21-base"


@pytest.mark.parametrize("name", ["./x", "/x", "~/x", "mini", "auto", "nobody", "a/b/c", "a\\b", ""])
def test_what_does_not_mean_the_hub(hub, name):
    assert hub_location(name) is None


def test_a_published_base_is_asked_about_once(hub, made, monkeypatch):
    row = HubLocation(
        name="sd14", repository="CompVis/sd", revision="a" * 40, licence="creativeml-openrail-m",
        resolution=32,
    )  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "sd14", row)
    hub.add(row.repository, made, commit=row.revision, licence="creativeml-openrail-m")
    with pytest.raises(WeightsUnavailable, match="has not been accepted") as caught:
        fetch_base("sd14", HubAccess())
    assert "--accept-license" in caught.value.hint
    assert not hub.count("GET", "*.safetensors")

    questions = []
    asking = HubAccess(accept_license=lambda question: bool(questions.append(question) or True))
    base = fetch_base("sd14", asking)
    assert (base.name, base.resolution, base.licence) == ("sd14", 32, "creativeml-openrail-m")
    assert len(questions) == 1 and "creativeml-openrail-m" in questions[0]
    shutil.rmtree(hub_cache())
    assert fetch_base("sd14", HubAccess()).folder == base.folder, "it was accepted once"


@pytest.mark.parametrize("licence", ["", "cc-by-nc-4.0", "openrail++"])
def test_a_licence_that_is_unstated_or_restricts_is_asked_about(hub, made, licence):
    hub.add("owner/tiny", made, licence=licence)
    with pytest.raises(WeightsUnavailable, match="has not been accepted"):
        fetch_base("owner/tiny", HubAccess(accept_license=lambda question: False))
    assert fetch_base("owner/tiny", YES)


def test_a_free_licence_is_printed_and_not_asked_about(hub, tiny):
    remarks = []
    access = HubAccess(on_progress=lambda event: remarks.append(event.remark))
    fetch_base("owner/tiny", access)
    assert any("is under apache-2.0" in remark for remark in remarks)


def test_offline_and_not_here(hub, tiny, monkeypatch):
    monkeypatch.setenv("E4T_OFFLINE", "1")
    with pytest.raises(WeightsUnavailable, match="not on this machine, and e4t is offline") as caught:
        fetch_base("sd15", HubAccess())
    assert caught.value.hint == "with a network: e4t fetch sd15"
    assert not hub.requests


def test_D13_offline_neither_connects_nor_asks(hub, tiny, made, tmp_path, monkeypatch):
    """Whatever is half here: no socket, no question about a licence, one error message."""
    import socket

    restricted = hub.add("owner/restricted", made, licence="cc-by-nc-4.0")
    fetch_files("owner/restricted", restricted, ["unet/config.json", "*.json"])
    shutil.rmtree(hub_cache() / "models--owner--restricted")
    weights = hub.add("owner/weights", write_files(tmp_path / "weights", domain_toml=b"schema = 1"))

    def refuse(*_, **__):
        raise AssertionError("a socket was opened, or a question asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    requests_before = len(hub.requests)
    offline = HubAccess(offline=True, accept_license=refuse)
    for repair in (False, True):
        for name in ("sd14", "owner/tiny", "owner/restricted", f"owner/restricted@{restricted}"):
            with pytest.raises(WeightsUnavailable, match="offline"):
                fetch_base(name, offline, repair=repair)
        with pytest.raises(WeightsUnavailable, match="offline"):
            fetch_domain_weights(f"hub:owner/weights@{weights}", offline, repair=repair)
    with pytest.raises(WeightsUnavailable, match="offline"):
        towers.fetch_image_tower(offline)
    with pytest.raises(WeightsUnavailable, match="offline"):
        fetch_files("owner/restricted", None, ["*.json"], offline, repair=True)
    assert get_repo_info("owner/tiny", None, offline) is None
    monkeypatch.setattr(resolve, "likely_accelerator", lambda device: True)
    assert resolve.default_base_name(offline)[0] == "mini"
    assert len(hub.requests) == requests_before


@pytest.fixture
def with_checker(hub, made, tmp_path):
    """A base with a safety checker."""
    folder = shutil.copytree(made, tmp_path / "checked")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"checker")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    hub.add("owner/checked", folder)


def test_the_safety_checker_comes_with_the_base(hub, with_checker):
    base = fetch_base("owner/checked", YES, safety=False)
    assert not (base.folder / "safety_checker/model.safetensors").exists()
    notes = []
    telling = HubAccess(accept_license=True, on_progress=lambda event: notes.append(event.note))
    # Without a network it goes on, and reports it.
    hub.faults.append(Fault("status", status=503))
    assert fetch_base("owner/checked", telling) == base
    assert any("in trouble (503)" in note and "going on with" in note for note in notes)
    assert any("safety checker of owner-checked is not here" in note for note in notes)
    hub.faults.clear()
    notes.clear()
    found = fetch_base("owner/checked", telling)
    assert (found.folder / "safety_checker/model.safetensors").is_file() and not any(notes)


def test_a_damaged_base_is_noticed_and_repaired_by_fetch(hub, tiny, tmp_path):
    import os

    base = fetch_base("owner/tiny", YES)
    blob = (base.folder / "unet/diffusion_pytorch_model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    os.utime(blob, (1, 1))
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        fetch_base("owner/tiny", YES)
    assert caught.value.hint == "fetch it again: e4t fetch owner/tiny"
    assert fetch_base("owner/tiny", YES, repair=True) == base
    assert fetch_base("owner/tiny", YES) == base


def test_what_another_program_fetched_is_used_and_checked(hub, tiny):
    """As an existing Stable Diffusion of the user's, of which no checksums are cached here."""
    fetch_base("owner/tiny", YES)
    shutil.rmtree(user_cache())
    assert fetch_base(f"owner/tiny@{tiny}", HubAccess(offline=True)).revision == tiny
    weights = next(hub_cache().rglob("snapshots/*/vae/*.safetensors"))
    weights.resolve().write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="is damaged"):
        fetch_base(f"owner/tiny@{tiny}", HubAccess(offline=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"in_channels": 9}, "for inpainting"),
        ({"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ({"_class_name": "SD3Transformer2DModel"}, "a SD3Transformer2DModel"),
    ],
)
def test_a_model_of_another_kind_costs_no_gigabytes(hub, made, tmp_path, change, expected):
    folder = shutil.copytree(made, tmp_path / "other")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    hub.add("owner/other", folder)
    with pytest.raises(IntegrityError, match=expected):
        fetch_base("owner/other", YES)
    assert not hub.count("GET", "*.safetensors")
    with pytest.raises(IntegrityError, match=expected):
        fetch_base(folder, HubAccess())


def test_pickles_are_not_fetched(hub, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "other")
    for path in folder.glob("unet/*.safetensors"):
        path.unlink()
    hub.add("owner/other", folder)
    with pytest.raises(IntegrityError, match="no safetensors for its unet, and pickles are refused"):
        fetch_base("owner/other", YES)


def test_shards_are_fetched_with_their_index(hub, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "other")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    from e4t_cli.hub.bases import weight_files
    from e4t_cli.hub.resolve import is_complete

    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    parts = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part in parts:
        shutil.copy(whole, folder / "unet" / part)
    whole.unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    names = fetched(folder)
    found = weight_files(names, "unet", half=True)
    assert found[0].endswith(".index.json") and set(found[1:]) == {f"unet/{part}" for part in parts}
    assert is_complete(folder, half=False, safety=False)
    (folder / "unet" / parts[1]).unlink()
    assert not is_complete(folder, half=False, safety=False)


# ── the image tower ──


@pytest.fixture
def small_tower(hub, made, tmp_path, monkeypatch):
    """A published CLIP with both towers, small."""
    import torch
    from safetensors.torch import load_file, save_file

    eye = load_file(made / "image_tower" / "model.safetensors")
    both = {f"visual.{key}": value for key, value in eye.items()}
    both["transformer.weight"] = torch.ones(3)
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file(both, folder / "open_clip_model.safetensors")
    commit = hub.add("laion/small", folder, licence="mit")
    config = json.loads((made / "image_tower" / "open_clip_config.json").read_text())
    file = hub.repositories["laion/small"]["main"].files["open_clip_model.safetensors"]
    tower = towers.PublishedTower(
        name="small", repository="laion/small", revision=commit, licence="mit",
        file="open_clip_model.safetensors", sha256=file.sha256, size=file.size, config=config,
    )  # fmt: skip
    monkeypatch.setattr(towers.fetch_image_tower, "__defaults__", (tower,))
    for function in (towers.has_tower, towers.tower_folder, towers.missing_bytes):
        monkeypatch.setattr(function, "__defaults__", (tower,))
    return tower


def test_the_tower_is_kept_slim(hub, made, small_tower, tmp_path):
    import torch
    from safetensors.torch import load_file

    from e4t_cli.models.text_to_image import TextToImageModel

    folder = shutil.copytree(made, tmp_path / "plain")
    shutil.rmtree(folder / "image_tower")
    hub.add("owner/plain", folder)
    base = fetch_base("owner/plain", YES)
    assert base.tower == user_cache() / "towers" / "small"
    kept = load_file(base.tower / "model.safetensors")
    eye = load_file(made / "image_tower" / "model.safetensors")
    assert kept.keys() == eye.keys()
    assert all(torch.equal(kept[key], eye[key].half()) for key in eye)
    model = TextToImageModel.load(base)
    pixels = torch.zeros(1, 3, 32, 32)
    assert model.image_features(pixels).isfinite().all()
    # The published file can go; the slim copy is enough.
    shutil.rmtree(hub_cache() / "models--laion--small")
    requests_before = len(hub.requests)
    assert fetch_base("owner/plain", HubAccess()) == base and len(hub.requests) == requests_before
    # A folder of the user's without a tower takes the same one.
    assert fetch_base(folder, HubAccess()).tower == base.tower


def test_another_file_in_place_of_the_tower_is_refused(hub, small_tower, monkeypatch):
    from dataclasses import replace

    other = replace(small_tower, sha256="0" * 64)
    with pytest.raises(IntegrityError, match="is not the file that e4t knows"):
        towers.fetch_image_tower(YES, other)
    assert not towers.has_tower()


def test_the_published_tower_is_the_pinned_one():
    tower = towers.VIT_H_14
    assert tower.sha256 == "0084e75319a50ad85ef45377bad5bc38f2f58824459eb690048d51c9f8863be5"
    assert tower.size == 3_944_517_836
    import open_clip

    vision = open_clip.get_model_config("ViT-H-14")
    assert tower.config["model_cfg"]["embed_dim"] == vision["embed_dim"]
    assert tower.config["model_cfg"]["vision_cfg"] == vision["vision_cfg"]
    assert tuple(tower.config["preprocess_cfg"]["mean"]) == open_clip.OPENAI_DATASET_MEAN
    assert tuple(tower.config["preprocess_cfg"]["std"]) == open_clip.OPENAI_DATASET_STD


def test_room_for_the_tower_is_counted_before_the_base_is_fetched(hub, made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "plain")
    shutil.rmtree(folder / "image_tower")
    hub.add("owner/plain", folder)
    monkeypatch.setattr(download, "free_bytes", lambda _: 1_000_000_000)
    with pytest.raises(ResourceError, match="3.9 GB for laion"):
        fetch_base("owner/plain", YES)
    assert not hub.count("GET", "*.safetensors")


# ── domain weights ──


def test_domain_weights_of_the_hub(hub, tmp_path):
    folder = write_files(tmp_path / "pack", domain_toml=b"schema = 1", encoder_safetensors=b"x" * 9, run_py=b"1")
    commit = hub.add("owner/pack", folder, licence="")
    location = f"hub:owner/pack@{commit}"
    assert hub_weights_folder(location) is None
    with pytest.raises(WeightsUnavailable, match="has not been accepted"):
        fetch_domain_weights(location, HubAccess())
    found = fetch_domain_weights(location, YES)
    assert fetched(found) == {"domain.toml", "encoder.safetensors"}
    assert hub_weights_folder(location) == found == fetch_domain_weights(location, HubAccess(offline=True))


@pytest.mark.parametrize("location", ["hub:owner/pack@main", "hub:owner/pack", "hub:../x@" + "a" * 40])
def test_domain_weights_need_a_commit(location):
    with pytest.raises(IntegrityError, match="no location of domain weights"):
        domain_weights_location(location)
    assert hub_weights_folder(location) is None


def test_a_folder_of_that_name_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert hub_location("owner/tiny") is None
    with pytest.raises(UsageError, match="there is no folder"):
        find_base("a/b/c")
