"""What tuning leaves: a base that knows one concept.

ε_θ under guidance, the concept's word predicted anew from every noisy picture (section 3.1).

    z_t ─ U-Net encoder, "" ─> pooled features ─> E ─> e_c ─ text encoder ─> prompt ─> ε_θ

Under classifier-free guidance with an empty negative prompt the first arrow is half of the
unconditional branch, so the refinement costs 1 % of plain Stable Diffusion's work, not 33 %:
unconditional way down -> features -> embedding -> text -> conditional way down -> both ways up
in one batch. Everything about the picture and ΔW was folded into constants before the loop.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.unet import UNetState, down_and_mid, embed_latents, pooled_features, up_and_out
from e4t_cli.nn.word_embedding_encoder import Encoder, FixedEmbedding


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
    encoded_image: Tensor
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
        offset = self.encoder.predict_offset(self.encoded_image.expand(batch, -1), unet_features)
        return self.e_domain + self.scale * offset

    def with_fixed_embedding(self, e_c: Tensor) -> Self:
        """Return the same model with one embedding (embedding_width,) for all time steps."""
        encoder = FixedEmbedding((e_c - self.e_domain) / self.scale)
        return replace(self, encoder=encoder, encoded_image=self.encoded_image.new_zeros(1, 0))

    @torch.no_grad()
    def at_concept_scale(self, base: nn.Module, concept_scale: float) -> Self:
        """Return the same model with so much of what it learned: W₀ + k (W - W₀), and k E.

        Departure: the paper has no such control. Less than 1 leaves a prompt more room, more than
        1 insists on the photo; 0 is the base, which draws any face.

        Args:
            base: the U-Net that was tuned, as it was.
            concept_scale: k.
        """
        if concept_scale == 1:
            return self
        unet = copy.deepcopy(self.unet)
        for learned, before in zip(unet.parameters(), base.parameters(), strict=True):
            # In float32: k times what tuning changed is less than one spacing of half precision.
            learned.copy_(torch.lerp(before.float(), learned.float(), concept_scale))
        return replace(self, unet=unet, scale=self.scale * concept_scale)

    @classmethod
    def plain(cls, model: TextToImageModel, descriptor: str) -> Self:
        """Return the base as it is, with a plain word in the concept's place."""
        token = model.descriptor_id(descriptor)
        e_domain = model.word_embedding(token)
        return cls(
            unet=model.unet,
            encoder=FixedEmbedding(torch.zeros_like(e_domain)),
            encoded_image=e_domain.new_zeros(1, 0),
            e_domain=e_domain,
            descriptor_id=token,
            scale=1.0,
        )


class CFGDenoiser:
    """ε_θ of one batch of prompts under guidance, with e_c predicted anew from every z_t."""

    def __init__(
        self,
        model: TextToImageModel,
        tuned: TunedModel,
        tokens: Tokens,
        *,
        guidance: float,
        negative_prompt: str = "",
    ) -> None:
        self.model, self.tuned, self.tokens = model, tuned, tokens
        self.guidance = guidance
        self.count = len(tokens.ids)
        self.empty = self._repeated(model.uncond_embeds)
        if negative_prompt.strip():
            negative = model.tokenize([negative_prompt], tuned.descriptor_id)
            self.negative = self._repeated(model.embed_prompts(negative))
        else:
            self.negative = self.empty
        self.text = None if tuned.encoder.reads_unet else self._text(None)

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        unet = self.tuned.unet
        # The stem sees no text: every pass below begins with it.
        start = embed_latents(unet, z_t, t)
        unconditional = None
        if self.guidance != 1:
            unconditional = down_and_mid(unet, start, self.negative)
        text = self.text if self.text is not None else self._refined(start, unconditional)
        conditional = down_and_mid(unet, start, text)
        if unconditional is None:
            return up_and_out(unet, conditional, text)
        both = up_and_out(
            unet,
            UNetState.cat((unconditional, conditional)),
            torch.cat((self.negative, text)),
        )
        without, with_text = both.chunk(2)
        return without + self.guidance * (with_text - without)

    def _refined(self, start: UNetState, unconditional: UNetState | None) -> Tensor:
        """Look at z_t, predict e_c (eq. 1), and read the prompts with it."""
        looked = unconditional if self.negative is self.empty else None
        if looked is None:
            looked = down_and_mid(self.tuned.unet, start, self.empty)
        return self._text(pooled_features(looked).float())

    def _text(self, features: Tensor | None) -> Tensor:
        e_c = self.tuned.embedding(features).expand(self.count, -1)
        return self.model.embed_prompts(self.tokens, e_c).to(self.tuned.unet.dtype)

    def _repeated(self, text: Tensor) -> Tensor:
        return text.to(self.tuned.unet.dtype).expand(self.count, -1, -1)
