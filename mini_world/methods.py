"""Compares full fine-tuning, its exports and LoRA on held-out identities of `mini`, classified by the judge.

    python -m mini_world.methods face --photos 16 --rates 30 60 100

prints one row per method: how much of the identity and of the prompt is kept, the seconds of tuning, and the size of a concept
with kept weights. `--rates` are values of `TuningConfig.lora_rate`; choose one on other photos (`--seed`) than those it is
reported on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time

import torch

from e4t_cli.formats.concept import Concept
from e4t_cli.formats.lora import lora_of
from e4t_cli.formats.textual_inversion import mean_concept_embedding
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import PreparedImage
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.tuning import tune
from mini_world.evaluate import held_out_photos, run_method
from mini_world.stages import PACKS, load_judge, load_model

SAMPLING = SamplingConfig(steps=20, guidance=3.0)
EXPORTED = "full, as exported: one embedding"
LORA, SCALED = "full, as a LoRA of rank ", "full, concept scale "


def as_exported(model: TextToImageModel, tuned: TunedModel, prepared: PreparedImage, number: int) -> TunedModel:
    """Return the tuned model as it is exported: with one embedding for all denoising steps."""
    return tuned.with_fixed_embedding(mean_concept_embedding(model, tuned, prepared, seed=number).embedding)


@torch.no_grad()
def as_lora(model: TextToImageModel, tuned: TunedModel, rank: int) -> TunedModel:
    """Return the base with the LoRA export of a tuned model merged into it."""
    weights = lora_of(model.unet, tuned.unet, rank).weights
    unet = copy.deepcopy(model.unet)
    for path, layer in unet.named_modules():
        name = "lora_unet_" + path.replace(".", "_")
        if f"{name}.alpha" in weights:
            up, down = (weights[f"{name}.lora_{way}.weight"].half().float() for way in ("up", "down"))
            layer.weight += (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    return dataclasses.replace(tuned, unet=unet)


def compare(
    kind: str, photos: int, rates: list[float], ranks: list[int], export_ranks: list[int], concept_scales: list[float], seed: int
) -> None:
    """Print a row for no tuning, full fine-tuning, its exports and concept scales, and each LoRA rank and rate."""
    model, judge = load_model(), load_judge()
    pretrained = DomainWeights.load(PACKS / kind / "mini")
    config = pretrained.tuning
    rows: dict[str, TuningConfig] = {"no tuning": config.replace(steps=0), "full": config, EXPORTED: config}
    rows |= {f"{LORA}{rank}": config for rank in export_ranks}
    rows |= {f"{SCALED}{concept_scale:g}": config for concept_scale in concept_scales}
    for rank in ranks:
        for rate in rates:
            rows[f"lora, rank {rank}, rate {rate:g}"] = config.replace(method="lora", lora_rank=rank, lora_rate=rate)
    held_out = held_out_photos(kind, photos, seed)
    print(f"{kind} on mini, {photos} held-out photos, {config.steps} steps")
    for name, one in rows.items():
        seconds, sizes = [], []

        def method(prepared, number, name=name, one=one, seconds=seconds, sizes=sizes):
            begun = time.perf_counter()
            tuned = tune(model, pretrained, prepared, one, seed=number)
            seconds.append(time.perf_counter() - begun)
            sizes.append(sum(value.nbytes for value in Concept.weights_of(tuned).values()))
            if name == EXPORTED:
                return as_exported(model, tuned, prepared, number)
            if name.startswith(LORA):
                exported = as_exported(model, tuned, prepared, number)
                return as_lora(model, exported, int(name.removeprefix(LORA)))
            return tuned

        concept_scale = float(name.removeprefix(SCALED)) if name.startswith(SCALED) else 1.0
        sampling = dataclasses.replace(SAMPLING, concept_scale=concept_scale)
        scores = run_method(model, judge, kind, held_out, method, sampling).summary()
        print(
            f"{name:42} identity {scores['identity']:.3f} ± {scores['identity±']:.3f}   "
            f"prompt {scores['prompt']:.3f} ± {scores['prompt±']:.3f}   "
            f"{sorted(seconds)[len(seconds) // 2]:5.1f} s   kept {max(sizes) / 1e6:6.2f} MB",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("face", "cat", "art"))
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[60.0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--export-ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--concept-scales", type=float, nargs="+", default=[0.7])
    parser.add_argument("--seed", type=int, default=50)
    given = parser.parse_args()
    compare(given.kind, given.photos, given.rates, given.ranks, given.export_ranks, given.concept_scales, given.seed)
