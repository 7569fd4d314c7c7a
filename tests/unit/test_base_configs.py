"""Configs of base folders that no base has: refused with exit code 5 and a reason before any weights are read."""

import contextlib
import json
import math
import os
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from e4t_cli.errors import IntegrityError
from e4t_cli.hub.architecture import check_architecture, read_config
from e4t_cli.hub.bases import find_base, read_base
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.resolve import fetch_base
from e4t_cli.models import text_to_image
from e4t_cli.models.loading import load_tower
from e4t_cli.models.text_to_image import TextToImageModel

CONFIGS = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]


@pytest.fixture
def copy(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, says):
    """Both ways to a base refuse it: the commands', and `TextToImageModel.load` in Python."""
    with pytest.raises(IntegrityError, match=says):
        fetch_base(folder, HubAccess(offline=True))
    with pytest.raises(IntegrityError):
        TextToImageModel.load(folder)


# ── kinds of models ──

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (FLOW, "flow matching"),
        ({**FLOW, "_class_name": "X", "prediction_type": "flow_prediction"}, "flow matching"),
        ({"beta_start": 0.1, "beta_end": 0.2, "use_flow_sigmas": True}, "flow matching"),
        (EDM, "EDMEulerScheduler, states no betas"),
        ({}, "states no betas"),
        ({"beta_start": 0.1, "prediction_type": "sample"}, "predicts 'sample'"),
        ({"beta_start": 0.1, "prediction_type": ["epsilon"]}, "predicts"),
        ({"beta_start": 0.1, "num_train_timesteps": 10**9}, "impossible numbers"),
        ({"beta_start": -0.1}, "impossible numbers"),
    ],
)
def test_other_losses_than_the_papers_are_refused_before_weights_are_read(copy, monkeypatch, schedule, says):
    monkeypatch.setattr(text_to_image, "load_part", None)
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    refused(copy, says)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_samplers_of_the_same_noise_are_one_base(copy, kind):
    change(copy / "scheduler/scheduler_config.json", _class_name=kind)
    assert fetch_base(copy, HubAccess(offline=True)).folder == copy
    assert TextToImageModel.load(copy).train_timesteps == 1000


# ── weights that are not read ──


@pytest.mark.parametrize(
    ("renamed", "says", "hint"),
    [
        (
            "diffusion_pytorch_model.bin",
            r"pickles are refused: unet/diffusion_pytorch_model.bin can run",
            "save_pretra",
        ),
        (
            "diffusion_pytorch_model.bf16.safetensors",
            "but those of the variant bf16",
            "copy unet/.*bf16.safetensors to",
        ),
        ("diffusion_pytorch_model.non_ema.safetensors", "the variant non_ema", "copy unet/.*non_ema.safetensors to"),
        ("diffusion_pytorch_model.bf16-00001-of-00002.safetensors", "the variant bf16", "copy"),
        ("other.txt", "no safetensors for its unet", "can be used"),
    ],
)
def test_weights_only_of_another_kind(copy, renamed, says, hint):
    found = next((copy / "unet").glob("*.safetensors"))
    found.rename(copy / "unet" / renamed)
    refused(copy, says)
    with pytest.raises(IntegrityError, match=says) as caught:
        TextToImageModel.load(copy)
    assert re.search(hint, caught.value.hint)


def test_the_pickle_of_a_text_encoder_has_another_name(copy):
    next((copy / "text_encoder").glob("*.safetensors")).rename(copy / "text_encoder" / "pytorch_model.bin")
    refused(copy, "pickles are refused: text_encoder/pytorch_model.bin")


# ── configs of any size, depth and type ──

BROKEN = ["", "[]", "null", '"x"', "1", "{", "[" * 100_000, '{"a":' * 100_000, "\x00", '{"a": NaN']


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_configs(copy, name):
    for text in BROKEN:
        (copy / name).write_text(text)
        with pytest.raises(IntegrityError):
            check_architecture(copy)
        with pytest.raises(IntegrityError):
            fetch_base(copy, HubAccess(offline=True))
    with pytest.raises(IntegrityError):
        TextToImageModel.load(copy)


@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/vocab.json", "image_tower/open_clip_config.json"])
def test_other_damaged_tables(copy, name):
    for text in BROKEN[1:8:6]:
        (copy / name).write_text(text)
        with contextlib.suppress(IntegrityError):  # it may not need the table, but must not fail in another way
            TextToImageModel.load(copy).image_tower  # noqa: B018


WRONG = ["x", None, -1, 10**9, math.nan]
KEYS = [
    ("unet/config.json", ("sample_size", "block_out_channels", "layers_per_block", "in_channels", "down_block_types")),
    ("vae/config.json", ("block_out_channels", "layers_per_block", "scaling_factor")),
    ("text_encoder/config.json", ("num_hidden_layers", "hidden_size", "num_attention_heads", "model_type")),
    ("scheduler/scheduler_config.json", ("num_train_timesteps", "beta_start", "beta_schedule", "prediction_type")),
]


HUGE = [
    ("text_encoder/config.json", {"hidden_size": 1 << 20}),
    ("text_encoder/config.json", {"intermediate_size": 65_537}),
    ("text_encoder/config.json", {"max_position_embeddings": 10**9}),
    ("text_encoder/config.json", {"vocab_size": 10**12}),
    ("text_encoder/config.json", {"vision_config": {"hidden_size": 10**6}}),
    ("unet/config.json", {"block_out_channels": [10**6, 64]}),
    ("unet/config.json", {"block_out_channels": [32] * 17}),
    ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 1000}),
    ("unet/config.json", {"cross_attention_dim": 1e3}),
    ("vae/config.json", {"block_out_channels": [8, 8, True]}),
    ("vae/config.json", {"latent_channels": 1 << 40}),
]


@pytest.mark.parametrize(("name", "changes"), HUGE, ids=[str(changes) for _, changes in HUGE])
def test_impossible_widths_are_refused_before_a_network_is_built(copy, monkeypatch, name, changes):
    from e4t_cli.models import loading

    change(copy / name, **changes)
    monkeypatch.setattr(loading, "_empty_part", lambda kind, folder, dtype: pytest.fail("it was built"))
    with pytest.raises(IntegrityError, match=f"{next(iter(changes))}|hidden_size"):
        fetch_base(copy, HubAccess(offline=True))


def test_the_number_of_weights_is_bounded(copy, monkeypatch):
    """Each width is possible, and together they are not; nothing is allocated."""
    from e4t_cli.models import loading

    change(copy / "unet/config.json", block_out_channels=[65_536, 65_536])
    monkeypatch.setattr(loading, "load_file", lambda path: pytest.fail("it was read"))
    with pytest.raises(IntegrityError, match=r"it would have [\d,]{14,} weights"):
        TextToImageModel.load(copy)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("tokenizer_config.json", {"model_max_length": 0}), ("tokenizer_config.json", {"model_max_length": 16.5}),
     ("tokenizer_config.json", {"model_max_length": "16"}), ("vocab.json", {"new</w>": 10**6}),
     ("vocab.json", {"new</w>": -1})],
)  # fmt: skip
def test_a_tokenizer_fits_its_text_encoder(copy, name, changes):
    change(copy / "tokenizer" / name, **changes)
    with pytest.raises(IntegrityError, match="tokenizer cannot be"):
        TextToImageModel.load(copy)


@pytest.mark.parametrize("change_of", [{"layers": 10**6}, {"width": 10**6}, {"image_size": 10**6}, {"layers": "8"}])
def test_impossible_image_towers_are_refused(copy, change_of):
    path = copy / "image_tower" / "open_clip_config.json"
    about = json.loads(path.read_text())
    about["model_cfg"]["vision_cfg"] |= change_of
    path.write_text(json.dumps(about))
    with pytest.raises(IntegrityError, match=next(iter(change_of))):
        load_tower(path.parent)


@pytest.mark.parametrize(("name", "keys"), KEYS, ids=[name.partition("/")[0] for name, _ in KEYS])
def test_wrong_types_and_sizes(copy, name, keys):
    sound = (copy / name).read_text()
    for key in keys:
        for value in WRONG:
            (copy / name).write_text(json.dumps({**json.loads(sound), key: value}))
            try:
                fetch_base(copy, HubAccess(offline=True))
                TextToImageModel.load(copy)
            except IntegrityError as error:
                assert len(error.message) < 700


def test_the_images_have_a_possible_size(copy):
    (copy / "base.toml").unlink(missing_ok=True)
    for value in (10**9, 0, -64, "64", [64, 64], True, None):
        change(copy / "unet/config.json", sample_size=value)
        with pytest.raises(IntegrityError, match=r"resolution is|give no size"):
            read_base(copy)


@pytest.mark.parametrize(
    "line",
    ["resolution = true", "resolution = 1000000000", "resolution = 32.0", "guidance = nan", "guidance = inf",
     "guidance = true", "licence = 7", "revision = [1]", "name = 1", 'identity = "owner/name@commit"', "half = true",
     'tower = "/"', 'folder = "/"', "x = " + "[" * 2000, "#" * 70_000],
)  # fmt: skip
def test_what_a_manifest_cannot_state(copy, line):
    """In particular, a folder does not say that it is a commit of the hub."""
    lines = {"schema": "schema = 1", "name": 'name = "toy"', "resolution": "resolution = 32", line.split()[0]: line}
    (copy / "base.toml").write_text("\n".join(lines.values()))
    with pytest.raises(IntegrityError, match="base.toml cannot be used"):
        find_base(copy)


@pytest.mark.parametrize(
    "value", [[], {}, None, {"a": "../x.safetensors"}, {"a": 1}, {"a": "x.bin"}, {"a": "gone.safetensors"}]
)
def test_an_index_of_shards_names_files_beside_it(copy, value):
    next((copy / "unet").glob("*.safetensors")).unlink()
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(IntegrityError, match="unet"):
        TextToImageModel.load(copy)


def test_a_config_is_not_read_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("e4t_cli.hub.architecture.MAX_CONFIG", 100)
    (tmp_path / "a.json").write_text("{}" + " " * 200)
    with pytest.raises(ValueError, match="larger"):
        read_config(tmp_path / "a.json")
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(OSError, match="no such file"):
        read_config(tmp_path / "b.json")


def test_tensors_of_wrong_shapes(copy):
    path = next((copy / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"][:3].clone()}, path, {"format": "pt"})
    with pytest.raises(IntegrityError, match="conv_in"):
        TextToImageModel.load(copy)


def test_networks_of_impossible_depth_are_not_built(copy):
    """Also where a model is loaded in Python, without the commands' checks."""
    for name, key in (
        ("unet", "layers_per_block"),
        ("vae", "layers_per_block"),
        ("text_encoder", "num_hidden_layers"),
    ):
        path = copy / name / "config.json"
        sound = path.read_text()
        change(path, **{key: 10**9})
        with pytest.raises(IntegrityError, match=f"{key} in a config"):
            TextToImageModel.load(copy)
        path.write_text(sound)
