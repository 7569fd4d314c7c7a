"""The stages of `make mini`: what each trains or measures, and leaves behind.

A stage is a function of the workspace and of an empty folder, which becomes its result when the function returns; what it
returns are the facts of the report. Called again after an interruption it resumes from its training state. All results are
float16 except the text encoder, which is float32 in every file.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.models.domain_weights import DomainWeights
from mini_world.next import base, clip, evaluation, judge, parser, perceptual, read_out, sets, today, vae
from mini_world.next.domains import domain_configs, encode_drawings, train_domain
from mini_world.next.evaluate import SAMPLING
from mini_world.next.graph import STAGES
from mini_world.next.keeping import restore_state
from mini_world.next.latents import standardize_channels
from mini_world.next.loop import default_device, limit_time, process_rank
from mini_world.next.plans import PLANS
from mini_world.next.stopping import seconds_left
from mini_world.next.text import CaptionEncoder, build_text_encoder, build_tokenizer, tokenize_drawings
from mini_world.next.training_report import training_table
from mini_world.next.validation import ValidationLogger
from mini_world.next.workspace import Workspace
from mini_world.next.world import VERSION

Facts = dict[str, Any]
REPLAYED = 16  # captions a process in a step of the U-Net that keep the text encoder transmitting every word


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a network of our own as safetensors in float16."""
    state = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in module.state_dict().items()}
    save_file(state, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote, in float32."""
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})


def _drawn(made: Path) -> Facts:
    """Note the version of the drawings, so that what was trained on others is not taken for finished."""
    (made / "drawings.json").write_text(json.dumps({"version": VERSION}) + "\n")
    return {"version": VERSION}


def run_draw(work: Workspace, made: Path) -> Facts:
    return sets.draw_base(work) | _drawn(made)


def run_portraits(work: Workspace, made: Path) -> Facts:
    return sets.draw_portraits(work) | _drawn(made)


def run_text(work: Workspace, made: Path) -> Facts:
    tokenizer = build_tokenizer(made / "tokenizer")
    text_encoder = build_text_encoder(tokenizer)
    heads = read_out.train_text(
        work.state("text"), tokenizer, text_encoder,
        steps=work.plan.text, batch=work.plan.text_batch, captions=work.plan.text_captions,
    )  # fmt: skip
    text_encoder.cpu().float().save_pretrained(made / "text_encoder")
    save_file({k: v.contiguous().cpu() for k, v in heads.state_dict().items()}, made / "heads.safetensors")
    return {}


def run_tower(work: Workspace, made: Path) -> Facts:
    text_encoder, tokenizer, _ = load_text(work)
    drawings, plan = sets.tower_drawings(work), work.plan
    captions = tokenize_drawings(drawings, tokenizer, plan.captions)
    tower, heads = clip.train_tower(
        work.state("tower"), drawings, text_encoder.requires_grad_(False), captions, steps=plan.tower, pairs=plan.pairs
    )
    save_weights(tower.cpu(), made / "tower.safetensors")
    found = {kind: clip.probe(tower, heads.cpu(), sets.held_out_portraits(work, kind)) for kind in plan.held_out}
    return found | {"scenes": clip.probe(tower, heads, sets.held_out_scenes(work))}


def run_perceptual(work: Workspace, made: Path) -> Facts:
    trained = perceptual.train_classifier(work.state("perceptual"), sets.base_drawings(work), steps=work.plan.perceptual).cpu()
    save_weights(trained, made / "classifier.safetensors")
    return {"accuracy": perceptual.accuracy(trained, sets.held_out_scenes(work))}


def load_classifier(work: Workspace) -> perceptual.Classifier:
    """The classifier whose features measure the perceptual distance, in float32."""
    classifier = perceptual.Classifier()
    load_weights(classifier, work.result("perceptual") / "classifier.safetensors")
    return classifier.eval().requires_grad_(False)


def run_vae(work: Workspace, made: Path) -> Facts:
    drawings, plan = sets.base_drawings(work), work.plan
    trained = vae.train_vae(
        work.state("vae"), drawings, load_classifier(work),
        crop_steps=plan.vae_crops, whole_steps=plan.vae_wholes, batch=plan.vae_batch,
    )  # fmt: skip
    some = torch.from_numpy(numpy.array(drawings.images[:2048]))
    means = vae.encode_images_to_latents(trained, some)[:, : trained.config.latent_channels]
    standardize_channels(trained, means)
    psnr = vae.reconstruction_psnr(trained, sets.held_out_scenes(work).select(slice(512)))
    trained.cpu().half().save_pretrained(made)
    return psnr


def run_encode(work: Workspace, made: Path) -> Facts:
    images, autoencoder = sets.base_drawings(work).images[: work.plan.latents], load_vae(work, "vae").to(default_device())
    parts = [
        vae.encode_images_to_latents(autoencoder, torch.from_numpy(numpy.array(images[start : start + 2048])))
        for start in range(0, len(images), 2048)
    ]
    save_file({"latents": torch.cat(parts)}, made / "latents.safetensors")
    return {"drawings": len(images)}


def load_vae(work: Workspace, stage: str) -> AutoencoderKL:
    """The VAE of a finished stage, "vae" or "decoder", in float32."""
    return AutoencoderKL.from_pretrained(work.result(stage), torch_dtype=torch.float32).eval().requires_grad_(False)


def load_latents(work: Workspace) -> Tensor:
    """Posterior means and log-variances of the base's drawings, (N, 16, 16, 16) float16."""
    return load_file(work.result("encode") / "latents.safetensors")["latents"]


def run_decoder(work: Workspace, made: Path) -> Facts:
    trained, plan = load_vae(work, "vae"), work.plan
    vae.train_decoder(
        work.state("decoder"), trained, sets.base_drawings(work), load_latents(work), load_classifier(work),
        steps=plan.decoder, batch=plan.decoder_batch, adversarial_from=plan.adversarial_from,
    )  # fmt: skip
    psnr = vae.reconstruction_psnr(trained, sets.held_out_scenes(work).select(slice(512)))
    trained.cpu().half().save_pretrained(made)
    return psnr


def load_text(work: Workspace) -> tuple[CLIPTextModel, CLIPTokenizer, read_out.ReadOut]:
    """Text encoder, tokenizer and heads of the stage "text"."""
    found = work.result("text")
    heads = read_out.ReadOut()
    load_weights(heads, found / "heads.safetensors")
    text_encoder = CLIPTextModel.from_pretrained(found / "text_encoder", dtype=torch.float32)
    return text_encoder, CLIPTokenizer.from_pretrained(found / "tokenizer"), heads


def run_unet(work: Workspace, made: Path) -> Facts:
    text_encoder, tokenizer, heads = load_text(work)
    unet, plan, device = base.build_unet(), work.plan, default_device()
    tokens, said = (part.to(device) for part in read_out.draw_captions(tokenizer, plan.text_captions, seed=6))

    def text_loss(encoder: CaptionEncoder, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(tokens), (REPLAYED,), generator=generator, device=device)
        readings = heads(encoder(tokens[rows])[0], tokens.ends[rows], generator)
        return {name: 0.1 * value for name, value in read_out.read_out_loss(readings, said[rows]).items()}

    base.train_unet(
        work.state("unet"), unet, sets.base_drawings(work), load_latents(work), load_vae(work, "vae").config.scaling_factor,
        tokenizer, text_encoder,
        steps=plan.unet, learning_rate=plan.unet_rate, words_rate=plan.words_rate, batch=plan.unet_batch,
        captions_per_image=plan.captions, text_loss=text_loss, heads=heads,
    )  # fmt: skip
    if process_rank()[0] == 0:
        text_encoder.cpu().float().save_pretrained(made / "text_encoder")
        unet.cpu().half().save_pretrained(made / "unet")
    return {}


def run_base(work: Workspace, made: Path) -> Facts:
    unet = UNet2DConditionModel.from_pretrained(work.result("unet") / "unet", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(work.result("unet") / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(work.result("text") / "tokenizer")
    base.write_base(made, unet, load_vae(work, "decoder"), text_encoder, tokenizer, name="mini", revision="2")
    tower = made / "image_tower"
    tower.mkdir()
    shutil.copyfile(work.result("tower") / "tower.safetensors", tower / "model.safetensors")
    sizes = clip.TOWER_CONFIG
    vision = {k: v for k, v in sizes.items() if k not in ("output_dim", "heads")} | {
        "head_width": sizes["width"] // sizes["heads"]
    }
    config = {
        "model_cfg": {"embed_dim": sizes["output_dim"], "vision_cfg": vision},
        "preprocess_cfg": {"mean": [clip.MEAN] * 3, "std": [clip.STD] * 3, "size": sizes["image_size"]},
    }
    (tower / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {"bytes": sum(path.stat().st_size for path in made.rglob("*.safetensors"))}


def run_parser(work: Workspace, made: Path) -> Facts:
    trained = parser.train_parser(work.state("parser"), sets.parser_drawings(work), steps=work.plan.parser).cpu()
    facts = {"head_iou": round(parser.head_iou(trained, sets.held_out_portraits(work, "face")), 4)}
    trained.half().save_pretrained(made)
    return facts


def run_judge(work: Workspace, made: Path) -> Facts:
    old = today.old_drawings(work.plan.judged_old)
    trained = judge.train_judge(work.state("judge"), sets.judge_drawings(work), steps=work.plan.judge, old=old).cpu()
    save_weights(trained, made / "judge.safetensors")
    tested = {"drawings": sets.held_out_scenes(work), "old drawings": today.old_drawings(work.plan.scenes * 3 // 4, seed=77)}
    return {name: judge.accuracy(trained, drawings) for name, drawings in tested.items()}


def load_model(work: Workspace):
    """The base of this run, on the default device."""
    from e4t_cli.models.text_to_image import TextToImageModel

    return TextToImageModel.load(work.result("base"), device=default_device())


def _run_domain(work: Workspace, made: Path, name: str) -> Facts:
    model, plan, state = load_model(work), work.plan, work.state(name)
    configs = domain_configs(plan.domains, plan.domain_batch)[name]
    masks = name != "art"
    data = encode_drawings(model, sets.portraits(work, name), state / "encoded.safetensors", masks=masks)
    # One of each pair, so that neighbours are different people.
    others = sets.held_out_portraits(work, name).select(slice(0, 128, 2))
    held_out = encode_drawings(model, others, state / "encoded-heldout.safetensors", masks=masks)
    watch = ValidationLogger(model, held_out, state / "validation.jsonl", configs.pretraining.steps)
    pretrained = train_domain(model, state, name, data, configs, watch)
    pretrained.save(made / "mini", dtype=torch.float16)
    return watch.measure(configs.pretraining.steps, pretrained)


def run_face(work: Workspace, made: Path) -> Facts:
    return _run_domain(work, made, "face")


def run_cat(work: Workspace, made: Path) -> Facts:
    return _run_domain(work, made, "cat")


def run_art(work: Workspace, made: Path) -> Facts:
    return _run_domain(work, made, "art")


def load_reader(work: Workspace) -> judge.Judge:
    """The judge, on the default device."""
    return judge.load_judge(work.result("judge") / "judge.safetensors").to(default_device())


def run_words(work: Workspace, made: Path) -> Facts:
    model, reader, plan = load_model(work), load_reader(work), work.plan
    sampling = replace(SAMPLING, steps=plan.sampling_steps)
    rows = evaluation.evaluate_words(work.state("words") / "rows", model, reader, plan.words, plan.word_pictures, sampling)
    return evaluation.write_words(made, rows)


def run_evaluate(work: Workspace, made: Path) -> Facts:
    model, reader, plan, rows = load_model(work), load_reader(work), work.plan, work.state("evaluate") / "rows"
    sampling, domains = replace(SAMPLING, steps=plan.sampling_steps), {}
    for kind, count in plan.evaluated.items():
        pretrained = DomainWeights.load(work.result(kind) / "mini")
        domains[kind] = evaluation.evaluate_domain(rows, model, reader, pretrained, kind, count, sampling)
    return evaluation.write_domains(made, domains)


def run_report(work: Workspace, made: Path) -> Facts:
    (made / "training.md").write_text(training_table(work) + "\n")
    for stage, table in (("evaluate", "domains.md"), ("words", "words.md")):
        shutil.copyfile(work.result(stage) / table, made / table)
    return {}


def run_stage(work: Workspace, name: str) -> None:
    """Run a stage unless it is finished.

    Raises:
        FileNotFoundError: a stage that it needs is not.
        Unfinished: the time of the run is over, or SIGTERM was received; the state is saved.
    """
    if work.find(name):
        work.check(name)
        return
    node, begun, first = STAGES[name], time.monotonic(), process_rank()[0] == 0
    for below in node.needs:
        work.result(below)
    made = work.folder / "unfinished" / (name if first else f"{name}-{process_rank()[0]}")
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
    made.mkdir(parents=True)
    left = seconds_left()
    limit_time(None if left == float("inf") else left / 60)
    if first:
        restore_state(work, name)
    if process_rank()[1] > 1:
        torch.distributed.barrier()
    work.state(name).mkdir(parents=True, exist_ok=True)
    run: Callable[[Workspace, Path], Facts] = globals()[f"run_{name}"]
    try:
        facts = run(work, made)
        if first:
            facts = facts | {"seconds": round(time.monotonic() - begun, 1)}
            work.finish(name, node.needs, made, facts, shipped=node.shipped)
    finally:
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    stage, plan, folder = sys.argv[1:]
    run_stage(Workspace(Path(folder), PLANS[plan]), stage)
