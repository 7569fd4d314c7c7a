"""How long pre-training takes before anybody has started it: counted work over assumed speed."""

from __future__ import annotations

from .recipes import PretrainingRecipe

# Forward and backward of one 512-pixel picture with only W_q, W_k, W_v and offsets in training,
# counted on Stable Diffusion 1.4's configs; the pictures were looked at beforehand (pretraining/):
#   U-Net 1.768 + feature pass 0.576 + text encoder 0.027 = 2.371 TFLOP
TFLOP_PER_PICTURE = 1.768 + 0.576 + 0.027
COUNTED_AT = 512
# bfloat16 matrix products, TFLOP per second: the H200's measured, the A100's from published runs.
SPEEDS = {"A100": 250.0, "H200": 790.0}
SHARE = 0.5  # of that speed which a training loop reaches


def pretraining_hours(recipe: PretrainingRecipe, gpu: str, resolution: int = COUNTED_AT) -> float:
    """Return the hours of one GPU that a recipe takes on a Stable Diffusion, an estimate.

    face: 30,000 steps × 16 × 2.371 TFLOP = 1.14e6 TFLOP; ÷ (0.5 × 250) = 9,100 s = 2.5 A100 hours.

    Args:
        resolution: side of the pictures; work is taken to grow with their area, though attention
            grows faster.
    """
    area = (resolution / COUNTED_AT) ** 2
    work = recipe.steps * recipe.batch_size * TFLOP_PER_PICTURE * area
    return work / (SHARE * SPEEDS[gpu]) / 3600


def shown_hours(recipe: PretrainingRecipe, resolution: int = COUNTED_AT) -> str:
    """Return the estimate as a phrase: "about 5.1 hours of an A100, 1.6 of an H200"."""
    first, *others = (
        f"{pretraining_hours(recipe, gpu, resolution):.1f} of an {gpu}" for gpu in SPEEDS
    )
    return ", ".join([f"about {first.replace(' of', ' hours of')}", *others])
