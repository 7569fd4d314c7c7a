"""A base that was saved again is the same base; one with other weights is another, and the message says which part."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from e4t_cli.errors import IntegrityError
from e4t_cli.hub.bases import find_base, read_base
from e4t_cli.models.domain_weights import facts_about
from e4t_cli.models.fingerprints import (
    differing_parts,
    folder_fingerprint,
    is_recorded,
    recorded_fingerprint,
    weights_fingerprint,
)
from e4t_cli.models.text_to_image import TextToImageModel


@pytest.fixture
def copy(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def files(folder, part):
    return next((folder / part).glob("*.safetensors"))


def in_shards(folder, model):
    shutil.rmtree(folder / "unet")
    model.unet.save_pretrained(folder / "unet", max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1


def saved_by_diffusers(folder, model):
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
        getattr(model, part).save_pretrained(folder / part)


def rewritten(change):
    def apply(folder, model):
        for part in ("unet", "vae", "text_encoder"):
            path = files(folder, part)
            save_file(dict(map(change, load_file(path).items())), path, {"format": "pt"})

    return apply


def with_config(name, **changes):
    def apply(folder, model):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=7))

    return apply


def as_a_variant(folder, model):
    for part in ("unet", "vae", "text_encoder"):
        path = files(folder, part)
        save_file({key: value.half() for key, value in load_file(path).items()}, path.with_suffix(".x"))
        path.with_suffix(".x").rename(path.with_name(f"{path.stem}.fp16.safetensors"))
        path.unlink()


def with_positions(folder, model):
    path = files(folder, "text_encoder")
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(9)}, path)


SCHEDULER = "scheduler/scheduler_config.json"
SAME = {
    "in shards": in_shards,
    "by diffusers": saved_by_diffusers,
    "in another order": rewritten(lambda item: (item[0], item[1].contiguous())),
    "in float16": rewritten(lambda item: (item[0], item[1].half())),
    "as a variant": as_a_variant,
    "by older versions": with_positions,
    "another sampler": with_config(
        SCHEDULER, _class_name="EulerDiscreteScheduler", steps_offset=1, skip_prk_steps=True
    ),
    "another version": with_config("unet/config.json", _diffusers_version="0.2.0"),
}
OTHER = {
    "unet": rewritten(lambda item: (item[0], item[1] * (1.01 if item[0] == "conv_in.weight" else 1))),
    "vae": rewritten(lambda item: (item[0], item[1] + (0.01 if item[0] == "decoder.conv_in.bias" else 0))),
    "scheduler": with_config(SCHEDULER, prediction_type="v_prediction"),
    "tokenizer": with_config("tokenizer/vocab.json", zebra=7),
}


@pytest.mark.parametrize("change", SAME)
def test_a_base_saved_again_is_the_same(base_folder, copy, model, domain_weights, change):
    before = recorded_fingerprint(read_base(base_folder))
    SAME[change](copy, model)
    assert recorded_fingerprint(read_base(copy)) == before == model.weights_fingerprint
    again = TextToImageModel.load(copy)
    dataclasses.replace(domain_weights, **facts_about(model)).check_base(again)
    dataclasses.replace(domain_weights, **facts_about(again)).check_base(model)


@pytest.mark.parametrize("part", OTHER)
def test_a_base_with_another_part_is_another(base_folder, copy, model, part):
    OTHER[part](copy, model)
    assert not is_recorded(read_base(copy), model.weights_fingerprint)


def test_what_was_recorded_before_is_accepted(base_folder, model):
    """Domain weights and concepts of older versions have the hash of the files."""
    base = read_base(base_folder)
    assert folder_fingerprint(base_folder) != weights_fingerprint(base_folder)
    assert is_recorded(base, folder_fingerprint(base_folder)) and is_recorded(base, model.fingerprint)
    assert not is_recorded(base, "0" * 32)


def test_mini_is_recorded_as_ever_and_known_in_a_copy(tmp_path, domain_weights):
    mini = find_base("mini")
    assert recorded_fingerprint(mini) == folder_fingerprint(mini.folder) == "26178afc509dc6120565f5a027e5fab4"
    copy = shutil.copytree(mini.folder, tmp_path / "copy")
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("DDPMScheduler", "DPMSolverMultistepScheduler"))
    base = read_base(copy)
    assert is_recorded(base, recorded_fingerprint(mini)) and is_recorded(mini, recorded_fingerprint(base))
    assert differing_parts(base, recorded_fingerprint(mini)) == []
    tensors = load_file(files(copy, "vae"))
    tensors["decoder.conv_in.bias"] += 1
    save_file(tensors, files(copy, "vae"), {"format": "pt"})
    assert differing_parts(base, recorded_fingerprint(mini)) == ["vae"]
    made_for_mini = dataclasses.replace(domain_weights, base_fingerprint=recorded_fingerprint(mini))
    with pytest.raises(IntegrityError, match="which has another vae"):
        made_for_mini.check_base(TextToImageModel.load(copy))


def test_a_copy_of_a_base_of_the_hub(base_folder, monkeypatch, tmp_path):
    """A folder with the tensors of a snapshot on this machine is that base, and the other way round."""
    from e4t_cli.hub.repo_info import RepoInfo
    from e4t_cli.models import fingerprints

    info = RepoInfo(repository="owner/tiny", commit="c" * 40)
    monkeypatch.setattr(fingerprints, "cached_repo_infos", lambda: [info])
    monkeypatch.setattr(fingerprints, "snapshot_folder", lambda repository, commit: base_folder)
    local = read_base(base_folder)
    hub = dataclasses.replace(local, identity=f"owner/tiny@{'c' * 40}")
    assert is_recorded(local, recorded_fingerprint(hub)) and is_recorded(hub, recorded_fingerprint(local))
    other = dataclasses.replace(local, identity=f"owner/tiny@{'d' * 40}")
    assert not is_recorded(local, recorded_fingerprint(other))
