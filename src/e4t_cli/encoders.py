"""The kinds of encoder that a pack can hold, by the word in its card.

    e4t             the paper's reading: [CLS] of every second layer of the base's own image tower
    e4t-diffusion   [CLS] and patches of a fine-tuned tower that travels with the pack

This is the only place that knows them all; everything else meets an `Encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import IntegrityError
from .nn.patch_encoder import PatchEncoder, PatchEncoderConfig
from .nn.patch_tower import PatchTower
from .nn.word_embedding_encoder import EncoderConfig, WordEmbeddingEncoder
from .pack_files import check_file

PackEncoder = WordEmbeddingEncoder | PatchEncoder
"""An encoder that can be trained, saved and loaded."""

_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "e4t": (EncoderConfig, WordEmbeddingEncoder),
    "e4t-diffusion": (PatchEncoderConfig, PatchEncoder),
}
_FIRST = "e4t"  # what a card means that does not say: the first packs were written so


def describe_encoder(encoder: PackEncoder) -> dict[str, Any]:
    """Return its architecture and sizes, ready for a card."""
    for name, (_, kind) in _KINDS.items():
        if isinstance(encoder, kind):
            return {"architecture": name, **encoder.config.as_dict()}
    raise TypeError(f"a pack cannot hold a {type(encoder).__name__}")


def empty_encoder(described: Mapping[str, Any]) -> PackEncoder:
    """Build the encoder that a card describes, its weights on the meta device.

    Raises:
        TypeError, ValueError: the architecture is unknown, or a size is none.
    """
    sizes = dict(described)
    name = sizes.pop("architecture", _FIRST)
    if name not in _KINDS:
        raise ValueError(f"the architecture {name!r} is unknown; a newer e4t may know it")
    config_kind, kind = _KINDS[name]
    with torch.device("meta"):
        return kind(config_kind.from_dict(sizes))


def widths_read(encoder: PackEncoder) -> tuple[int, int]:
    """Return how many pooled U-Net features it reads, and the width of the word it predicts."""
    config = encoder.config
    if isinstance(config, PatchEncoderConfig):
        return config.unet_width, config.embedding_width
    return sum(config.unet_widths), config.embedding_width


@dataclass(frozen=True, kw_only=True)
class PackTower:
    """The image tower that travels with a pack, on disk until somebody looks through it.

    Args:
        path: its safetensors file.
        config: of the encoder it belongs to.
        sha256: of the file, as the pack's card says; "" for one that is being made.
    """

    path: Path
    config: PatchEncoderConfig
    sha256: str = ""

    def look(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what it sees of pictures in −1 … 1: (batch, vectors, tower_width), float32.

        The tower is a third of all weights and needed once for a photo: it is loaded for the
        look, on the device of the pixels, and let go after it. Its hash is compared here, so
        that drawing a saved concept does not read a gigabyte for nothing.

        Raises:
            IntegrityError: the file is no such tower, or another than the card says.
        """
        if self.sha256:
            check_file(self.path.parent, self.path.name, self.sha256)
        visual = empty_tower(self.config)
        try:
            visual.load_state_dict(load_file(self.path), strict=True, assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise IntegrityError(f"{self.path.name} is not the pack's tower: {error}") from error
        tower = PatchTower(
            visual,
            self.config.tower_image_size,
            normalised_patches=self.config.normalised_patches,
        )
        return tower.to(pixels.device, dtype)(pixels)


def empty_tower(config: PatchEncoderConfig) -> nn.Module:
    """Build open_clip's vision transformer of those sizes, its weights on the meta device."""
    from open_clip.transformer import QuickGELU, VisionTransformer  # only who looks pays for it

    with torch.device("meta"):
        visual = VisionTransformer(
            image_size=config.tower_image_size,
            patch_size=config.tower_patch_size,
            width=config.tower_width,
            layers=config.tower_layers,
            heads=config.tower_heads,
            mlp_ratio=config.tower_mlp_ratio,
            act_layer=QuickGELU if config.tower_quick_gelu else nn.GELU,
        )
    visual.proj = None  # e4t-diffusion looks before the projection to CLIP's common space
    return visual
