"""Importing checkpoints of e4t-diffusion: conversion, refusal of unsafe or wrong files, generation."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import e4t_cli
from e4t_cli.api.importing import import_checkpoint, import_concept
from e4t_cli.cli.app import run
from e4t_cli.errors import E4TError, IntegrityError, ResourceError, UsageError
from e4t_cli.files import sha256_of
from e4t_cli.formats.concept import Concept
from e4t_cli.formats.e4t_diffusion import checkpoint as checkpoint_module
from e4t_cli.formats.e4t_diffusion.__main__ import read_pickled_tensors
from e4t_cli.formats.e4t_diffusion.checkpoint import (
    ConversionRequest,
    clean_environment,
    convert,
    read_checkpoint,
)
from e4t_cli.formats.e4t_diffusion.conversion import convert_to_domain_folder, split_networks
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.registry.discovery import user_domains_folder
from tests.conftest import drawn_face
from tests.e4t_diffusion import checkpoints

SOURCE = Path(e4t_cli.__file__).parent


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def conversion(checkpoint):
    from e4t_cli.api.importing import conversion_request

    return conversion_request(read_checkpoint(checkpoint), None, "face", "tiny")


def refused(path, match, sha256=""):
    with pytest.raises(IntegrityError, match=match) as caught:
        read_pickled_tensors(path, sha256)
    assert caught.value.exit_code == 5
    assert "weights_only" not in str(caught.value)  # torch's own advice is the wrong one
    return caught.value


# ── the one place that reads a pickle ──


def test_pickles_are_read_in_one_place():
    loads = ("torch.load(", "pickle.load", "Unpickler", "import pickle", "joblib", "numpy.load")
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in loads)
    }
    assert found == {"formats/e4t_diffusion/__main__.py"}
    text = (SOURCE / "formats" / "e4t_diffusion" / "__main__.py").read_text(encoding="utf-8")
    assert text.count("torch.load(") == 1
    assert 'map_location="cpu", weights_only=True, mmap=True)' in text


def test_nothing_imports_the_process_that_reads():
    importers = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if any(
            re.match(r"\s*(from|import) .*(__main__|read_pickled_tensors)", line)
            for line in path.read_text(encoding="utf-8").splitlines()
        )
    }
    assert importers == set()


def test_F1_a_pickle_with_code_is_not_run(tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "zip.pt")
    error = refused(tmp_path / "zip.pt", "more than tensors")
    assert "io.open" in str(error)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused(tmp_path / "raw.pt", r"not a file of torch\.save")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", r"not a file of torch\.save")
    assert not (tmp_path / "ran").exists()
    # The same bytes do run code when they are loaded without the restriction.
    torch.load(tmp_path / "zip.pt", weights_only=False)["a"].close()
    assert (tmp_path / "ran").exists()


def test_F3_truncated_and_foreign_containers(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    for count in (0, 3, len(data) // 2, len(data) - 1):
        (tmp_path / "short.pt").write_bytes(data[:count])
        refused(tmp_path / "short.pt", "only a part")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10_000_000)
    refused(tmp_path / "bomb.pt", r"not one of torch\.save")
    with zipfile.ZipFile(tmp_path / "huge.pt", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("huge/data.pkl", b"\0" * 16_000_001)
    refused(tmp_path / "huge.pt", "a layout of")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(1)], "not a table"),
        ({}, "not a table"),
        ({"a": 1}, "not a tensor"),
        ({1: torch.ones(1)}, "not a tensor"),
        ({"a": torch.ones(3, dtype=torch.int64)}, "plain numbers"),
        ({"a": torch.ones(1).expand(10**12)}, "claims more numbers"),
        ({"a": torch.eye(3).to_sparse()}, "plain numbers"),
    ],
    ids=["list", "empty", "number", "key", "whole", "F7-endless", "sparse"],
)
def test_only_tables_of_tensors(tmp_path, content, match):
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", match)


def test_the_hash_comes_before_the_pickle(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    right = sha256_of(tmp_path / "a.pt")
    tensors, found = read_pickled_tensors(tmp_path / "a.pt", right)
    assert found == right
    assert torch.equal(tensors["a"], torch.ones(3))
    refused(tmp_path / "a.pt", f"is {right}, not {'0' * 64}", "0" * 64)


# ── what a checkpoint has to be ──


def message_for(conversion, tmp_path, encoder=None, weights=None):
    """Convert with some tensors replaced; None removes one."""

    def read(path, sha256):
        tensors, digest = read_pickled_tensors(path, sha256)
        changes = (encoder if path.name == "encoder.pt" else weights) or {}
        merged = {**tensors, **changes}
        return {key: value for key, value in merged.items() if value is not None}, digest

    target = tmp_path / "target"
    target.mkdir(exist_ok=True)
    with pytest.raises(IntegrityError) as caught:
        convert_to_domain_folder(conversion, target, read)
    assert not (target / "domain.toml").exists()
    return str(caught.value)


def test_F4_F5_F6_wrong_encoders(conversion, tmp_path, encoder):
    first = "first_linears.3.weight"
    assert f"lacks the tensor {first}" in message_for(conversion, tmp_path, {first: None})
    assert "unexpected tensor more" in message_for(conversion, tmp_path, {"more": torch.ones(1)})
    assert "has shape (2, 2), not (32, 32)" in message_for(conversion, tmp_path, {first: torch.ones(2, 2)})
    for key in (first, "clip_vision.conv1.weight", "final_linear.bias"):
        nan = encoder[key].clone()
        nan.flatten()[0] = float("nan")
        assert f"{key.removeprefix('clip_vision.')} has numbers that" in message_for(conversion, tmp_path, {key: nan})
    towerless = {key: None for key in encoder if key.startswith("clip_vision.")}
    assert "no image tower" in message_for(conversion, tmp_path, towerless)
    assert "lacks the tensor feature_linear" in message_for(conversion, tmp_path, {"feature_linear.weight": None})
    assert "no usable size" in message_for(conversion, tmp_path, {"final_linear.weight": torch.ones(())})


def test_F4_F5_F6_wrong_offsets(offsets):
    key = next(key for key in offsets if key.endswith("linear_row.weight"))
    nan = torch.full_like(offsets[key], float("inf"))
    for changes, match in (
        ({key: None}, r"lacks the tensor linear_row\.weight"),
        ({"unet.conv.weight": torch.ones(1)}, "unexpected tensor"),
        ({key: torch.ones(3, 3)}, r"has shape \(3, 3\)"),
        ({key: nan}, "not finite"),
        (dict.fromkeys(offsets), "no weight offsets"),
    ):
        changed = {k: v for k, v in {**offsets, **changes}.items() if v is not None}
        with pytest.raises(IntegrityError, match=match):
            split_networks(changed, "weight_offsets.pt")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ("[]", "no table"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (json.dumps(checkpoints.config(domain_embed_scale="a lot")), "domain_embed_scale"),
        (json.dumps(checkpoints.config(domain_embed_scale=-1)), "domain_embed_scale"),
        (json.dumps(checkpoints.config(domain_class_token=" ")), "domain_class_token"),
        (json.dumps({"pretrained_args": 3}), "pretrained_args"),
        ("{}", "domain_class_token"),
        (" " * 1_000_001, "larger"),
    ],
    ids=["list", "half", "deep", "scale", "negative", "word", "nested", "empty", "long"],
)
def test_F8_configs(checkpoint, settings, match):
    (checkpoint / "config.json").write_text(settings)
    with pytest.raises(IntegrityError, match=match):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "encoder.pt", "weight_offsets.pt"])
def test_half_a_folder(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("tower", ["RN50::openai", "../ViT-tiny", "hf-hub:a/b", "nothing"])
def test_unknown_towers(checkpoint, tower):
    (checkpoint / "config.json").write_text(json.dumps(checkpoints.config(clip_model_name_or_path=tower)))
    with pytest.raises(IntegrityError, match="no plain vision transformer"):
        import_checkpoint(checkpoint)


def test_unknown_bases_and_taken_names(checkpoint, base_folder):
    (checkpoint / "config.json").write_text(
        json.dumps(checkpoints.config(pretrained_model_name_or_path="/home/somebody/model"))
    )
    with pytest.raises(UsageError, match="is no known base"):
        import_checkpoint(checkpoint)
    (user_domains_folder() / "face").mkdir(parents=True)
    with pytest.raises(UsageError, match="there is a domain in"):
        import_checkpoint(checkpoint, base=base_folder)
    with pytest.raises(UsageError, match="name"):
        import_checkpoint(checkpoint, base=base_folder, name="../x")


def test_gone_repositories_lead_to_their_mirrors(checkpoint):
    from e4t_cli.api.importing import _base_name

    found = read_checkpoint(checkpoint)
    assert _base_name(found, "auto") == "sd14"
    gone = dataclasses.replace(found, base="runwayml/stable-diffusion-v1-5")
    assert _base_name(gone, "auto") == "sd15"


# ── the child process ──


def test_the_child_process_has_no_network_and_no_programs(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    code = """
import json, os, sys
from e4t_cli.formats.e4t_diffusion.__main__ import forbid_network_and_processes, leave_network
leave_network()
import torch, socket, subprocess, urllib.request
forbid_network_and_processes()
import _socket
def works(call):
    try:
        call()
    except PermissionError:
        return False
    except Exception:
        return True
    return True
print(json.dumps({
    "socket": works(lambda: socket.socket()),
    "connection": works(lambda: socket.create_connection(("127.0.0.1", 9))),
    "below": works(lambda: _socket.socket()),
    "name": works(lambda: _socket.getaddrinfo("localhost", 80)),
    "program": works(lambda: subprocess.run(["true"])),
    "shell": works(lambda: os.system("true")),
    "fork": works(lambda: os.fork()),
    "page": works(lambda: urllib.request.urlopen("http://127.0.0.1:9")),
    "secrets": any("secret" in value for value in os.environ.values()),
}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(json.loads(done.stdout).values()), done.stdout
    assert clean_environment()["PATH"] == os.environ["PATH"]


def test_a_hostile_checkpoint_through_the_command(checkpoint, base_folder, tmp_path, capfd):
    torch.save({"a": Evil(tmp_path / "ran")}, checkpoint / "weight_offsets.pt")
    code = run(["import", "e4t-diffusion", str(checkpoint), "--base", str(base_folder)])
    out, err = capfd.readouterr()
    assert code == 5
    assert out == ""
    assert "holds more than tensors" in err
    assert "Traceback" not in err
    assert not (tmp_path / "ran").exists()
    assert list(user_domains_folder().iterdir()) == []  # nothing half-made stays


def test_a_process_that_dies_is_explained(conversion, tmp_path, monkeypatch):
    for command, kind, match in (
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "memory"),
        ("import os; os.abort()", IntegrityError, "ended with code -6"),
        ("print('not json'); print('[1]')", IntegrityError, "ended with code 0"),
    ):
        fake = tmp_path / "python"
        fake.write_text(f"#!{sys.executable}\nimport sys\n{command}\n")
        fake.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module.sys, "executable", str(fake))
            with pytest.raises(kind, match=match):
                convert(conversion, tmp_path / "out" / "face")
    assert list((tmp_path / "out").iterdir()) == []


def test_D9_no_room(conversion, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ResourceError, match="are free on the disk"):
        convert(conversion, tmp_path / "out" / "face")


def test_requests_survive_serialization(conversion):
    assert ConversionRequest.from_json(conversion.to_json()) == conversion


# ── from the folder to images ──


def test_import_and_personalize(checkpoint, base_folder, tmp_path, capfd):
    """From end to end: the command, the child process, domain weights, tuning, a saved concept."""
    sha256 = sha256_of(checkpoint / "encoder.pt")
    code = run(["import", "e4t-diffusion", str(checkpoint), "--base", str(base_folder), "--name",
                "people"])  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    folder = user_domains_folder() / "people"
    assert out.strip() == str(folder)
    assert "largest error of a ΔW" in err
    assert {path.name for path in folder.iterdir()} == {
        "domain.toml", "encoder.safetensors", "offsets.safetensors", "tower.safetensors",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["people"]
    domain_weights = DomainWeights.load(folder)
    assert sha256 in domain_weights.notes
    assert domain_weights.base_name == "tiny"
    assert domain_weights.embedding_scale == 0.1
    assert domain_weights.tuning.mask  # the config of the installed domain with its descriptor

    # The tiny base reads 14 tokens, fewer than some prompt templates have.
    manifest = (folder / "domain.toml").read_text()
    start, end = manifest.index("templates = ["), manifest.index("]\n", manifest.index("templates = [")) + 2
    (folder / "domain.toml").write_text(manifest[:start] + 'templates = ["{}"]\n' + manifest[end:])
    photo = tmp_path / "photo.png"
    drawn_face(size=80)[0].save(photo)
    done = e4t_cli.personalize(
        "people", photo, "S* on the beach", base=base_folder, tune_steps=1, seed=3,
        sampling={"steps": 2}, device="cpu",
    )  # fmt: skip
    assert len(done.images) == 1
    done.concept.save(tmp_path / "me.e4t")
    again = e4t_cli.generate(
        tmp_path / "me.e4t", "S* on the beach", base=base_folder, seed=3, sampling={"steps": 2},
        device="cpu",
    )  # fmt: skip
    assert again.images[0].image.tobytes() == done.images[0].image.tobytes()


def tuned_state(model, offsets):
    """A unet.pt: every weight a little further, and the offsets among them."""
    source = torch.Generator().manual_seed(9)
    moved = {
        key: value + 0.01 * torch.randn(value.shape, generator=source)
        for key, value in model.unet.state_dict().items()
    }
    return {**moved, **offsets}


def test_a_tuned_checkpoint_becomes_a_concept(checkpoint, encoder, offsets, model, base_folder, tmp_path):
    """The concept generates with its U-Net, W·(1 + ΔW) merged, and its encoder."""
    state = tuned_state(model, offsets)
    settings = {"pretrained_model_name_or_path": "./theirs", "train_image_path": "me.png",
                "domain_embed_scale": 0.1, "pretrained_args": checkpoints.config()}  # fmt: skip
    folder = checkpoints.write_checkpoint(tmp_path / "tuned", encoder, state, settings, name="unet.pt")
    with pytest.raises(UsageError, match="the image it was tuned on"):
        import_concept(folder, tmp_path / "x.e4t", base=base_folder)
    drawn_face(size=80)[0].save(folder / "domain.png")
    with pytest.raises(UsageError, match=r"no unet\.pt"):
        import_concept(checkpoint, tmp_path / "x.e4t", base=base_folder)
    made = import_concept(folder, tmp_path / "me.e4t", name="somebody", base=base_folder, device="cpu")
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "domain.toml", "encoder.safetensors", "offsets.safetensors", "tower.safetensors",
    ]  # fmt: skip
    domain_weights = DomainWeights.load(made.folder)
    concept = Concept.load(tmp_path / "me.e4t")
    tuned = concept.tuned(model, domain_weights)
    for path in domain_weights.offsets:
        weight = state[f"{path}.weight"].double()
        dense = checkpoints.dense_offset(offsets, path.replace(".to_", ".wo_"))
        found = tuned.unet.get_submodule(path).weight.double()
        torch.testing.assert_close(found, weight * (1 + dense), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tuned.unet.conv_in.weight, state["conv_in.weight"], rtol=1e-3, atol=1e-4)
    means = torch.randn(1, domain_weights.encoder.config.unet_width)
    pixels = model.pixels([concept.prepared.image])
    expected = checkpoints.dense_encoder(encoder, pixels, means)
    e_c = tuned.embedding(means)
    torch.testing.assert_close(e_c, tuned.e_domain + 0.1 * expected, rtol=1e-3, atol=1e-3)
    generated = e4t_cli.generate(
        concept, "S* on the beach", base=base_folder, seed=3, sampling={"steps": 2}, device="cpu"
    )
    assert len(generated.images) == 1


def test_a_tuned_unet_of_another_model_is_refused(checkpoint, encoder, offsets, model, tmp_path):
    state = tuned_state(model, offsets)
    key = next(key for key in state if key.endswith("attn1.to_q.weight"))
    for change, match in (({key: torch.ones(2, 2)}, "another shape"), ({key: None}, "no weight")):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        folder = checkpoints.write_checkpoint(tmp_path / match.replace(" ", "-"), encoder, changed, name="unet.pt")
        from e4t_cli.api.importing import conversion_request

        conversion = dataclasses.replace(
            conversion_request(read_checkpoint(folder), None, "face", "tiny"), keep_unet=True
        )
        with pytest.raises(E4TError, match=match):
            convert_to_domain_folder(conversion, tmp_path, read_pickled_tensors)
