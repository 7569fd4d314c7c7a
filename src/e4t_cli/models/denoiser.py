"""A base tuned to one concept, and its ε_θ under classifier-free guidance (section 3.1).

The concept's embedding is predicted anew from every noisy latent:

    z_t ─ U-Net encoder, "" ─> pooled features ─> E ─> e_c ─ text encoder ─> prompt ─> ε_θ

The unconditional pass already computes the U-Net features where the negative prompt is empty, so refinement costs 1 %
of plain Stable Diffusion's work, not 33 %: unconditional down blocks -> features -> embedding -> text -> conditional
down blocks -> all up blocks in one batch. The image's part of E and ΔW are constants, computed before the loop.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from e4t_cli.errors import UsageError
from e4t_cli.models.prompt_embedding import Tokens
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.unet import UNetState, down_and_mid, embed_latents, pooled_features, up_and_out
from e4t_cli.nn.word_embedding_encoder import Encoder, FixedEmbedding
from e4t_cli.prompts import Prompt
from e4t_cli.schedulers import has_zero_snr


@dataclass(frozen=True, kw_only=True, eq=False)
class TunedModel:
    """A base tuned to one concept: everything that sampling it needs."""

    unet: UNet2DConditionModel  # a plain one, offsets merged
    encoder: Encoder  # E of eq. 1, tuned
    encoded_image: Tensor  # the image's contribution to E (1, hidden), from `encoder.encode_image`
    e_domain: Tensor  # embedding of the descriptor (embedding_width,)
    descriptor_id: int  # its token
    scale: float  # s of eq. 1
    adapters: Mapping[str, Tensor] = field(default_factory=dict)  # if trained; already merged into both

    def embedding(self, unet_features: Tensor | None) -> Tensor:
        """Return e_c = e_domain + s · E (eq. 1), (batch, embedding_width).

        Args:
            unet_features: pooled features of the current z_t (batch, …); None for an encoder that
                does not read them, which gives one embedding.
        """
        batch = 1 if unet_features is None else len(unet_features)
        offset = self.encoder.predict_offset(self.encoded_image.expand(batch, -1), unet_features)
        return self.e_domain + self.scale * offset

    def with_fixed_embedding(self, e_c: Tensor) -> Self:
        """Return the same model with one embedding (embedding_width,) for all time steps."""
        encoder = FixedEmbedding((e_c - self.e_domain) / self.scale)
        return replace(self, encoder=encoder, encoded_image=self.encoded_image.new_zeros(1, 0))

    @torch.no_grad()
    def at_concept_scale(self, base: UNet2DConditionModel, concept_scale: float) -> Self:
        """Return the model at a scale of what it learned: W₀ + k (W - W₀), and k E.

        Departure: the paper has no such control. Less than 1 gives the prompt more weight, more
        than 1 the photo; 0 is the base, with the descriptor in the concept's place.

        Args:
            base: the U-Net before tuning.
            concept_scale: k.

        Raises:
            UsageError: the base's U-Net has become this model's.
        """
        if concept_scale == 1:
            return self
        if base is self.unet:
            if isinstance(self.encoder, FixedEmbedding) and not self.encoder.offset.any():
                return self  # the base as it is
            message = "a concept scale needs the base's U-Net, which a tuning with `consume` has changed"
            raise UsageError(message, hint="tune without `consume`, or load the base again")
        unet = copy.deepcopy(self.unet)
        for learned, before in zip(unet.parameters(), base.parameters(), strict=True):
            # In float32: k times what tuning changed is less than one spacing of half precision.
            learned.copy_(torch.lerp(before.float(), learned.float(), concept_scale))
        return replace(self, unet=unet, scale=self.scale * concept_scale)

    @classmethod
    def plain(cls, model: TextToImageModel, descriptor: str) -> Self:
        """Return the base as it is, with the descriptor in the concept's place."""
        token = model.descriptor_id(descriptor)
        e_domain = model.word_embedding(token)
        return cls(
            unet=model.unet, encoder=FixedEmbedding(torch.zeros_like(e_domain)),
            encoded_image=e_domain.new_zeros(1, 0), e_domain=e_domain, descriptor_id=token, scale=1.0,
        )  # fmt: skip


class CFGDenoiser:
    """ε_θ of one batch of prompts under guidance, with e_c predicted anew from every z_t."""

    def __init__(
        self, model: TextToImageModel, tuned: TunedModel, tokens: Tokens, *, guidance: float,
        negative_prompt: Prompt | str = "",
    ) -> None:  # fmt: skip
        self.model, self.tuned, self.tokens = model, tuned, tokens
        self.guidance = guidance
        self.rescales = has_zero_snr(model.noise_schedule.config)
        self.count = len(tokens.ids)
        self.empty = self._repeated(model.uncond_embeds)
        self.negative = self.empty
        if isinstance(negative_prompt, Prompt) or negative_prompt.strip():
            negative = model.tokenize([negative_prompt], tuned.descriptor_id)
            self.negative = self._repeated(model.embed_prompts(negative))
        self.text = None if tuned.encoder.reads_unet else self._text(None)

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        unet = self.tuned.unet
        start = embed_latents(unet, z_t, t)  # shared by all passes: no text is read here
        unconditional = None if self.guidance == 1 else down_and_mid(unet, start, self.negative)
        text = self.text if self.text is not None else self._refined(start, unconditional)
        conditional = down_and_mid(unet, start, text)
        if unconditional is None:
            return up_and_out(unet, conditional, text)
        both = up_and_out(unet, UNetState.cat((unconditional, conditional)), torch.cat((self.negative, text)))
        without, with_text = both.chunk(2)
        guided = without + self.guidance * (with_text - without)
        return _rescaled(guided, with_text) if self.rescales else guided

    def _refined(self, start: UNetState, unconditional: UNetState | None) -> Tensor:
        """Predict e_c from z_t (eq. 1) and embed the prompts with it."""
        state = unconditional if self.negative is self.empty else None
        if state is None:
            state = down_and_mid(self.tuned.unet, start, self.empty)
        return self._text(pooled_features(state).float())

    def _text(self, features: Tensor | None) -> Tensor:
        e_c = self.tuned.embedding(features).expand(self.count, -1)
        return self.model.embed_prompts(self.tokens, e_c).to(self.tuned.unet.dtype)

    def _repeated(self, text: Tensor) -> Tensor:
        return text.to(self.tuned.unet.dtype).expand(self.count, -1, -1)


RESCALED = 0.7  # share of the rescaled prediction, φ


def _rescaled(guided: Tensor, with_text: Tensor) -> Tensor:
    """Return a prediction under guidance with the standard deviation of the conditional one, for the most part.

    Where the last time step is pure noise, guidance overexposes images (Lin et al. 2024, "Common diffusion noise
    schedules and sample steps are flawed", section 3.4).
    """
    inner = list(range(1, guided.ndim))
    ratio = with_text.std(inner, keepdim=True) / guided.std(inner, keepdim=True)
    return guided * (RESCALED * ratio + 1 - RESCALED)
