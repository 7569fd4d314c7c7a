"""The FLOP of one pre-training step of Stable Diffusion 1.4, counted on the meta device."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.pretraining.batches import PretrainingLoss, SampleBatch
from tests.invariants.test_full_size_invariants import (  # noqa: F401
    encoder,
    stable_diffusion,
    tokens,
)

BATCH = 16


def test_one_pretraining_step(stable_diffusion, encoder):  # noqa: F811
    """At most 2.4 TFLOP per image with latents and [CLS] features cached, 3.9 without.

    Of weights only encoder and offsets get gradients: the base's would be 0.85 TFLOP more.
    """
    model, unet = stable_diffusion, stable_diffusion.unet
    unet.requires_grad_(False)
    with torch.device("meta"):
        offsets = WeightOffsets.for_unet(unet)
    objective = PretrainingLoss(
        model, unet, encoder, offsets,
        e_domain=torch.empty(768, device="meta"), scale=0.1,
    )  # fmt: skip
    latents = torch.empty(BATCH, 4, 64, 64, device="meta")
    samples = SampleBatch(
        z_0=latents,
        timesteps=torch.zeros(BATCH, dtype=torch.long, device="meta"),
        epsilon=latents,
        image_features=torch.empty(BATCH, 16, 1280, device="meta"),
        tokens=tokens(BATCH),
    )
    with offsets.attached_to(unet), FlopCounterMode(display=False) as step:
        objective(samples).total(0.01).backward()
    trained = {id(weight) for weight in objective.parameters()}
    assert all(weight.grad is not None for weight in objective.parameters())
    for module in (model.unet, model.vae, model.text_encoder, model.image_tower):
        for weight in module.parameters():
            assert id(weight) in trained or weight.grad is None
    pixels = torch.empty(1, 3, 512, 512, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        model.posterior(pixels)
        model.image_features(pixels)
    cached, encoded = step.get_total_flops() / BATCH, encoding.get_total_flops()
    assert 2.0e12 < cached <= 2.4e12
    assert 3.4e12 < cached + encoded <= 3.9e12
    # What is cached of an image, in half precision: 107 kB.
    kept = 2 * (2 * latents[0].numel() + samples.image_features[0].numel())
    assert kept == 106_496
    # What processes exchange in a step: gradients of what learns, and of nothing else.
    assert 178e6 < sum(weight.numel() for weight in objective.parameters()) < 190e6
