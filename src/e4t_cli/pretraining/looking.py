"""How pre-training looks at pictures, kept or not: what it keeps of one, and how many at a time."""

from __future__ import annotations

from collections.abc import Iterable

from e4t_cli.base_model import TextToImageModel
from e4t_cli.domain import PreparedImage
from e4t_cli.progress import ProgressCallback
from e4t_cli.sources.lookalikes import SIGNATURE

from .encoding import EncodedRows, encode_images


def bytes_per_picture(model: TextToImageModel, *, mask: bool) -> int:
    """Return what a picture takes in the cache."""
    channels, height, width = model.latent_shape
    tower = model.image_tower
    numbers = 2 * channels * height * width + len(tower.indices) * tower.width
    return 2 * (numbers + (height * width if mask else 0)) + 33 + SIGNATURE


def look(
    model: TextToImageModel,
    pictures: Iterable[PreparedImage],
    on_progress: ProgressCallback | None = None,
) -> EncodedRows:
    """Return what training sees of prepared pictures, in their order."""
    # The VAE's first layers are the largest tensors of all: about eight pictures of 512 pixels.
    batch = max(1, min(32, 8 * 512**2 // model.resolution**2))
    found = encode_images(model, pictures, batch_size=batch, on_progress=on_progress)
    return EncodedRows(
        means=found.means,
        logvars=found.logvars,
        image_features=found.image_features,
        masks=found.masks,
    )
