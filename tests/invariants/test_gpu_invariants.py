"""Invariants on a real GPU: `pytest -m gpu`, and a part of `python -m benchmarks.gpu`.

E4T_TEST_DEVICE=cpu runs the same code without one, for a rehearsal.
"""

import os

import pytest
import torch

from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.prompts import parse_prompt
from e4t_cli.sampling import generate_latents
from e4t_cli.schedulers import SamplingConfig
from e4t_cli.training.memory import Plan
from e4t_cli.training.tuning import TuningOptions, tune

DEVICE = os.environ.get("E4T_TEST_DEVICE", "cuda")
PROMPTS = [parse_prompt("S* on the beach"), parse_prompt("a photo of S*")]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def on_device(base_folder):
    return TextToImageModel.load(base_folder, device=DEVICE, dtype=torch.float32)


def weights_of(tuned):
    return [value.float().cpu() for value in (*tuned.unet.state_dict().values(), *tuned.encoder.state_dict().values())]


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_captured_tuning_gives_the_same_model(on_device, domain_weights, face, monkeypatch, method, micro_batch):
    config = domain_weights.tuning.replace(method=method, steps=6)

    def tuned(graphs):
        monkeypatch.setenv("E4T_CUDA_GRAPHS", graphs)
        notes = []
        found = tune(
            on_device, domain_weights, face, config, seed=3,
            options=TuningOptions(plan=Plan(micro_batch=micro_batch)),
            on_progress=lambda progress: notes.append(progress.note),
        )  # fmt: skip
        assert not any(notes), notes  # it was captured, if it could be
        return weights_of(found)

    # Atomic additions may come in another order in two runs; AdamW makes a step of the rate from any sign.
    for captured, eager in zip(tuned("1"), tuned("0"), strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)


def test_captured_sampling_gives_the_same_latents(on_device, domain_weights, face, monkeypatch):
    tuned = tune(on_device, domain_weights, face, domain_weights.tuning.replace(steps=0))

    def drawn(graphs):
        monkeypatch.setenv("E4T_CUDA_GRAPHS", graphs)
        return generate_latents(on_device, tuned, PROMPTS, [1, 2], SamplingConfig(steps=8)).cpu()

    torch.testing.assert_close(drawn("1"), drawn("0"), rtol=1e-3, atol=1e-3)


def test_tuning_on_the_device_is_that_of_the_cpu(on_device, model, domain_weights, face):
    config = domain_weights.tuning.replace(steps=2)
    exact = TuningOptions(autocast=False)
    there = weights_of(tune(on_device, domain_weights, face, config, seed=3, options=exact))
    here = weights_of(tune(model, domain_weights, face, config, seed=3, options=exact))
    apart = [(a - b).abs().mean() for a, b in zip(there, here, strict=True) if a.numel()]
    assert max(apart) < 2 * config.learning_rate * config.steps
