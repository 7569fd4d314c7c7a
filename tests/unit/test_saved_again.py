"""A base that diffusers saved again, with its own sampler or another: the same fingerprint, and the same images."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from e4t_cli.hub.bases import find_base
from e4t_cli.models.denoiser import TunedModel
from e4t_cli.models.fingerprints import weights_fingerprint
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents, make_scheduler
from e4t_cli.schedulers import LEAST, SCHEDULERS, SamplingConfig
from tests.single_files import write_small_file

# As Stable Diffusion 1 states it on the hub: without timestep_spacing.
PUBLISHED = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SAMPLERS = {
    "its own": lambda config: None,
    "ddim": DDIMScheduler.from_config,
    "dpm++": DPMSolverMultistepScheduler.from_config,
    "dpm++-karras": lambda config: DPMSolverMultistepScheduler.from_config(
        config, use_karras_sigmas=True, solver_order=3, thresholding=True
    ),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = write_small_file(tmp_path_factory.mktemp("published")).folder
    for path in folder.glob("*/*.fp16.safetensors"):
        path.rename(path.with_name(path.name.replace(".fp16", "")))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED))
    return folder


def loaded(folder):
    return TextToImageModel.load(folder)


def settings(model, name, steps):
    scheduler = make_scheduler(model, SamplingConfig(steps=steps, scheduler=name))
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}, scheduler.timesteps


def latents(model):
    prompt, plain = parse_prompt("a face", require_placeholder=False), TunedModel.plain(model, "face")
    return generate_latents(model, plain, [prompt], [1], SamplingConfig(steps=6, guidance=2.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("sampler", "twice"), [("its own", False), ("dpm++", False), ("ddim", True), ("dpm++-karras", True)]
)
def test_of_stable_diffusion(published, tmp_path, sampler, twice):
    pipeline = StableDiffusionPipeline.from_pretrained(published, local_files_only=True)
    if twice:
        pipeline.save_pretrained(tmp_path / "first")
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "first", local_files_only=True)
    pipeline.scheduler = SAMPLERS[sampler](pipeline.scheduler.config) or pipeline.scheduler
    pipeline.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert written["timestep_spacing"] in ("leading", "linspace")
    assert weights_fingerprint(tmp_path / "again") == weights_fingerprint(published)
    one, other = loaded(published), loaded(tmp_path / "again")
    for name in SCHEDULERS:
        for steps in (LEAST.get(name, 4), 20):
            if steps < LEAST.get(SCHEDULERS[name][0], 1):
                continue
            (config, timesteps), (again, others) = settings(one, name, steps), settings(other, name, steps)
            assert config == again and torch.equal(timesteps, others), (name, steps)
    assert torch.equal(latents(one), latents(other))


def test_stable_diffusion_is_sampled_as_diffusers_does(published):
    """By `from_config` from the published scheduler, as its documentation advises."""
    theirs = DPMSolverMultistepScheduler.from_config(
        StableDiffusionPipeline.from_pretrained(published, local_files_only=True).scheduler.config
    )
    theirs.set_timesteps(20)
    _, own = settings(loaded(published), "dpm++", 20)
    assert torch.equal(own, theirs.timesteps) and own[0] == 999


def test_of_mini(tmp_path):
    """Its sampler is that of training, DDPM, whose spacing counts: its scores were measured with it."""
    mini = find_base("mini").folder
    pipeline = StableDiffusionPipeline.from_pretrained(mini, local_files_only=True)
    pipeline.save_pretrained(tmp_path / "again")
    path = tmp_path / "again" / "scheduler" / "scheduler_config.json"
    silent = {key: value for key, value in json.loads(path.read_text()).items() if key != "timestep_spacing"}
    one, other = loaded(mini), loaded(tmp_path / "again")
    images = latents(one)
    assert torch.equal(images, latents(other))
    path.write_text(json.dumps(silent))
    assert torch.equal(images, latents(loaded(tmp_path / "again")))
    assert settings(one, "dpm++", 20)[0]["timestep_spacing"] == "leading"


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_trailing_is_nobodys_default_and_counts(published, tmp_path, kind):
    path = tmp_path / "again" / "scheduler" / "scheduler_config.json"
    shutil.copytree(published, tmp_path / "again")
    path.write_text(json.dumps({**PUBLISHED, "_class_name": kind, "timestep_spacing": "trailing"}))
    assert settings(loaded(tmp_path / "again"), "dpm++", 20)[0]["timestep_spacing"] == "trailing"
