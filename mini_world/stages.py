"""The stages of `make mini`: what is trained on what, for how long, and where its result goes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
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
from mini_world.domains import encode_drawings, plans, train_domain
from mini_world.loop import pick_device, process_rank

PACKAGED = Path("src/e4t_cli/data/mini")
PACKS = Path("domains/e4t_domains/packs")
JUDGE = Path("mini_world/judge.safetensors")
BASE_COUNT = 120_000
PORTRAITS = {"face": 24_000, "cat": 12_000, "art": 10_000}
HELD_OUT = {"face": 600, "cat": 300, "art": 300}


@dataclass(frozen=True)
class Round:
    """One cosine schedule of the U-Net's training: its steps, its peak learning rate, over how many encoded pictures.

    `words_rate`: the peak learning rate of the text encoder's layers, which contrast alone leaves with words that it had no
    need to tell apart.
    """

    steps: int
    learning_rate: float
    pictures: int
    words_rate: float = 0.0


@dataclass(frozen=True)
class Lengths:
    """How long each network is trained, in steps, and on how much at once; batches are those of one process.

    `wordings`: of each picture; `clip_pairs`: pairs of pictures; `domain_batch`: of a domain's pre-training.
    """

    vae_crops: int
    vae_wholes: int
    vae_batch: int
    clip: int
    clip_pairs: int
    tower: int
    unet: tuple[Round, ...]
    unet_batch: int
    parser: int
    judge: int
    face: int
    cat: int
    art: int
    domain_batch: int
    pictures: dict[str, int]  # of each domain
    wordings: int = 8


CPU = Lengths(
    vae_crops=3000,
    vae_wholes=480,
    vae_batch=4,
    clip=1150,
    clip_pairs=32,
    tower=900,
    unet=(Round(2800, 1e-3, 32_000), Round(1600, 6e-4, 48_000), Round(400, 3e-4, 48_000, words_rate=2e-4)),
    unet_batch=32,
    parser=900,
    judge=1200,
    face=900,
    cat=600,
    art=500,
    domain_batch=32,
    pictures={"face": 13_600, "cat": 7200, "art": 6400},
)
CUDA = Lengths(
    vae_crops=1000,
    vae_wholes=3000,
    vae_batch=64,
    clip=1500,
    clip_pairs=512,
    tower=500,
    unet=(Round(4500, 1e-3, 120_000, words_rate=2e-4),),
    unet_batch=512,
    parser=2000,
    judge=4000,
    face=800,
    cat=600,
    art=600,
    domain_batch=128,
    pictures=PORTRAITS,
    wordings=4,
)


def lengths() -> Lengths:
    """The plan for this machine."""
    return CUDA if torch.cuda.is_available() else CPU


def base_drawings(folder: Path) -> Drawings:
    return load_drawings(folder, "base", BASE_COUNT)


def portraits(folder: Path, kind: str) -> Drawings:
    return load_drawings(folder, f"portraits-{kind}", PORTRAITS[kind], seed=1, kind=kind, portrait=True)


def held_out_portraits(folder: Path, kind: str) -> Drawings:
    return load_drawings(folder, f"heldout-{kind}", HELD_OUT[kind], seed=2, kind=kind, held_out=True, portrait=True)


def held_out_scenes(folder: Path) -> Drawings:
    return load_drawings(folder, "heldout-scenes", 2000, seed=3, held_out=True)


def note(folder: Path, stage: str, **facts) -> None:
    """Remember what a stage measured, for the report."""
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
    plan = lengths()
    drawings = base_drawings(folder)
    trained = vae.train_vae(folder, drawings, crop_steps=plan.vae_crops, whole_steps=plan.vae_wholes, batch=plan.vae_batch)
    if process_rank()[0] == 0:
        psnr = vae.reconstruction_psnr(trained, torch.from_numpy(held_out_scenes(folder).images[:512]))
        note(folder, "vae", psnr=round(psnr, 2), scaling_factor=trained.config.scaling_factor)
        trained.save_pretrained(target)


def run_clip(folder: Path) -> None:
    target = folder / "base" / "text_encoder"
    if (target / "config.json").exists():
        return
    drawings, plan = clip.join(base_drawings(folder), *(portraits(folder, kind) for kind in PORTRAITS)), lengths()
    _, text_encoder, tower, heads = clip.train_clip(
        folder, drawings, steps=plan.clip, pairs=plan.clip_pairs, wordings=plan.wordings
    )
    _save_tower(folder, "clip", tower, heads)
    text_encoder.save_pretrained(target)


def _save_tower(folder: Path, stage: str, tower: nn.Module, heads: nn.Module) -> None:
    probes = {kind: clip.probe(tower.cpu(), heads.cpu(), held_out_portraits(folder, kind)) for kind in PORTRAITS}
    note(folder, stage, **probes, scenes=clip.probe(tower, heads, held_out_scenes(folder)))
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
    drawings = clip.join(scenes.pick(rows), *(portraits(folder, kind) for kind in PORTRAITS))
    plan = lengths()
    clip.train_tower(folder, drawings, tower, heads, steps=plan.tower, pairs=plan.clip_pairs)
    _save_tower(folder, "tower", tower, heads)


def run_encode(folder: Path) -> None:
    path = folder / "latents.safetensors"
    if path.exists():
        return
    trained = load_vae(folder).to(pick_device())
    count = max(part.pictures for part in lengths().unet)
    images = torch.from_numpy(base_drawings(folder).images[:count])
    save_file({"latents": vae.encode_all(trained, images)}, path)


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
    unet, plan = base.build_unet(), lengths()
    for number, part in enumerate(plan.unet):
        base.train_unet(
            folder, unet, drawings, latents[: part.pictures], scaling_factor, tokenizer, text_encoder,
            name=f"unet-{number + 1}", seed=number,
            steps=part.steps, learning_rate=part.learning_rate, words_rate=part.words_rate,
            batch=plan.unet_batch, wordings=plan.wordings,
        )  # fmt: skip
    if process_rank()[0] == 0:
        text_encoder.save_pretrained(folder / "base" / "text_encoder")
        unet.save_pretrained(target)


def run_base(folder: Path) -> None:
    """Put the parts together as one base and install it in the package."""
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
    rows = numpy.flatnonzero(scenes.facts[:20_000, 3] == 0)  # photographs only: that is what people bring
    trained = parser.train_parser(folder, clip.join(faces, scenes.pick(rows)), steps=lengths().parser).cpu()
    note(folder, "parser", head_iou=round(parser.overlap(trained, held_out_portraits(folder, "face")), 4))
    trained.half().save_pretrained(target)


def run_judge(folder: Path) -> None:
    if JUDGE.exists():
        return
    drawings = clip.join(
        load_drawings(folder, "judge", 60_000, seed=9),
        *(load_drawings(folder, f"judge-{kind}", 8000, seed=9, kind=kind) for kind in ("cat", "art")),
    )
    trained = judge.train_judge(folder, drawings, load_vae(folder).to(pick_device()), steps=lengths().judge).cpu()
    note(folder, "judge", **judge.accuracy(trained, held_out_scenes(folder)))
    save_file({key: value.half() if value.is_floating_point() else value for key, value in trained.state_dict().items()}, JUDGE)


def load_judge() -> judge.Judge:
    """The judge as it was shipped."""
    trained = judge.Judge()
    trained.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(JUDGE).items()})
    return trained.eval().requires_grad_(False)


def load_model():
    """The installed base, on this machine's device."""
    from e4t_cli.base_model import TextToImageModel

    return TextToImageModel.load(PACKAGED, device=pick_device())


def _run_domain(folder: Path, name: str) -> None:
    from mini_world.watch import Watch

    target = PACKS / name / "mini"
    if (target / "domain.toml").exists():
        return
    model, plan = load_model(), lengths()
    chosen = plans({"face": plan.face, "cat": plan.cat, "art": plan.art}, plan.domain_batch)[name]
    pictures = portraits(folder, name).pick(slice(plan.pictures[name]))
    data = encode_drawings(model, pictures, folder / f"encoded-{name}.safetensors", masks=name != "art")
    watch = Watch(model, folder, name, held_out_portraits(folder, name))
    with contextlib.suppress(FileNotFoundError):
        watch.judge = load_judge()
    pack = train_domain(model, folder, name, data, chosen, watch)
    pack.save(target, dtype=torch.float16)


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


def report_of_training(folder: Path) -> str:
    """What every stage took and reached, as Markdown; the hashes of what is shipped."""
    lines = ["| stage | steps | minutes | last losses | measured on held-out drawings |", "|---|---|---|---|---|"]
    rounds = [f"unet-{number + 1}" for number in range(len(lengths().unet))]
    for stage in ("vae", "clip", "tower", *rounds, "parser", "judge"):
        log = folder / f"{stage}.jsonl"
        if not log.exists():
            continue
        last = json.loads(log.read_text().splitlines()[-1])
        steps, seconds = last.pop("step"), last.pop("seconds")
        losses = ", ".join(f"{name} {value:.3g}" for name, value in last.items())
        found = folder / f"{stage}.report.json"
        facts = ", ".join(_facts(json.loads(found.read_text()))) if found.exists() else ""
        lines.append(f"| {stage} | {steps:,} | {seconds / 60:.0f} | {losses} | {facts} |")
    for name in PORTRAITS:
        watch = folder / f"watch-{name}.jsonl"
        if watch.exists():
            last = json.loads(watch.read_text().splitlines()[-1])
            facts = f"loss with its own concept {last['own']:.4f}, with another's {last['swapped']:.4f}"
            found = [json.loads(line) for line in (folder / f"domain-{name}.jsonl").read_text().splitlines()]
            steps, minutes = found[-1]["step"], _seconds(found) / 60
            lines.append(f"| domain {name} | {steps:,} | {minutes:.0f} | | {facts} (at step {last['step']:,}) |")
    lines += ["", "| shipped file | bytes | sha256 |", "|---|---|---|"]
    for path in sorted([*PACKAGED.rglob("*.safetensors"), *PACKS.rglob("*.safetensors"), JUDGE]):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"| {path} | {path.stat().st_size:,} | `{digest[:16]}…` |")
    return "\n".join(lines)


def _seconds(lines: list[dict]) -> float:
    """The time of a training whose clock began anew whenever it was resumed."""
    clocks = [line["seconds"] for line in lines]
    return sum(clock for clock, after in zip(clocks, [*clocks[1:], 0.0], strict=True) if after < clock)


def _facts(report: dict) -> list[str]:
    found = []
    for name, value in report.items():
        if isinstance(value, dict):
            mean = sum(value.values()) / len(value)
            found.append(f"{name}: {mean:.3f} mean of {len(value)} probes")
        else:
            found.append(f"{name} {value:g}")
    return found
