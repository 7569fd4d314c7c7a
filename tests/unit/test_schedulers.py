"""Schedulers: their names, and that every one samples a known distribution, whatever the number of steps."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from e4t_cli.errors import UsageError
from e4t_cli.sampling import make_scheduler
from e4t_cli.schedulers import (
    CLASSES,
    FURTHER,
    LEAST,
    NAMES,
    SCHEDULERS,
    UNUSABLE,
    WHOLE_STRIDES,
    ZERO_SNR,
    SamplingConfig,
    scheduler_class,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
# As `mini` and as Stable Diffusion 1 and 2 state it.
BASES = {
    "leading": {**SCHEDULE, "timestep_spacing": "leading"},
    "offset 1": {**SCHEDULE, "steps_offset": 1},
    "v": {**SCHEDULE, "steps_offset": 1, "prediction_type": "v_prediction"},
}
ZERO = {**SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
FURTHER_CASES = [(name, "leading") for name in FURTHER]
MEAN, SPREAD = 1.0, 0.5  # of the data


def model_of(config):
    return SimpleNamespace(noise_schedule=DDPMScheduler.from_config(config), train_timesteps=1000)


def sample_normal(config, name, steps, count=4000):
    """Sample with a model that knows its data, a normal distribution; returns mean and deviation of the result."""
    model = model_of(config)
    scheduler = make_scheduler(model, SamplingConfig(steps=steps, scheduler=name))
    known, source = model.noise_schedule.alphas_cumprod.double(), torch.Generator().manual_seed(0)
    z_t = torch.randn(1, 1, 1, count, generator=source) * scheduler.init_noise_sigma
    options = {"generator": source} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        below = int(t)
        alpha_bar = torch.lerp(known[below], known[min(below + 1, 999)], float(t) - below)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noisy = scheduler.scale_model_input(z_t, t).double()
        variance = alpha_bar * SPREAD**2 + noise**2
        epsilon = noise * (noisy - signal * MEAN) / variance
        z_0 = MEAN + SPREAD**2 * signal * (noisy - signal * MEAN) / variance
        v = config.get("prediction_type") == "v_prediction"
        prediction = signal * epsilon - noise * z_0 if v else epsilon
        z_t = scheduler.step(prediction.float(), t, z_t, **options).prev_sample
    return z_t.mean().item(), z_t.std().item()


def allowed(name, steps):
    kind = scheduler_class(name)[0]
    if kind in WHOLE_STRIDES and steps == 334:
        return False
    return LEAST.get(name, LEAST.get(kind, 1)) <= steps <= (500 if kind in WHOLE_STRIDES else 1000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "base"), [*((name, base) for name in SCHEDULERS for base in BASES), *FURTHER_CASES])
def test_every_number_of_steps_gives_an_image_without_noise(name, base):
    """One step gives the mean of the data; more of them the distribution, which noise would move towards (0, 1)."""
    for steps in filter(lambda steps: allowed(name, steps), (1, 2, 4, 20, 61)):
        mean, spread = sample_normal(BASES[base], name, steps, count=1000)
        assert mean == pytest.approx(MEAN, abs=0.15), (steps, mean)
        assert spread < 0.66, (steps, spread)
        if steps >= 20:
            assert spread == pytest.approx(SPREAD, abs=0.12), (steps, spread)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [*SCHEDULERS, *FURTHER])
@pytest.mark.parametrize("steps", [122, 250, 499, 500, 501, 600, 998, 999, 1000])
def test_many_steps(base, name, steps):
    if allowed(name, steps):
        mean, spread = sample_normal(BASES[base], name, steps, count=1000)
        assert mean == pytest.approx(MEAN, abs=0.15) and spread == pytest.approx(SPREAD, abs=0.08)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_time_steps_are_those_of_the_base(base, name):
    last = 999
    for steps in filter(lambda steps: allowed(name, steps), (1, 4, 5, 9, 12, 20, 61, 103, 250, 334, 500, 501, 1000)):
        found = make_scheduler(model_of(BASES[base]), SamplingConfig(steps=steps, scheduler=name)).timesteps
        assert found.min() >= 0 and found.max() <= last, steps
        assert found.max() >= 900, steps
        if "karras" not in name:
            assert len(set(found.tolist())) >= steps


def test_the_usual_numbers_of_steps_have_the_spacing_of_the_base():
    """12 and 20 steps of `mini` are what its scores were measured with; see docs/mini.md."""
    for name, (kind, options) in SCHEDULERS.items():
        for steps in (12, 20, 50):
            plain = getattr(diffusers, kind).from_config(DDPMScheduler.from_config(BASES["leading"]).config, **options)
            plain.set_timesteps(steps)
            if allowed(name, steps):
                found = make_scheduler(model_of(BASES["leading"]), SamplingConfig(steps=steps, scheduler=name))
                assert torch.equal(found.timesteps, plain.timesteps), (name, steps)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (name, steps)
        for name in SCHEDULERS for steps in (1, 2, 4, 20, 61)
        if SCHEDULERS[name][0] in ZERO_SNR and allowed(name, steps)
    ],
)  # fmt: skip
def test_a_base_that_begins_at_pure_noise(name, steps):
    scheduler = make_scheduler(model_of(ZERO), SamplingConfig(steps=steps, scheduler=name))
    assert scheduler.timesteps[0] == 999
    mean, spread = sample_normal(ZERO, name, steps)
    assert mean == pytest.approx(MEAN, abs=0.1) and spread < 0.6


# ── names ──


def test_the_names_are_those_that_diffusers_lists():
    listed = set(DDIMScheduler._compatibles) & set(PNDMScheduler._compatibles) & set(DDPMScheduler._compatibles)
    assert set(CLASSES) | set(UNUSABLE) == listed == set(DDPMScheduler._compatibles)
    assert not set(CLASSES) & set(UNUSABLE) and set(NAMES) == set(SCHEDULERS) | set(CLASSES)
    for name in NAMES:
        assert issubclass(getattr(diffusers, scheduler_class(name)[0]), diffusers.SchedulerMixin)
    rescales = {
        one for one in CLASSES if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, one)).parameters
    }
    assert rescales == set(ZERO_SNR)


def test_every_other_scheduler_of_diffusers_is_refused():
    others = {name for name in dir(diffusers) if name.endswith("Scheduler")} - set(NAMES)
    assert len(others) > 30
    for name in [*others, "SchedulerMixin", "UNet2DConditionModel", "DDIM", "", "DPM++", "x\x1b"]:
        with pytest.raises(UsageError) as caught:
            SamplingConfig(scheduler=name)
        assert caught.value.exit_code == 2 and caught.value.hint and "\x1b" not in str(caught.value)


def test_a_class_has_the_options_of_its_short_name():
    assert scheduler_class("PNDMScheduler") == scheduler_class("pndm")
    assert scheduler_class("DPMSolverMultistepScheduler") == scheduler_class("dpm++")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 1001}, "1 to 1000"),
        ({"steps": 501, "scheduler": "ddim"}, "at most 500"),
        ({"steps": 1000, "scheduler": "PNDMScheduler"}, "at most 500"),
        ({"steps": 1, "scheduler": "heun"}, "at least 4"),
        ({"steps": 15, "scheduler": "pndm"}, "at least 16"),
    ],
)
def test_numbers_of_steps_that_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says) as caught:
        SamplingConfig(**wrong)
    assert "--steps" in caught.value.hint


def test_a_base_can_have_fewer_time_steps():
    with pytest.raises(UsageError, match="at most 100"):
        SamplingConfig(steps=101).check_schedule({"num_train_timesteps": 100})
    SamplingConfig(steps=100).check_schedule({"num_train_timesteps": 100})
    with pytest.raises(UsageError, match="begins at pure noise") as caught:
        SamplingConfig(scheduler="heun").check_schedule(ZERO)
    assert "ddim" in caught.value.hint


def test_steps_of_a_fraction_are_refused():
    """Where a step is a whole number of time steps long, 334 of them would go two thirds of the way."""
    for name in ("ddim", "pndm"):
        for steps in (20, 50, 100, 111, 250, 333, 500):
            SamplingConfig(steps=steps, scheduler=name)
        for steps, near in ((334, "333 or 500"), (400, "333 or 500"), (170, "166 or 200")):
            with pytest.raises(UsageError, match=f"cannot take {steps} ") as caught:
                SamplingConfig(steps=steps, scheduler=name)
            assert caught.value.hint == f"--steps {near}"
    SamplingConfig(steps=334, scheduler="dpm++")
