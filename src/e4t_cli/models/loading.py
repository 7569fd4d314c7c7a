"""Loads the parts of a base from its folder, strictly and offline, and hashes its configs.

Domain weights need the very base they were trained for. Where the weights differ, equal configs tell another training
of the same model from another model; configs may also differ by the version of the library that saved them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from e4t_cli.errors import E4TError, IntegrityError, WeightsUnavailable, printable
from e4t_cli.hub.architecture import MAX_PARAMETERS, no_safetensors, read_config, shard_names, wrong_size
from e4t_cli.hub.bases import weight_files, weight_stem
from e4t_cli.nn.word_embedding_encoder import ImageTower
from e4t_cli.system_memory import memory_ran_out

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

MIN_LENGTH = 4  # tokens of a prompt that a base reads: begin, a word or two, end
ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
CHECKER, FEATURE_EXTRACTOR = "safety_checker", "feature_extractor"
CONFIGS = ("unet/config.json", "text_encoder/config.json")
TOWER_CONFIGS = ("open_clip_config.json", "config.json")
# What a noise schedule was trained with, and the values that diffusers' DDPM takes where a config has none.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
# Who wrote the file and how it was stored: not part of the model.
_INCIDENTAL = {"architectures", "dtype", "torch_dtype", "transformers_version", "preprocess_cfg"}


def config_hash(folder: Path, tower: Path | None = None) -> str:
    """Return a SHA-256 of the configs of a base and of its visual tower, "" if none can be read."""
    found = {name: _essence(table) for name in CONFIGS if (table := _read(folder / name))}
    if about := _tower_config(tower or folder / "image_tower"):
        found["image_tower"] = _essence(about)
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest() if found else ""


def describe_tower(folder: Path, tower: Path | None = None) -> str:
    """Return a phrase about the CLIP tower of a base: "CLIP ViT, 32 layers of 1280, …"."""
    about = _tower_config(tower or folder / "image_tower")
    layers, width = about.get("layers", about.get("num_hidden_layers")), about.get("width", about.get("hidden_size"))
    patch, side = about.get("patch_size", "?"), about.get("image_size", "?")
    return f"CLIP ViT, {layers} layers of {width}, patches of {patch}, {side} px" if layers and width else ""


def _tower_config(folder: Path) -> dict[str, Any]:
    for name in TOWER_CONFIGS:
        table = _read(folder / name)
        for part in ("model_cfg", "vision_cfg"):  # open_clip puts one into the other
            if isinstance(table.get(part), dict):
                table = table[part]
        if table:
            return table
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_config(path)
    except (OSError, ValueError):
        return {}  # a base with a damaged config is refused where it is loaded


def _essence(table: Any) -> Any:
    if not isinstance(table, dict):
        return table
    return {key: _essence(value) for key, value in table.items() if not key.startswith("_") and key not in _INCIDENTAL}


# What older files call the weights of attention (diffusers before 0.13).
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def canonical_key(key: str) -> str:
    """Return a key's name without what differs between versions of diffusers and of transformers."""
    key = key.replace("vision_model.vision_model.", "vision_model.").removeprefix("text_model.")
    return ".".join(_OLD_NAMES.get(name, name) for name in key.split("."))


def load_part(kind: Any, folder: Path, device: str | torch.device, dtype: torch.dtype, *, half: bool = False) -> Any:
    """Read a part that has weights: diffusers' U-Net and VAE, transformers' text encoder.

    Not with `from_pretrained`, which changes torch's default dtype and `nn.Module` for the whole process while it
    loads: modules that another thread builds meanwhile would get float16 or no weights at all.

    Args:
        dtype: in memory, whatever the file has.
        half: read the float16 file where there are both.
    """
    if not os.path.isfile(folder / "config.json"):
        raise WeightsUnavailable(f"the base is incomplete: there is no {folder.name}/config.json")
    try:
        if wrong := wrong_size(read_config(folder / "config.json")):
            raise ValueError(wrong)
        part = empty_part(kind, folder, dtype)
        check_parameters(part)
        names = {canonical_key(key): key for key in part.state_dict()}
        tensors = {}
        for path in weight_paths(folder, half):
            for key, value in load_file(path).items():
                if (name := names.get(canonical_key(key))) is not None:
                    value = value.to(dtype) if value.is_floating_point() else value
                    # safetensors maps a tensor at any multiple of 8 bytes, and on a CPU the last bits of products of
                    # matrices depend on that (torch 2.14.1): the same weights in another file gave another image.
                    moved = torch.device(device).type != "cpu" or value.data_ptr() % ALIGNMENT == 0
                    tensors[name] = value if moved else value.clone()
        if missing := sorted(names.values() - tensors.keys()):
            raise IntegrityError(f"the base's {folder.name} lacks {len(missing)} weights, as {missing[0]}")
        part.load_state_dict(tensors, strict=True, assign=True)
        for name, buffer in list(part.named_buffers()):
            if buffer.is_meta:  # no file has it
                module, _, attribute = name.rpartition(".")
                if attribute != "position_ids":
                    raise ValueError(f"nothing is known about {name}")
                positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
                part.get_submodule(module).register_buffer(attribute, positions, persistent=False)
    except Exception as error:  # a config of wrong types can raise anything in the libraries
        if isinstance(error, E4TError) or memory_ran_out(error):
            raise
        message = f"the base's {folder.name} cannot be loaded: {printable(str(error))}"
        raise IntegrityError(message) from error
    return part.eval().to(device)


def empty_part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Build a part from its config, its weights on the meta device, which belongs to this thread."""
    if issubclass(kind, ModelMixin):
        config = kind.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            part = kind.from_config(config)
        part.register_to_config(_name_or_path=str(folder))
        return part
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    config.dtype, config.name_or_path = dtype, str(folder)
    with torch.device("meta"):
        return kind(config)


def check_parameters(part: torch.nn.Module) -> None:
    """Raise ValueError for an impossible number of weights; none has been allocated."""
    if (count := sum(weight.numel() for weight in part.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"it would have {count:,} weights")


def weight_paths(folder: Path, half: bool) -> list[Path]:
    """Return the safetensors files with the weights of a part: one, or the shards of its index.

    Raises:
        IntegrityError: it has none.
        OSError, ValueError: the folder or the index cannot be read.
    """
    names = [f"{folder.name}/{path.name}" for path in folder.iterdir()]
    files = weight_files(names, folder.name, half=half)
    if not files:
        raise no_safetensors(names, weight_stem(folder.name), "the base")
    first = folder.parent / files[0]
    return [first] if first.suffix != ".json" else [folder / name for name in shard_names(first)]


def load_settings(kind: Any, folder: Path) -> Any:
    """Read a part that has no weights: the tokenizer, the noise schedule."""
    if not os.path.isdir(folder):
        raise WeightsUnavailable(f"the base is incomplete: there is no {folder.name}")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a damaged file raises differs between the libraries
        raise IntegrityError(f"the base's {folder.name} cannot be loaded: {printable(str(error))}") from error


def load_noise_schedule(folder: Path) -> DDPMScheduler:
    """Read what a base says of its noise schedule, and what of its sampling is the base's, not that of a sampler.

    diffusers writes every default of a sampler into the config when a pipeline is saved, and `from_config` takes them
    for another sampler, which has others (0.42.1). Left out here, they change no image of a base that was saved again,
    also with another sampler. Of the spacings of time steps, "leading" and "linspace" are defaults; "leading" counts
    in the config of a DDPM, which is no sampler's but that of training, as of `mini`.

    Raises:
        WeightsUnavailable: there is none.
        IntegrityError: it cannot be loaded.
    """
    config: Any = load_settings(DDPMScheduler, folder).config
    kept = {key: config[key] for key in SCHEDULE}
    stated = _read(folder / "scheduler_config.json")
    spacing = stated.get("timestep_spacing", "leading")
    if spacing == "trailing" or (spacing == "leading" and stated.get("_class_name") == "DDPMScheduler"):
        kept["timestep_spacing"] = spacing
    # As diffusers' pipelines take every schedule, and Stable Diffusion has it: with another value they would not
    # generate what we do from an exported model. Training does not use it.
    schedule: DDPMScheduler = DDPMScheduler.from_config({**kept, "steps_offset": 1})
    return schedule


def load_tokenizer(kind: Any, folder: Path, rows: int) -> Any:
    """Read a tokenizer, and compare it with the rows of the text encoder's table; IntegrityError as above."""
    tokenizer = load_settings(kind, folder)
    try:
        length = tokenizer.model_max_length
        if type(length) is not int or length < MIN_LENGTH:
            raise ValueError(f"model_max_length is {printable(str(length), limit=40)}")
        special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
        used = [*tokenizer.get_vocab().values(), *special, *tokenizer("a photo").input_ids]
        if any(type(number) is not int or not 0 <= number < rows for number in used):
            raise ValueError(f"it has tokens that are none of the text encoder's {rows:,}")
    except Exception as error:  # as there
        if memory_ran_out(error):
            raise
        raise IntegrityError(f"the base's {folder.name} cannot be used: {printable(str(error))}") from error
    return tokenizer


def load_tower(folder: Path) -> ImageTower:
    """Read a visual tower from open_clip_config.json and model.safetensors."""
    from open_clip.transformer import QuickGELU, VisionTransformer  # slow to import

    config_path, weights_path = folder / "open_clip_config.json", folder / "model.safetensors"
    if not os.path.isfile(config_path) or not os.path.isfile(weights_path):
        hint = "e4t fetch sd14 downloads the one of Stable Diffusion bases"
        raise WeightsUnavailable(f"the base has no image tower: {folder} is incomplete", hint=hint)
    try:
        config = read_config(config_path)
        model, preprocess = config["model_cfg"], config["preprocess_cfg"]
        options = dict(model["vision_cfg"])
        if wrong := wrong_size(options, {"projection_dim": model["embed_dim"]}):
            raise ValueError(wrong)
        options.setdefault("mlp_ratio", 4.0)
        if model.get("quick_gelu"):
            options["act_layer"] = QuickGELU
        heads = options["width"] // options.pop("head_width", 64)
        with torch.device("meta"):
            visual = VisionTransformer(heads=heads, output_dim=model["embed_dim"], **options)
        check_parameters(visual)
        visual.load_state_dict(load_file(weights_path), strict=True, assign=True)
        size = preprocess.get("size", options["image_size"])
        side = size if isinstance(size, int) else size[0]
        return ImageTower(visual, preprocess["mean"], preprocess["std"], side)
    except Exception as error:  # as in `load_part`
        if memory_ran_out(error):
            raise
        message = f"the image tower in {printable(str(folder))} cannot be used: {printable(str(error))}"
        raise IntegrityError(message) from error


class SafetyChecker:
    """Decides which images are withheld: Stable Diffusion's checker, on by default (section 6 of the paper).

    It compares an image's CLIP embedding with those of a list of concepts. A base without one, such as `mini`, which
    can generate nothing that it would find, is not checked.
    """

    def __init__(self, checker: StableDiffusionSafetyChecker, processor: Any) -> None:
        self.checker = checker.train(False).requires_grad_(False)
        self.processor = processor  # transformers' CLIPImageProcessor; its type differs between versions

    @classmethod
    def of_base(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Self | None:
        """Load the checker of a base, None where it has none; IntegrityError if it is damaged."""
        if not os.path.isfile(folder / CHECKER / "config.json"):
            return None
        # Not at the top: two seconds of imports for the one family of bases that has it.
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        checker = load_part(StableDiffusionSafetyChecker, folder / CHECKER, device, dtype)
        settings = folder / FEATURE_EXTRACTOR
        return cls(
            checker, load_settings(CLIPImageProcessor, settings) if os.path.isdir(settings) else CLIPImageProcessor()
        )

    @torch.no_grad()
    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return for each image whether it has to be withheld."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        weight = next(self.checker.parameters())
        unused = numpy.zeros((len(images), 1, 1, 3), dtype=numpy.float32)  # in which it blackens flagged images
        _, flagged = self.checker(pixels.to(weight.device, weight.dtype), unused)
        return [bool(flag) for flag in flagged]
