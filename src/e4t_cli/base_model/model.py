"""The base text-to-image model (section 3.5) behind one interface: `mini` or Stable Diffusion.

`TextToImageModel` wraps what others wrote (diffusers' U-Net and VAE, transformers' text encoder,
open_clip's image tower) and adds the three things that E4T needs of them: prompts in which one
word's embedding is given from outside, latents, and [CLS] features. All sizes come from the
folder's configs. Every weight is frozen; whoever trains one works on a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from e4t_cli.errors import UsageError
from e4t_cli.nn.precision import full_precision
from e4t_cli.prompts import Prompt

from .parts import FrozenParts
from .pictures import Posterior, pictures_of, planes_of
from .words import Tokens, tokenize_prompts, words_replaced

DECODED_PIXELS = 512 * 512
"""Pixels that the VAE decodes at once, at least one picture."""


class TextToImageModel(FrozenParts):
    """A frozen base, ready to be looked at, tuned in copies, and drawn with.

    Its parts and how to load them are `FrozenParts`'.
    """

    # ── pictures ──

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pictures as (batch, 3, resolution, resolution) in −1 … 1."""
        planes = planes_of(images, self.resolution, "RGB").to(self.device).float()
        return planes.permute(0, 3, 1, 2) / 127.5 - 1

    def masks(self, masks: Sequence[Image.Image]) -> Tensor:
        """Return masks as (batch, resolution, resolution) in 0 … 1."""
        return planes_of(masks, self.resolution, "L").to(self.device).float() / 255

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Return [CLS] of every second layer of the tower, (batch, layers, width), float32."""
        return self.image_tower(pixels)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """Return the VAE's Gaussian over the latents of pictures in −1 … 1."""
        found = self.vae.encode(pixels.to(self.dtype)).latent_dist
        scale = torch.tensor(self.vae.config.scaling_factor, device=self.device)
        return Posterior(
            mean=found.mean.float() * scale, logvar=found.logvar.float() + 2 * torch.log(scale)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the pictures of latents in the U-Net's units."""
        latents = (latents / self.vae.config.scaling_factor).to(self.dtype)
        # Large pictures one by one: each fills the device, and eight would fill its memory.
        some = max(1, DECODED_PIXELS // self.resolution**2)
        pictures = []
        for part in latents.split(some):
            pictures += pictures_of(self.vae.decode(part).sample)
        return pictures

    # ── words ──

    def descriptor_id(self, descriptor: str) -> int:
        """Return the token of a domain's coarse word.

        Raises:
            UsageError: this base does not know it as one word.
        """
        ids = self.tokenizer(descriptor, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UsageError(
                f"the descriptor {descriptor!r} is {len(ids)} tokens to the base "
                f"{self.base.name}; it has to be one",
                hint="use a more common word, such as face, cat, dog or art",
            )
        return ids[0]

    def word_embedding(self, token_id: int) -> Tensor:
        """Return a row of the token table, (embedding_width,): e_domain for a descriptor's id."""
        return self.text_encoder.get_input_embeddings().weight[token_id].detach().float()

    def tokenize(self, prompts: Sequence[Prompt | str], descriptor_id: int) -> Tokens:
        """Tokenise prompts around their placeholders, whose positions are thereby known.

        Args:
            prompts: parsed prompts, or plain text without a placeholder.
            descriptor_id: the token to stand where the concept does; its embedding is e_domain.

        Raises:
            UsageError: a prompt is so long that its placeholder is never read.
        """
        length = min(
            self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings
        )
        tokens = tokenize_prompts(self.tokenizer, prompts, descriptor_id, length)
        return replace(
            tokens,
            ids=tokens.ids.to(self.device),
            placeholder=tokens.placeholder.to(self.device),
        )

    def embed_prompts(self, tokens: Tokens, e_c: Tensor | None = None) -> Tensor:
        """Run the text encoder, with e_c as the word embedding at every placeholder.

        Args:
            tokens: from `tokenize`.
            e_c: one embedding a prompt (batch, embedding_width); None leaves the descriptor.

        Returns:
            (batch, length, width), differentiable in e_c.
        """
        table = self.text_encoder.get_input_embeddings()
        with words_replaced(table, tokens.placeholder, e_c):
            return self.text_encoder(tokens.ids).last_hidden_state

    @cached_property
    def empty_text(self) -> Tensor:
        """The text encoder's view of "", (1, length, width): what the feature pass reads.

        Paper silent: the prompt of the feature pass. The empty one makes it the unconditional
        branch of classifier-free guidance, so that generation gets it for nothing.
        """
        # Evaluated once, by whoever asks first, and it must not show who that was: training asks
        # under an autocast and with the plain attention kernel, generation with neither, and the
        # last bits of a fused kernel's result are others. One kernel, then, whoever asks.
        with torch.no_grad(), full_precision(self.device), sdpa_kernel(SDPBackend.MATH):
            return self.embed_prompts(self.tokenize([""], self.tokenizer.eos_token_id))

    # ── diffusion ──

    def add_noise(self, z_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Return z_t."""
        return self.noise_schedule.add_noise(z_0, epsilon, t)

    def target(self, z_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Return what the U-Net is to predict: ε of eq. 4, or v for models trained so."""
        if self.noise_schedule.config.prediction_type == "v_prediction":
            return self.noise_schedule.get_velocity(z_0, epsilon, t)
        return epsilon
