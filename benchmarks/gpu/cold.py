"""Times `e4t personalize` in a fresh process, on a base and a domain that are written to disk for it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.checkouts import ROOT
from benchmarks.gpu.results import Results
from benchmarks.processes import environment_of, run
from benchmarks.workload import SIZES, Workload
from e4t_cli.models.fingerprints import folder_fingerprint

NAME = "bench"  # of the domain


def write_base(workload: Workload) -> Path:
    """Write the base in float16 into the workload's folder, where its tokenizer is."""
    model, folder, tower = workload.model, workload.model.base.folder, SIZES[workload.size]["tower"]
    for name in ("unet", "vae", "text_encoder"):
        # Their own `to`, which converts in place: nothing else needs this model any more.
        torch.nn.Module.to(getattr(model, name), "cpu", torch.float16).save_pretrained(folder / name)
    model.noise_schedule.save_pretrained(folder / "scheduler")
    state = model.image_tower.visual.state_dict()
    visual = {key: value.to("cpu", torch.float16).contiguous() for key, value in state.items()}
    (folder / "image_tower").mkdir()
    save_file(visual, folder / "image_tower" / "model.safetensors")
    vision = {key: tower[key] for key in ("image_size", "patch_size", "width", "layers")}
    described = {
        "model_cfg": {
            "embed_dim": tower["output_dim"],
            "vision_cfg": {**vision, "head_width": tower["width"] // tower["heads"], "mlp_ratio": tower["mlp_ratio"]},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": tower["image_size"]},
    }
    (folder / "image_tower" / "open_clip_config.json").write_text(json.dumps(described))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    resolution = SIZES[workload.size]["resolution"]
    (folder / "base.toml").write_text(
        f'schema = 1\nname = "{NAME}"\nlicence = "Apache-2.0"\nrevision = "1"\nresolution = {resolution}\n'
    )
    return folder


def measure(results: Results, workload: Workload, *, rounds: int, warm_up: int) -> None:
    """Keep the seconds of whole commands without and with CUDA graphs, and what they report for each stage."""
    device = workload.model.device
    folder = write_base(workload)
    pack = replace(
        workload.pack, name=NAME, base_name=NAME, base_fingerprint=folder_fingerprint(folder),
        tuning=workload.pack.tuning.replace(mask=False),
    )  # fmt: skip
    pack.save(folder / "domain", dtype=torch.float16)
    photo, home = folder / "photo.png", folder / "home"
    workload.photo.image.save(photo)
    home.mkdir()
    workload.model.__dict__.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    environment = {**environment_of(ROOT, home), "E4T_TUNED_CACHE": "0"}  # each run tunes
    run([sys.executable, "-m", "e4t_cli", "domains", "add", str(folder / "domain")], environment, ROOT)
    tiny = ("--tune-steps", "1", "--steps", "1") if workload.size != "sd14" else ()
    command = [
        *(sys.executable, "-m", "e4t_cli", "personalize", NAME, str(photo), "a photo of S*", "--base", str(folder)),
        *("--device", str(device), "--seed", "1", "--force", "-o", str(folder / "outputs"), *tiny),
    ]
    for graphs in ("", "1"):
        found = []
        for number in range(warm_up + rounds):
            one = run(command, {**environment, "E4T_CUDA_GRAPHS": graphs}, ROOT)
            print(f"{one.wall:.2f} s, {one.cpu:.2f} s of CPU, {dict(one.stages)}", flush=True)
            if number >= warm_up:  # the first compiles Python's files, and reads the weights into the system's cache
                found.append(one)
                key = "cold, graphs" if graphs else "cold"
                results.times(key, [each.wall for each in found])
                results.put("figures", f"{key}, stages", [dict(each.stages) for each in found])
