"""Compares add-ons on a base of full size with diffusers: the same pictures of the same files, for docs/bases.md.

    pip install peft                      diffusers needs it for LoRAs
    python -m benchmarks.addons FOLDER    7 GB of main memory and 2 GB in FOLDER, which is made the first time

The base has the exact shapes of Stable Diffusion 1.5 and noise as weights; so have a LoRA in kohya-ss's names, of all
layers of attention of the U-Net and the text encoder, and an embedding in AUTOMATIC1111's format. e4t draws, then
`StableDiffusionPipeline` of diffusers, with the same noise and the same scheduler, in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from e4t_cli.devices import peak_memory
from e4t_cli.formats.addons import apply_addons
from e4t_cli.formats.lora import kohya_name
from e4t_cli.hub.addons import BaseAddons
from e4t_cli.hub.bases import read_base
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.single_file import CONFIGS, write_tokenizer
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents, make_scheduler
from e4t_cli.schedulers import SamplingConfig

LORA, WORD, SCALE, RANK, ALPHA = "style.safetensors", "sketchy.safetensors", 0.8, 8, 4.0
SIDE = 256  # pixels of the pictures
SAMPLING = SamplingConfig(steps=2, guidance=3.0, negative_prompt="red hat")
PROMPT = "a sketchy drawing of a face on the beach"
SEED = 1


def write_model(folder: Path) -> None:
    """Write the base, with CLIP's vocabulary."""
    from tests.hub.full_size import write_stable_diffusion

    write_stable_diffusion(folder)
    for part in ("tokenizer", "safety_checker", "feature_extractor"):
        shutil.rmtree(folder / part)
    shutil.copytree(CONFIGS / "1" / "tokenizer", folder / "tokenizer")
    write_tokenizer(folder / "tokenizer")
    shutil.copy(CONFIGS / "1" / "model_index.json", folder)
    unet = folder / "unet" / "config.json"
    unet.write_text(json.dumps({**json.loads(unet.read_text()), "sample_size": SIDE // 8}))
    for path in folder.glob("*/*.fp16.safetensors"):  # the only precision, under the name that all programs read
        path.rename(path.with_name(path.name.replace(".fp16", "")))


def write_addons(folder: Path, model: TextToImageModel) -> None:
    """Write a LoRA and an embedding."""
    source, tensors = torch.Generator().manual_seed(0), {}
    for part, path, layer in _attention(model):
        name, (out, into) = kohya_name(part, path), layer.weight.flatten(1).shape
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, RANK, generator=source)
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, into, generator=source) * 0.3 * into**-0.5
        if layer.weight.dim() == 4:
            for way in ("up", "down"):
                tensors[f"{name}.lora_{way}.weight"] = tensors[f"{name}.lora_{way}.weight"][..., None, None]
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, folder / LORA)
    words = torch.randn(2, model.embedding_width, generator=source)
    save_file({"emb_params": words}, folder / WORD)
    print(f"a LoRA of {len(tensors) // 3} layers")


def _attention(model: TextToImageModel) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Yield part, path and layer of what kohya-ss's trainer changes."""
    for part in ("unet", "text_encoder"):
        for path, layer in getattr(model, part).named_modules():
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                continue
            inside = ".attentions." in path if part == "unet" else ".self_attn." in path or ".mlp." in path
            if inside:
                yield part, path, layer


def drawn(model: TextToImageModel) -> Tensor:
    """Return the picture of e4t before it is rounded to bytes, (3, height, width), in [0, 1]."""
    prompt = parse_prompt(PROMPT, require_placeholder=False)
    latents = generate_latents(model, TunedModel.plain(model, "face"), [prompt], [SEED], SAMPLING)
    with torch.no_grad():
        decoded: Tensor = model.vae.decode(latents / model.vae.config["scaling_factor"]).sample[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


def drawn_by_diffusers(folder: Path, scheduler: object, shape: tuple[int, ...]) -> Tensor:
    """Return the picture of diffusers, as `drawn`."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base", torch_dtype=torch.float32)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder / LORA)
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.load_textual_inversion(folder / WORD, token=Path(WORD).stem)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED))
    asked = {"num_inference_steps": SAMPLING.steps, "guidance_scale": SAMPLING.guidance, "output_type": "pt"}
    found = pipeline(PROMPT, negative_prompt=SAMPLING.negative_prompt, latents=noise, height=SIDE, width=SIDE, **asked)
    image: Tensor = found.images[0]
    return image


def difference(one: Tensor, other: Tensor) -> str:
    """Return the largest and the mean difference of two pictures."""
    apart = (one - other).abs()
    return f"at most {apart.max():.1e}, on average {apart.mean():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if not os.path.isfile(folder / "base" / "model_index.json"):
        write_model(folder / "base")
    model = TextToImageModel.load(read_base(folder / "base"), device="cpu", dtype=torch.float32)
    write_addons(folder, model)
    plain = drawn(model)
    addons = BaseAddons.parse(loras=[f"{folder / LORA}:{SCALE}"], embeddings=[str(folder / WORD)])
    apply_addons(model, addons, note=print, remark=print)
    own = drawn(model)
    scheduler, shape = make_scheduler(model, SAMPLING), model.latent_shape
    del model
    gc.collect()
    theirs = drawn_by_diffusers(folder, scheduler, shape)
    print(f"e4t's picture: {own.min():.2f} to {own.max():.2f}, standard deviation {own.std():.2f}")
    print(f"e4t and diffusers: {difference(own, theirs)}")
    print(f"with and without the LoRA and the embedding: {difference(own, plain)}")
    print(f"peak memory of the process: {peak_memory() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
