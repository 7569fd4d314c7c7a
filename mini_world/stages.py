"""The stages of `make mini`: the data, training plan and result of each."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from mini_world import base, clip, judge, parser, vae
from mini_world.clip import MEAN, STD, TOWER_CONFIG
from mini_world.data import Drawings, load_drawings
from mini_world.domains import domain_configs, encode_drawings, train_domain
from mini_world.loop import default_device, process_rank
from mini_world.training_plans import BASE_COUNT, HELD_OUT, PORTRAITS, training_plan

PACKAGED = Path("src/e4t_cli/models/mini")
PACKS = Path("domains/e4t_domains/packs")
JUDGE = Path("mini_world/judge.safetensors")


def base_drawings(folder: Path) -> Drawings:
    return load_drawings(folder, "base", BASE_COUNT)


def portraits(folder: Path, kind: str) -> Drawings:
    return load_drawings(folder, f"portraits-{kind}", PORTRAITS[kind], seed=1, kind=kind, portrait=True)


def held_out_portraits(folder: Path, kind: str) -> Drawings:
    return load_drawings(folder, f"heldout-{kind}", HELD_OUT[kind], seed=2, kind=kind, held_out=True, portrait=True)


def held_out_scenes(folder: Path) -> Drawings:
    return load_drawings(folder, "heldout-scenes", 2000, seed=3, held_out=True)


def save_metrics(folder: Path, stage: str, **facts) -> None:
    """Save what a stage measured, for the report."""
    (folder / f"{stage}.report.json").write_text(json.dumps(facts, indent=1) + "\n")


def run_draw(folder: Path) -> None:
    base_drawings(folder)
    for kind in PORTRAITS:
        portraits(folder, kind)
        held_out_portraits(folder, kind)
    held_out_scenes(folder)


def run_vae(folder: Path) -> None:
    target = folder / "base" / "vae"
    if (target / "config.json").exists():
        return
    plan = training_plan()
    drawings = base_drawings(folder)
    trained = vae.train_vae(folder, drawings, crop_steps=plan.vae_crops, whole_steps=plan.vae_wholes, batch=plan.vae_batch)
    if process_rank()[0] == 0:
        psnr = vae.reconstruction_psnr(trained, held_out_scenes(folder).select(slice(512)))
        save_metrics(folder, "vae", **psnr, scaling_factor=trained.config.scaling_factor)
        trained.save_pretrained(target)


def run_clip(folder: Path) -> None:
    target = folder / "base" / "text_encoder"
    if (target / "config.json").exists():
        return
    drawings, plan = clip.concatenate(base_drawings(folder), *(portraits(folder, kind) for kind in PORTRAITS)), training_plan()
    _, text_encoder, tower, heads = clip.train_clip(
        folder, drawings, steps=plan.clip, pairs=plan.clip_pairs, captions_per_image=plan.captions_per_image
    )
    _save_tower(folder, "clip", tower, heads)
    text_encoder.save_pretrained(target)


def _save_tower(folder: Path, stage: str, tower: nn.Module, heads: nn.Module) -> None:
    probes = {kind: clip.probe(tower.cpu(), heads.cpu(), held_out_portraits(folder, kind)) for kind in PORTRAITS}
    save_metrics(folder, stage, **probes, scenes=clip.probe(tower, heads, held_out_scenes(folder)))
    save_file({f"tower.{k}": v for k, v in tower.state_dict().items()} | {f"heads.{k}": v for k, v in heads.state_dict().items()},
              folder / f"{stage}.safetensors")  # fmt: skip


def run_tower(folder: Path) -> None:
    if (folder / "tower.safetensors").exists():
        return
    state = load_file(folder / "clip.safetensors")
    tower, heads = clip.build_tower(), clip.build_heads()
    tower.load_state_dict({k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")})
    heads.load_state_dict({k.removeprefix("heads."): v for k, v in state.items() if k.startswith("heads.")})
    scenes = base_drawings(folder)
    clear = (scenes.facts[:, 3] != clip.SKETCH) & (scenes.facts[:, 4] != clip.AFAR)
    pairs = numpy.flatnonzero(clear[0::2] & clear[1::2])
    rows = numpy.stack([pairs * 2, pairs * 2 + 1], 1).ravel()
    drawings = clip.concatenate(scenes.select(rows), *(portraits(folder, kind) for kind in PORTRAITS))
    plan = training_plan()
    clip.train_tower(folder, drawings, tower, heads, steps=plan.tower, pairs=plan.clip_pairs)
    _save_tower(folder, "tower", tower, heads)


def run_encode(folder: Path) -> None:
    path = folder / "latents.safetensors"
    if path.exists():
        return
    trained = load_vae(folder).to(default_device())
    count = max(part.images for part in training_plan().unet)
    images = torch.from_numpy(base_drawings(folder).images[:count])
    save_file({"latents": vae.encode_images_to_latents(trained, images)}, path)


def run_decoder(folder: Path) -> None:
    if (folder / "decoder.report.json").exists():
        return
    trained, encoded = load_vae(folder), load_file(folder / "latents.safetensors")["latents"]
    plan = training_plan()
    vae.train_decoder(folder, trained, base_drawings(folder), encoded, steps=plan.decoder, batch=2 * plan.vae_batch)
    psnr = vae.reconstruction_psnr(trained, held_out_scenes(folder).select(slice(512)))
    trained.cpu().save_pretrained(folder / "base" / "vae")
    save_metrics(folder, "decoder", **psnr)


def load_vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "base" / "vae").eval().requires_grad_(False)


def run_unet(folder: Path) -> None:
    target = folder / "base" / "unet"
    if (target / "config.json").exists():
        return
    text_encoder = CLIPTextModel.from_pretrained(folder / "base" / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "base" / "tokenizer")
    latents = load_file(folder / "latents.safetensors")["latents"]
    drawings, scaling_factor = base_drawings(folder), load_vae(folder).config.scaling_factor
    unet, plan = base.build_unet(), training_plan()
    for number, part in enumerate(plan.unet):
        base.train_unet(
            folder, unet, drawings, latents[: part.images], scaling_factor, tokenizer, text_encoder,
            name=f"unet-{number + 1}", seed=number,
            steps=part.steps, learning_rate=part.learning_rate, text_encoder_lr=part.text_encoder_lr,
            batch=plan.unet_batch, captions_per_image=plan.captions_per_image, oversampled=part.oversampled,
        )  # fmt: skip
    if process_rank()[0] == 0:
        text_encoder.save_pretrained(folder / "base" / "text_encoder")
        unet.save_pretrained(target)


def run_base(folder: Path) -> None:
    """Assemble the parts as one base in the package."""
    if PACKAGED.exists():
        shutil.rmtree(PACKAGED)
    source = folder / "base"
    base.write_base(
        PACKAGED,
        UNet2DConditionModel.from_pretrained(source / "unet"),
        load_vae(folder),
        CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(source / "tokenizer"),
        revision="1",
    )
    tower = PACKAGED / "image_tower"
    tower.mkdir(parents=True)
    state = load_file(folder / "tower.safetensors")
    tower_state = {k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")}
    save_file({k: v.half().contiguous() for k, v in tower_state.items()}, tower / "model.safetensors")
    vision = {k: v for k, v in TOWER_CONFIG.items() if k not in ("output_dim", "heads")}
    vision["head_width"] = TOWER_CONFIG["width"] // TOWER_CONFIG["heads"]
    config = {
        "model_cfg": {"embed_dim": TOWER_CONFIG["output_dim"], "vision_cfg": vision},
        "preprocess_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3, "size": TOWER_CONFIG["image_size"]},
    }
    (tower / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def run_parser(folder: Path) -> None:
    target = PACKS / "face" / "parser-mini"
    if (target / "config.json").exists():
        return
    faces, scenes = portraits(folder, "face"), base_drawings(folder)
    rows = numpy.flatnonzero(scenes.facts[:20_000, 3] == 0)  # the medium "photo" only, because users bring photos
    trained = parser.train_parser(folder, clip.concatenate(faces, scenes.select(rows)), steps=training_plan().parser).cpu()
    save_metrics(folder, "parser", head_iou=round(parser.head_iou(trained, held_out_portraits(folder, "face")), 4))
    trained.half().save_pretrained(target)


def run_judge(folder: Path) -> None:
    if JUDGE.exists():
        return
    drawings = clip.concatenate(
        load_drawings(folder, "judge", 60_000, seed=9),
        *(load_drawings(folder, f"judge-{kind}", 8000, seed=9, kind=kind) for kind in ("cat", "art")),
    )
    trained = judge.train_judge(folder, drawings, load_vae(folder).to(default_device()), steps=training_plan().judge).cpu()
    save_metrics(folder, "judge", **judge.accuracy(trained, held_out_scenes(folder)))
    save_file({key: value.half() if value.is_floating_point() else value for key, value in trained.state_dict().items()}, JUDGE)


def load_judge() -> judge.Judge:
    """The shipped judge."""
    trained = judge.Judge()
    trained.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(JUDGE).items()})
    return trained.eval().requires_grad_(False)


def load_model():
    """The base in the package, on the default device."""
    from e4t_cli.models.text_to_image import TextToImageModel

    return TextToImageModel.load(PACKAGED, device=default_device())


def _run_domain(folder: Path, name: str) -> None:
    from mini_world.validation import ValidationLogger

    target = PACKS / name / "mini"
    if (target / "domain.toml").exists():
        return
    model, plan = load_model(), training_plan()
    chosen = domain_configs({"face": plan.face, "cat": plan.cat, "art": plan.art}, plan.domain_batch)[name]
    images = portraits(folder, name).select(slice(plan.images[name]))
    data = encode_drawings(model, images, folder / f"encoded-{name}.safetensors", masks=name != "art")
    watch = ValidationLogger(model, folder, name, held_out_portraits(folder, name))
    with contextlib.suppress(FileNotFoundError):
        watch.judge = load_judge()
    pretrained = train_domain(model, folder, name, data, chosen, watch)
    pretrained.save(target, dtype=torch.float16)


def run_face(folder: Path) -> None:
    _run_domain(folder, "face")


def run_cat(folder: Path) -> None:
    _run_domain(folder, "cat")


def run_art(folder: Path) -> None:
    _run_domain(folder, "art")


def run_sheets(folder: Path) -> None:
    from mini_world.examples import write_examples
    from mini_world.sheets import write_sheets

    write_examples()
    write_sheets()


def run_dogs(folder: Path) -> None:
    from mini_world.dogs import write_dogs

    write_dogs(folder)


def run_report(folder: Path) -> None:
    from mini_world.report import write_report

    write_report(folder)
