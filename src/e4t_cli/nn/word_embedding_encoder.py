"""The word-embedding encoder E: from an image and a noisy latent to one embedding (section 3.1).

    e_c = e_domain + s · E(I_c)                                                          (eq. 1)

E averages a hierarchy of features, each through a linear layer of its own: the [CLS] token of "each 2nd CLIP layer"
(16 vectors of 1280 values from OpenCLIP's ViT-H/14), and the pooled output of each block of the U-Net's encoder.

    E = final( LeakyReLU( mean over the hierarchy of linear_i(feature_i) ) )

The image is the same in all steps of tuning and sampling, and nothing before the average is nonlinear, so its part of
the sum is one vector: `encode_image` once, `predict_offset` at every t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImageTower(nn.Module):
    """An open_clip visual tower that returns its hierarchy of [CLS] tokens (section 3.1).

    Args:
        visual: `open_clip.transformer.VisionTransformer`, untyped.
        mean, std: normalization of pixels in 0 … 1.
        size: side of the images it reads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: Any, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        super().__init__()
        # Paper silent: the backbone stays as CLIP training left it, so an image is encoded once.
        self.visual, self.size = visual.requires_grad_(False), size
        self.width: int = visual.class_embedding.shape[0]
        self.indices = list(range(1, len(visual.transformer.resblocks), 2))  # every 2nd layer
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, layers, width) in float32 for pixels in −1 … 1."""
        colours = (pixels.float() + 1) / 2
        if pixels.shape[-1] != self.size:
            side = (self.size, self.size)
            colours = functional.interpolate(colours, size=side, mode="bicubic", antialias=True).clamp(0, 1)
        found = self.visual.forward_intermediates(
            ((colours - self.mean.float()) / self.std.float()).to(self.visual.conv1.weight.dtype),
            indices=self.indices, stop_early=True,
            intermediates_only=True, output_fmt="NLC", output_extra_tokens=True,
        )["image_intermediates_prefix"]  # fmt: skip
        # Paper silent: through the tower's final LayerNorm, since raw [CLS] grows with depth.
        features: Tensor = self.visual.ln_post(torch.cat(found, dim=1))
        return features.float()


# Above every real width and depth; a manifest with a larger one is damaged.
MAX_SIZE, MAX_LAYERS = 1 << 16, 512


class Encoder(Protocol):
    """What tuning and sampling need of an encoder; `FixedEmbedding` is one without an image."""

    @property
    def reads_unet(self) -> bool: ...  # whether a feature pass is needed

    def encode_image(self, image_features: Tensor) -> Tensor: ...

    def predict_offset(self, encoded_image: Tensor, unet_features: Tensor | None) -> Tensor: ...

    def for_inference(self) -> Encoder:
        """Return an encoder with the same `predict_offset`, without what only training needs."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a `WordEmbeddingEncoder`; all follow from the base.

    `unet_widths` is empty for an encoder that reads the image only, the paper's ablation without iterative refinement.
    """

    image_layers: int  # [CLS] vectors per image, one per second layer of the visual tower
    image_width: int  # of the visual tower
    unet_widths: tuple[int, ...]  # of each pooled U-Net feature
    hidden_width: int  # of every entry of the hierarchy
    embedding_width: int  # of the base's token table

    def as_dict(self) -> dict[str, Any]:
        """Return plain values and lists, ready for TOML or JSON."""
        return {**asdict(self), "unet_widths": list(self.unet_widths)}

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any]) -> Self:
        """Rebuild a config from `as_dict()`.

        Raises:
            TypeError, ValueError: an entry is missing, unknown, or no size.
        """
        widths = sizes.get("unet_widths", ())
        if not isinstance(widths, list | tuple):
            raise ValueError("unet_widths is no list")
        config = cls(**{**sizes, "unet_widths": tuple(widths)})
        single = (value for key, value in asdict(config).items() if key != "unet_widths")
        for size in (*single, *config.unet_widths):
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MAX_SIZE:
                raise ValueError(f"{str(size)[:80]!r} is no size of an encoder")
        if max(config.image_layers, len(config.unet_widths)) > MAX_LAYERS:
            raise ValueError(f"an encoder reads at most {MAX_LAYERS} layers")
        return config


class WordEmbeddingEncoder(nn.Module):
    """E(I_c), the predicted offset from the domain's word embedding (section 3.1, eq. 1).

    >>> encoder(image_features, unet_features)     # (batch, embedding_width)
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_width
        self.image_linears = nn.ModuleList(nn.Linear(config.image_width, hidden) for _ in range(config.image_layers))
        # Paper silent: how the pooled features join the hierarchy. Read literally ("concatenated
        # with the hierarchical features ... before being passed to the rest of the encoder"),
        # they are further entries of it, each with a linear layer of its own.
        self.unet_linears = nn.ModuleList(nn.Linear(width, hidden) for width in config.unet_widths)
        self.activation = nn.LeakyReLU()  # Paper silent: slope 0.01, torch's default
        self.final = nn.Linear(hidden, config.embedding_width)
        # Paper silent: E = 0 initially, so a fresh encoder gives the descriptor's embedding.
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    @property
    def reads_unet(self) -> bool:
        return bool(self.unet_linears)

    def forward(self, image_features: Tensor, unet_features: Tensor | None) -> Tensor:
        """Return E(I_c) at this z_t.

        Args:
            image_features: [CLS] of each second layer (batch, image_layers, image_width).
            unet_features: pooled features, concatenated (batch, sum of unet_widths).
        """
        return self.predict_offset(self.encode_image(image_features), unet_features)

    def encode_image(self, image_features: Tensor) -> Tensor:
        """Return the image's contribution to the average, (batch, hidden_width)."""
        return self._share(self.image_linears, image_features.unbind(dim=1))

    def predict_offset(self, encoded_image: Tensor, unet_features: Tensor | None) -> Tensor:
        """Return E for an encoded image and the current U-Net features."""
        average = encoded_image
        if self.reads_unet:
            assert unet_features is not None
            # Paper silent: the spatial means range over two orders of magnitude between blocks
            # and noise levels, while [CLS] has passed a LayerNorm; so each is normalized, too.
            parts = torch.split(unet_features, list(self.config.unet_widths), dim=1)
            normalized = [functional.layer_norm(part, part.shape[-1:]) for part in parts]
            average = average + self._share(self.unet_linears, normalized)
        offset: Tensor = self.final(self.activation(average))
        return offset

    def for_inference(self) -> WordEmbeddingEncoder:
        """Return itself: nearly all of it is needed to sample."""
        return self

    def _share(self, linears: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
        """Return what these features contribute to the average over the whole hierarchy."""
        terms = [linear(feature) for linear, feature in zip(linears, features, strict=True)]
        return torch.stack(terms).sum(dim=0) / (len(self.image_linears) + len(self.unet_linears))


class FixedEmbedding(nn.Module):
    """An `Encoder` that reads nothing: the same offset for every image and time step.

    With zeros it gives the descriptor's embedding; with a rare word's difference from it, divided by s, DreamBooth's
    identifier; trained, Textual Inversion's vector.
    """

    reads_unet = False

    def __init__(self, offset: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(offset.detach().clone())  # E, (embedding_width,)

    def encode_image(self, image_features: Tensor) -> Tensor:
        """Return the batch size only, (batch, 0)."""
        return image_features.new_zeros(len(image_features), 0)

    def predict_offset(self, encoded_image: Tensor, unet_features: Tensor | None = None) -> Tensor:
        return self.offset.expand(len(encoded_image), -1)

    def for_inference(self) -> FixedEmbedding:
        return self
