"""A tuned model as a plain Stable Diffusion: a folder in diffusers' layout, or one CompVis file.

The folder is what `StableDiffusionPipeline.from_pretrained` reads, under transformers 4 as well as 5, with one more
token in its tokenizer, and the safety checker of a base that has one; in it also learned_word.safetensors, the token's
embedding in the format of textual inversion, and a README.md. Programs that expect a table of exactly as many tokens
as Stable Diffusion has need a folder without that token, and call the file of its embedding.

The file holds Stable Diffusion 1.x under the names of its first implementation:

    model.diffusion_model.…                     the U-Net
    first_stage_model.…                         the VAE
    cond_stage_model.transformer.text_model.…   the text encoder
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers import DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextModel

from e4t_cli.errors import UsageError, printable
from e4t_cli.files import check_absent, rename_folder_to_free_name, staging_directory, sync_tree
from e4t_cli.formats.export_files import embedding_path
from e4t_cli.formats.textual_inversion import write_with_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.loading import CHECKER, FEATURE_EXTRACTOR, load_part
from e4t_cli.models.text_to_image import TextToImageModel

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Beginnings of the names of weights. transformers 5 saves the shorter ones and reads both; version 4 finds no weight
# under those, and goes on with random ones.
TRANSFORMERS_4_NAMES = {"text_encoder": ("", "text_model."), CHECKER: ("vision_model.", "vision_model.vision_model.")}
# Of the one U-Net that single files can hold: they have no configuration.
SINGLE_FILE_CONFIG = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "use_linear_projection": False,  # Stable Diffusion 2 has the same blocks otherwise
}


def write_folder(
    model: TextToImageModel,
    tuned: TunedModel,
    embedding: Tensor,
    folder: Path,
    *,
    token: str | None,
    readme: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a tuned model as a folder in diffusers' layout; whole, or not at all.

    Args:
        model: the base that `tuned` was made from; it stays as it is.
        token: what prompts call the concept; None leaves tokenizer and text encoder as they are in the base, and gives
            the embedding's file a name that can be a token (`embedding_path`).
        embedding: of the concept (embedding_width,).
        readme: the text of its README.md.
        dtype: of the stored weights.

    Raises:
        UsageError: the folder exists, or the base knows the token already.
        ResourceError: the disk has no room, or cannot be written to.
    """
    check_absent(folder)
    tokenizer: Any = model.tokenizer
    text_encoder, word = model.text_encoder, embedding_path(folder).name
    if token is not None:
        tokenizer, text_encoder = _with_token(model, embedding, token)
        word = "learned_word.safetensors"
    parts = {"unet": tuned.unet, "vae": model.vae, "text_encoder": text_encoder}
    base = model.base.folder
    checked = os.path.isfile(base / CHECKER / "config.json") and os.path.isdir(base / FEATURE_EXTRACTOR)
    size = sum(weight.numel() for part in parts.values() for weight in part.parameters()) * dtype.itemsize
    if checked:
        size += min((path.stat().st_size for path in (base / CHECKER).glob("*.safetensors")), default=0)
    with staging_directory(folder, size) as staging:
        # Not StableDiffusionPipeline.save_pretrained: the pipeline of diffusers 0.42.1 changes the
        # scheduler it is given (steps_offset 0 becomes 1).
        for name, part in parts.items():
            _save(_cpu_copy(part, dtype), staging / name)
        tokenizer.save_pretrained(staging / "tokenizer")
        _add_slow_tokenizer(staging / "tokenizer", tokenizer, token)
        # e4t's own default; the schedule of training would take ten times the steps. Whatever a pipeline's scheduler
        # has, diffusers sets steps_offset to 1, which changes only the spacing "leading", and clip_sample, which
        # this one has not, to False, each with a page of warning.
        schedule: Any = model.noise_schedule  # a scheduler's `config` is not in diffusers' types
        scheduler: Any = DPMSolverMultistepScheduler
        settings = {**schedule.config, "steps_offset": 1, "clip_sample": False}
        scheduler.from_config(settings).save_pretrained(staging / "scheduler")
        index = MODEL_INDEX | (_add_checker(base, staging, dtype) if checked else {})
        save_file({"emb_params": embedding.detach().cpu().float()[None]}, staging / word)
        (staging / "README.md").write_bytes(readme.encode())
        (staging / "model_index.json").write_bytes(json.dumps(index, indent=2).encode())
        _normalize(staging)
        sync_tree(staging)
        rename_folder_to_free_name(staging, folder)


def check_token(model: TextToImageModel, token: str) -> None:
    """Raise UsageError if the base's tokenizer knows a token already."""
    alone = model.tokenizer(token, add_special_tokens=False).input_ids
    if len(alone) == 1 or token in model.tokenizer.get_vocab():
        hint = "choose another with --placeholder, such as '<me>'"
        raise UsageError(f"the base knows {printable(token)!r} as a word of its own", hint=hint)


def _with_token(model: TextToImageModel, embedding: Tensor, token: str) -> tuple[Any, Any]:
    """Return copies of tokenizer and text encoder that have the token."""
    check_token(model, token)
    tokenizer: Any = copy.deepcopy(model.tokenizer)
    # As `prompts.parse_prompt` finds it: in either case, and not inside words.
    inside_words = not re.search(r"^[\w*]|[\w*]$", token)
    tokenizer.add_tokens([AddedToken(token, normalized=True, single_word=not inside_words, special=False)])
    token_id = tokenizer.convert_tokens_to_ids(token)
    text_encoder = copy.deepcopy(model.text_encoder)
    known = text_encoder.get_input_embeddings().num_embeddings
    text_encoder.resize_token_embeddings(max(known, token_id + 1), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[token_id] = embedding.to(table.device, table.dtype)
    return tokenizer, text_encoder


def _cpu_copy(part: nn.Module, dtype: torch.dtype) -> Any:
    """Return a copy in main memory; a part's own device may have no room for one."""
    memo: dict[int, Tensor] = {}  # deepcopy takes what is in it as copied already
    for weight in part.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("cpu", dtype), requires_grad=False)
    for buffer in part.buffers():
        memo[id(buffer)] = buffer.to("cpu", dtype if buffer.is_floating_point() else None)
    return copy.deepcopy(part, memo)


def _save(part: Any, folder: Path) -> None:
    if folder.name not in TRANSFORMERS_4_NAMES:
        part.save_pretrained(folder)
        return
    short, long = TRANSFORMERS_4_NAMES[folder.name]
    weights = {
        long + name.removeprefix(short) if name.startswith(short) and not name.startswith(long) else name: value
        for name, value in part.state_dict().items()
    }
    part.save_pretrained(folder, state_dict=weights)


def _add_slow_tokenizer(folder: Path, tokenizer: Any, token: str | None) -> None:
    """Add the files that transformers before version 5 reads a tokenizer from.

    To its CLIPTokenizer, which is diffusers' choice there, a single word ends at spaces only: it would miss `S*,`. So
    versions before 5 read a tokenizer.json that finds the token also inside words, and later ones another.
    """
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    if token is None:
        return
    (folder / "added_tokens.json").write_bytes(json.dumps({token: tokenizer.convert_tokens_to_ids(token)}).encode())
    exact, everywhere = folder / "tokenizer.5.0.0.json", folder / "tokenizer.json"
    config = folder / "tokenizer_config.json"
    os.rename(everywhere, exact)
    table = json.loads(exact.read_bytes())
    for added in table["added_tokens"]:
        added["single_word"] = False
    everywhere.write_bytes(json.dumps(table, ensure_ascii=False).encode())
    settings = json.loads(config.read_bytes()) | {"fast_tokenizer_files": [everywhere.name, exact.name]}
    config.write_bytes(json.dumps(settings, indent=2).encode())


def _add_checker(base: Path, target: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Add the base's safety checker; returns its entries of model_index.json."""
    # Not at the top: two seconds of imports for the one family of bases that has it.
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = load_part(StableDiffusionSafetyChecker, base / CHECKER, "cpu", dtype)
    _save(checker, target / CHECKER)
    # This follows the links of the hub's cache.
    shutil.copytree(base / FEATURE_EXTRACTOR, target / FEATURE_EXTRACTOR)
    return {
        CHECKER: ["stable_diffusion", "StableDiffusionSafetyChecker"],
        FEATURE_EXTRACTOR: ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }


def _normalize(folder: Path) -> None:
    """Make files readable for everybody, and configs free of paths and of dtypes that differ."""
    mode = (folder / "README.md").stat().st_mode  # safetensors' files only their owner may read
    for path in folder.rglob("*"):
        if os.path.isfile(path):
            path.chmod(mode)
    for path in folder.glob("*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # a folder of this machine
        if "dtype" in settings:
            # transformers loads this dtype, diffusers float32, unless one is requested of both.
            settings["dtype"] = "float32"
        path.write_bytes(json.dumps(settings, indent=2).encode())


def write_single_file(
    model: TextToImageModel, tuned: TunedModel, embedding: Tensor, path: Path, *, dtype: torch.dtype = torch.float16
) -> None:
    """Write a tuned model as one file, and the concept's embedding beside it: both, or none.

    `model` is the base that `tuned` was made from. The other arguments and errors are those of `write_with_embedding`
    and `check_single_file`.
    """
    check_single_file(model)
    assert isinstance(tuned.unet, UNet2DConditionModel)
    weights = dict(compvis_state_dict(tuned.unet, model.vae, model.text_encoder))
    write_with_embedding(path, weights, embedding, dtype=dtype)


def check_single_file(model: TextToImageModel) -> None:
    """Raise UsageError if the base is no Stable Diffusion 1.x."""
    config: Mapping[str, Any] = model.unet.config
    if any(config[name] != value for name, value in SINGLE_FILE_CONFIG.items()):
        message = f"one file can only hold Stable Diffusion 1.x, and {model.base.name} is another kind of model"
        raise UsageError(message, hint="give a folder instead: it serves every base")


# diffusers 0.42.1 converts such files only to its own names (`loaders.single_file_utils`, with
# which tests/unit/test_single_file.py reads these back); its script for this way is not installed.
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Prefix, way, block, kind of layer, its index, rest of its path, weight or bias.
_IN_BLOCK = re.compile(r"(.*?)(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)\.(\w+)")


def compvis_state_dict(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its name in the first implementation, in the shape it has there."""
    for key, value in unet.state_dict().items():
        yield f"model.diffusion_model.{_unet_name(key, unet.config['layers_per_block'] + 1)}", value
    for key, value in vae.state_dict().items():
        # There, attention in the VAE is made of convolutions of one pixel.
        linear = ".attentions." in key and value.dim() == 2
        name = vae_name(key, len(vae.config["block_out_channels"]))
        yield f"first_stage_model.{name}", value[:, :, None, None] if linear else value
    prefix = "cond_stage_model.transformer.text_model"
    for key, value in text_encoder.state_dict().items():
        yield f"{prefix}.{key.removeprefix('text_model.')}", value  # transformers 4 has it, 5 not
    length = text_encoder.config.max_position_embeddings
    yield f"{prefix}.embeddings.position_ids", torch.arange(length)[None]


def _unet_name(key: str, depth: int) -> str:
    """Return a parameter's name there; `depth` is the number of layers of an up block."""
    found = _IN_BLOCK.fullmatch(key)
    if found is None:
        path, _, last = key.rpartition(".")
        return f"{_UNET_ENDS[path]}.{last}"
    _, way, block, kind, layer, rest, last = found.groups()
    if kind == "resnets":
        rest = _UNET_RESNET[rest]
    if way == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}.{last}"
    if kind in ("downsamplers", "upsamplers"):
        layer = str(depth - 1)
    index = int(block) * depth + int(layer)
    if way == "down":
        position, rest = int(kind == "attentions"), "op" if kind == "downsamplers" else rest
        return f"input_blocks.{index + 1}.{position}.{rest}.{last}"
    # Upsampling follows the attention, which the lowest block has not.
    position = {"resnets": 0, "attentions": 1}.get(kind, 1 if block == "0" else 2)
    return f"output_blocks.{index}.{position}.{rest}.{last}"


def vae_name(key: str, blocks: int) -> str:
    """Return the name there of a parameter of a VAE with a number of blocks."""
    found = _IN_BLOCK.fullmatch(key)
    if found is None:
        return key.replace("conv_norm_out", "norm_out")
    half, way, block, kind, layer, rest, last = found.groups()
    if kind == "attentions":
        return f"{half}mid.attn_1.{_VAE_ATTENTION[rest]}.{last}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if way == "mid":
        return f"{half}mid.block_{int(layer) + 1}.{rest}.{last}"
    level = int(block) if way == "down" else blocks - 1 - int(block)
    names = {"resnets": f"block.{layer}", "downsamplers": "downsample", "upsamplers": "upsample"}
    return f"{half}{way}.{level}.{names[kind]}.{rest}.{last}"
