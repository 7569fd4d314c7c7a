"""The encoder of e4t-diffusion: another E than the paper's, the one that public weights exist for.

Departure: in place of [CLS] from every second layer it reads [CLS] and patches of the last layer.
With x_0 the [CLS] vector of the image, x_1 … every second of its patches, and v the pooled U-Net features,

    u = embed(v)                                        Linear · LeakyReLU · Linear
    E = final( LeakyReLU( mean_i  F_i · (J [x_i ; u] + j) + f_i ) )

Everything between x_i, u and the last LeakyReLU is linear. Split J = [J_x J_u], and the average is

    mean_i ( F_i (J_x x_i + j) + f_i )   +   (mean_i F_i) J_u · u

a vector that depends on the image only (`encode_image`) and a constant matrix. Sampling needs the vector, and 17 M of
the 231 M parameters on Stable Diffusion 1.x (`for_inference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from e4t_cli.nn.word_embedding_encoder import MAX_LAYERS, MAX_SIZE

# CLIP's normalization of pixels in 0 … 1, for visual towers of every size.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SLOPE = 0.01  # of both LeakyReLUs: torch's default
MAX_VECTORS = 1 << 14


class PatchTower(nn.Module):
    """An open_clip visual tower that returns [CLS] and every second patch.

    Args:
        visual: `open_clip.transformer.VisionTransformer` without its projection, untyped.
        size: side of the images it reads.
        normalised_patches: whether patches pass its last LayerNorm. open_clip returned them
            without when e4t-diffusion's weights were trained; later versions return them with it.
    """

    def __init__(self, visual: Any, size: int, *, normalised_patches: bool = False) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.size, self.normalised_patches = size, normalised_patches
        self.eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return (batch, vectors, width) in float32 for pixels in −1 … 1."""
        side = (self.size, self.size)  # without antialiasing and unclamped, as those weights were trained
        sized = functional.interpolate(pixels.float(), size=side, mode="bicubic", align_corners=True, antialias=False)
        mean, std = (sized.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        found = self.visual.forward_intermediates(
            (((sized + 1) / 2 - mean) / std).to(self.visual.conv1.weight.dtype),
            indices=1,  # the last layer
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        summary = self.visual.ln_post(found["image_intermediates_prefix"][0])
        patches = found["image_intermediates"][0]
        if self.normalised_patches:
            patches = self.visual.ln_post(patches)
        return torch.cat((summary, patches[:, 1::2]), dim=1).float()


@dataclass(frozen=True, kw_only=True)
class PatchEncoderConfig:
    """Sizes of a `PatchEncoder` and of the visual tower that belongs to it."""

    unet_width: int  # pooled U-Net features of all blocks, concatenated
    hidden_width: int  # of everything between the features and the embedding
    embedding_width: int  # of the base's token table
    tower_width: int  # also of its vectors
    tower_layers: int
    tower_heads: int
    tower_image_size: int  # pixels on a side
    tower_patch_size: int
    tower_mlp_ratio: float = 4.0  # width of its MLPs in units of its width
    tower_quick_gelu: bool = False  # x·sigmoid(1.702 x), as in OpenAI's models
    normalised_patches: bool = False  # whether patches pass the tower's last LayerNorm, as [CLS] always does

    @property
    def vectors(self) -> int:
        """Vectors of an image: [CLS] and the patches 1, 3, 5 …"""
        return 1 + (self.tower_image_size // self.tower_patch_size) ** 2 // 2

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for TOML or JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any]) -> Self:
        """Rebuild a config from `as_dict()`.

        Raises:
            TypeError, ValueError: an entry is missing, unknown, or no size.
        """
        config = cls(**sizes)
        for entry in fields(config):
            value = getattr(config, entry.name)
            if entry.type == "bool":
                fits = isinstance(value, bool)
            elif entry.type == "float":
                fits = isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 64
            else:
                limit = MAX_LAYERS if entry.name == "tower_layers" else MAX_SIZE
                fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= limit
            if not fits:
                raise ValueError(f"{entry.name} of an encoder cannot be {str(value)[:80]!r}")
        if config.tower_width % config.tower_heads:
            raise ValueError(f"{config.tower_heads} heads do not share a width evenly")
        if config.vectors > MAX_VECTORS:
            raise ValueError(f"{config.vectors} vectors of one image are too many")
        return config


class PatchEncoder(nn.Module):
    """E of e4t-diffusion, as it is trained: the F_i are one tensor, for an optimizer 2 tensors instead of 258."""

    reads_unet = True

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__()
        self.config = config
        count, hidden = config.vectors, config.hidden_width
        first = nn.Linear(config.unet_width, hidden)
        self.embed_unet = nn.Sequential(first, nn.LeakyReLU(SLOPE), nn.Linear(hidden, hidden))
        self.join_picture = nn.Linear(config.tower_width, hidden)  # J_x, j
        self.join_unet = nn.Linear(hidden, hidden, bias=False)  # J_u
        self.first_weights = nn.Parameter(torch.empty(count, hidden, hidden))  # F_i
        self.first_biases = nn.Parameter(torch.empty(count, hidden))  # f_i
        self.final = nn.Linear(hidden, config.embedding_width)
        bound = hidden**-0.5  # as nn.Linear initializes them
        nn.init.uniform_(self.first_weights, -bound, bound)
        nn.init.uniform_(self.first_biases, -bound, bound)

    def forward(self, image_features: Tensor, unet_features: Tensor) -> Tensor:
        """Return E(I_c) at this z_t, (batch, embedding_width).

        Args:
            image_features: [CLS] and patches (batch, vectors, tower_width).
            unet_features: pooled features, concatenated (batch, unet_width).
        """
        return self.predict_offset(self.encode_image(image_features), unet_features)

    def encode_image(self, image_features: Tensor) -> Tensor:
        """Return the image's contribution to the average, (batch, hidden_width)."""
        joined = self.join_picture(image_features)
        # One multiplication for each F_i, then their sum: never a second copy of all F_i.
        terms = torch.bmm(self.first_weights, joined.permute(1, 2, 0))  # (vectors, hidden, batch)
        return terms.mean(dim=0).T + self.first_biases.mean(dim=0)

    def predict_offset(self, encoded_image: Tensor, unet_features: Tensor | None) -> Tensor:
        """Return E for an encoded image and the current U-Net features."""
        assert unet_features is not None
        embedded = self.join_unet(self.embed_unet(unet_features))
        average = encoded_image + functional.linear(embedded, self.first_weights.mean(dim=0))
        offset: Tensor = self.final(functional.leaky_relu(average, SLOPE))
        return offset

    @torch.no_grad()
    def for_inference(self) -> InferencePatchEncoder:
        """Return an encoder with the same `predict_offset` and weights of its own, far fewer."""
        small = InferencePatchEncoder(self.config).to(self.first_weights.device)
        matrix = self.first_weights.mean(dim=0) @ self.join_unet.weight  # (mean_i F_i) J_u
        last = cast(nn.Linear, self.embed_unet[2])
        small.embed_unet.load_state_dict(self.embed_unet[0].state_dict())
        small.mix.weight.copy_(matrix @ last.weight)
        small.mix.bias.copy_(matrix @ last.bias)
        small.final.load_state_dict(self.final.state_dict())
        return small


class InferencePatchEncoder(nn.Module):
    """The part of a `PatchEncoder` that depends on z_t; the image's part is a constant vector."""

    reads_unet = True

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_width
        self.embed_unet = nn.Linear(config.unet_width, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.final = nn.Linear(hidden, config.embedding_width)

    def encode_image(self, image_features: Tensor) -> Tensor:
        """Raise TypeError: the layers that read an image are not there."""
        raise TypeError("use encode_image of the PatchEncoder that this one was made from")

    def predict_offset(self, encoded_image: Tensor, unet_features: Tensor | None) -> Tensor:
        """Return E for an encoded image and the current U-Net features."""
        assert unet_features is not None
        embedded = functional.leaky_relu(self.embed_unet(unet_features), SLOPE)
        mixed = functional.leaky_relu(encoded_image + self.mix(embedded), SLOPE)
        offset: Tensor = self.final(mixed)
        return offset

    def for_inference(self) -> InferencePatchEncoder:
        """Return itself."""
        return self
