"""ε_θ under guidance, the concept's word predicted anew from every noisy picture (section 3.1).

    z_t ─ U-Net encoder, "" ─> pooled features ─> E ─> e_c ─ text encoder ─> prompt ─> ε_θ

Under classifier-free guidance with an empty negative prompt the first arrow is half of the
unconditional branch, so the refinement costs 1 % of plain Stable Diffusion's work, not 33 %:
unconditional way down -> features -> embedding -> text -> conditional way down -> both ways up
in one batch. Everything about the picture and ΔW was folded into constants before the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e4t_cli.base_model import TextToImageModel, Tokens
from e4t_cli.nn.unet_features import (
    UNetState,
    decoder_half,
    encoder_half,
    pooled_features,
    stem,
)
from e4t_cli.tuned_model import TunedModel

from .sampling import Sampling


class Predictor:
    """ε_θ of one batch of prompts under guidance, with e_c predicted anew from every z_t."""

    def __init__(
        self, model: TextToImageModel, tuned: TunedModel, tokens: Tokens, sampling: Sampling
    ) -> None:
        assert sampling.guidance is not None
        self.model, self.tuned, self.tokens = model, tuned, tokens
        self.guidance = sampling.guidance
        self.count = len(tokens.ids)
        self.empty = self._repeated(model.empty_text)
        if sampling.negative.strip():
            negative = model.tokenize([sampling.negative], tuned.descriptor_id)
            self.negative = self._repeated(model.embed_prompts(negative))
        else:
            self.negative = self.empty
        self.text = None if tuned.encoder.reads_unet else self._text(None)

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        unet = self.tuned.unet
        # The stem sees no text: every pass below begins with it.
        start = stem(unet, z_t, t)
        unconditional = None
        if self.guidance != 1:
            unconditional = encoder_half(unet, start, self.negative)
        text = self.text if self.text is not None else self._refined(start, unconditional)
        conditional = encoder_half(unet, start, text)
        if unconditional is None:
            return decoder_half(unet, conditional, text)
        both = decoder_half(
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
            looked = encoder_half(self.tuned.unet, start, self.empty)
        return self._text(pooled_features(looked).float())

    def _text(self, features: Tensor | None) -> Tensor:
        e_c = self.tuned.embedding(features).expand(self.count, -1)
        return self.model.embed_prompts(self.tokens, e_c).to(self.tuned.unet.dtype)

    def _repeated(self, text: Tensor) -> Tensor:
        return text.to(self.tuned.unet.dtype).expand(self.count, -1, -1)
