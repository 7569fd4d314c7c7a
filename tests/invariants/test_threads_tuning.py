"""Invariants of threads: tunings that run at once give bit for bit what they give alone."""

import pytest
import torch

from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.training.tuning import TuningOptions, tune
from tests.threads import at_once, switch_often  # noqa: F401

pytestmark = pytest.mark.usefixtures("switch_often")


@pytest.mark.parametrize("which", ["shared", "apart"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("methods", [("full", "full"), ("full", "lora")])
def test_concurrent_tunings_equal_sequential_ones(model, base_folder, domain_weights, face, methods, autocast, which):
    """Of two models, and of one that both copy (without `consume`)."""
    models = [model, model if which == "shared" else TextToImageModel.load(base_folder)]

    def work(index):
        config = domain_weights.tuning.replace(method=methods[index], steps=4)
        models[index].__dict__.pop("uncond_embeds", None)  # computed again, by the first thread
        losses = []
        tuned = tune(
            models[index], domain_weights, face, config, seed=index,
            options=TuningOptions(autocast=autocast),
            on_progress=lambda event: losses.append(event.values["loss"]),
        )  # fmt: skip
        return losses, [
            *tuned.unet.state_dict().values(),
            *tuned.encoder.state_dict().values(),
            tuned.encoded_image,
        ]

    expected = [work(0), work(1)]
    for (losses, weights), (plain_losses, plain) in zip(
        at_once(lambda: work(0), lambda: work(1)), expected, strict=True
    ):
        assert losses == plain_losses
        assert all(map(torch.equal, weights, plain))
