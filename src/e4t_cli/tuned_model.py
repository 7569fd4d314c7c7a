"""What tuning leaves: a base that knows one concept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from .base_model import TextToImageModel
from .nn.word_embedding_encoder import Encoder, FixedEmbedding


@dataclass(frozen=True, kw_only=True, eq=False)
class TunedModel:
    """A base that knows one concept: everything that drawing it needs.

    Args:
        unet: a plain diffusers U-Net, offsets merged.
        encoder: E of eq. 1, tuned.
        folded: the picture's contribution to E (1, hidden), from `encoder.fold`.
        e_domain: embedding of the descriptor (embedding_width,).
        descriptor_id: its token.
        scale: s of eq. 1.
        adapters: what was tuned, if it was adapters; merged into both already.
    """

    unet: nn.Module
    encoder: Encoder
    folded: Tensor
    e_domain: Tensor
    descriptor_id: int
    scale: float
    adapters: Mapping[str, Tensor] = field(default_factory=dict)

    def embedding(self, unet_features: Tensor | None) -> Tensor:
        """Return e_c = e_domain + s · E (eq. 1), (batch, embedding_width).

        Args:
            unet_features: pooled features of the current z_t (batch, …); None for an encoder that
                does not read them, which then gives one embedding.
        """
        batch = 1 if unet_features is None else len(unet_features)
        offset = self.encoder.refine(self.folded.expand(batch, -1), unet_features)
        return self.e_domain + self.scale * offset

    def with_fixed_word(self, e_c: Tensor) -> Self:
        """Return the same model with one embedding (embedding_width,) for all time steps."""
        encoder = FixedEmbedding((e_c - self.e_domain) / self.scale)
        return replace(self, encoder=encoder, folded=self.folded.new_zeros(1, 0))

    @torch.no_grad()
    def at_strength(self, base: nn.Module, strength: float) -> Self:
        """Return the same model with so much of what it learned: W₀ + k (W - W₀), and k E.

        Departure: the paper has no such control. Less than 1 leaves a prompt more room, more than
        1 insists on the photo; 0 is the base, which draws any face.

        Args:
            base: the U-Net that was tuned, as it was.
            strength: k.
        """
        if strength == 1:
            return self
        unet = copy.deepcopy(self.unet)
        for learned, before in zip(unet.parameters(), base.parameters(), strict=True):
            # In float32: k times what tuning changed is less than one spacing of half precision.
            learned.copy_(torch.lerp(before.float(), learned.float(), strength))
        return replace(self, unet=unet, scale=self.scale * strength)

    @classmethod
    def plain(cls, model: TextToImageModel, descriptor: str) -> Self:
        """Return the base as it is, with a plain word in the concept's place."""
        token = model.descriptor_id(descriptor)
        e_domain = model.word_embedding(token)
        return cls(
            unet=model.unet,
            encoder=FixedEmbedding(torch.zeros_like(e_domain)),
            folded=e_domain.new_zeros(1, 0),
            e_domain=e_domain,
            descriptor_id=token,
            scale=1.0,
        )
