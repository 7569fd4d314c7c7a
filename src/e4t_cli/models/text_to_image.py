"""Pictures as numbers, and what the VAE says about them.

The parts of a base: loaded, frozen, and what follows from them alone.

The base text-to-image model (section 3.5) behind one interface: `mini` or Stable Diffusion.

`TextToImageModel` wraps what others wrote (diffusers' U-Net and VAE, transformers' text encoder,
open_clip's image tower) and adds the three things that E4T needs of them: prompts in which one
word's embedding is given from outside, latents, and [CLS] features. All sizes come from the
folder's configs. Every weight is frozen; whoever trains one works on a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.errors import DivergedError, IntegrityError, UsageError
from e4t_cli.hub.bases import Base, read_base
from e4t_cli.models.loading import folder_fingerprint, load_part, load_settings, load_tower
from e4t_cli.models.prompt_embedding import Tokens, tokenize_prompts, with_embedding
from e4t_cli.nn.precision import PrecisionPolicy, full_precision, math_attention
from e4t_cli.nn.unet import check_unet, feature_widths
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, ImageTower
from e4t_cli.prompts import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """What the VAE says about a picture: a Gaussian over its latents, in the U-Net's units."""

    mean: Tensor  # (batch, channels, height, width)
    logvar: Tensor  # the same

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents z_0 for standard normal `noise`."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def to_uint8(images: Sequence[Image.Image], side: int, mode: str) -> Tensor:
    """Return pictures as bytes: (batch, side, side, 3) for RGB, without the 3 for L."""
    arrays = []
    for image in images:
        image = image.convert(mode)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        arrays.append(numpy.asarray(image))
    return torch.from_numpy(numpy.stack(arrays))


def to_pil(decoded: Tensor) -> list[Image.Image]:
    """Return the pictures of (batch, 3, height, width) in −1 … 1, and beyond as it is clipped.

    Raises:
        DivergedError: a number is not finite; the picture would be black.
    """
    if not decoded.isfinite().all():
        raise DivergedError(
            "a picture came out of numbers that are not finite: too large for this number format",
            hint="draw it again with --dtype fp32",
        )
    colours = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(one) for one in colours.permute(0, 2, 3, 1).cpu().numpy()]


class FrozenParts:
    """What `TextToImageModel` is made of; it adds what they do together.

    Args:
        base: name, folder, resolution.
        unet, vae, text_encoder, tokenizer: parts of a Stable-Diffusion-shaped model.
        noise_schedule: the schedule it was trained with.
        image_tower: the CLIP tower, or None to load it from the folder when first needed.
    """

    def __init__(
        self,
        *,
        base: Base,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        noise_schedule: DDPMScheduler,
        image_tower: ImageTower | None = None,
    ) -> None:
        try:
            check_unet(unet)
        except ValueError as error:
            raise IntegrityError(f"the base {base.name} cannot be used: {error}") from error
        if (kind := noise_schedule.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise IntegrityError(f"the base {base.name} predicts {kind!r}, which is not supported")
        self.base = base
        self.device, self.dtype = unet.device, unet.dtype
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.noise_schedule = noise_schedule
        self._given_tower = image_tower is not None
        if image_tower is not None:
            self.__dict__["image_tower"] = image_tower

    @classmethod
    def load(
        cls,
        folder: str | Path | Base,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a base from a folder in diffusers' layout; nothing is fetched.

        Args:
            folder: the folder, or a `Base` that names it.
            dtype: of every part, whatever the files hold.

        Raises:
            WeightsUnavailable: a part is missing.
            IntegrityError: a part is damaged, or the model is of a kind that cannot be used.
        """
        base = folder if isinstance(folder, Base) else read_base(Path(folder))
        device = torch.device(device)

        def part(kind: Any, name: str) -> Any:
            return load_part(kind, base.folder / name, device, dtype, half=base.half)

        def convolutional(kind: Any, name: str) -> Any:
            # Tensor cores read convolutions in this order, and would reorder them at each call.
            found, fast = part(kind, name), device.type == "cuda" and dtype.itemsize == 2
            return found.to(memory_format=torch.channels_last) if fast else found

        return cls(
            base=base,
            unet=convolutional(UNet2DConditionModel, "unet"),
            vae=convolutional(AutoencoderKL, "vae"),
            text_encoder=part(CLIPTextModel, "text_encoder"),
            tokenizer=load_settings(CLIPTokenizer, base.folder / "tokenizer"),
            noise_schedule=load_settings(DDPMScheduler, base.folder / "scheduler"),
        )

    @cached_property
    def image_tower(self) -> ImageTower:
        # On demand: drawing a saved concept needs no tower, and ViT-H is a third of all weights.
        folder = self.base.tower or self.base.folder / "image_tower"
        return load_tower(folder).to(self.device, self.dtype)

    def release_tower(self) -> None:
        """Let go of the image tower, once the picture has been looked at; it loads again."""
        if not self._given_tower:
            self.__dict__.pop("image_tower", None)

    @property
    def tuned_dtype(self) -> torch.dtype:
        """The dtype of a tuned U-Net that is sampled with; see `PrecisionPolicy`."""
        return PrecisionPolicy.resolve(self.device, self.dtype, autocast=False).sampled

    @property
    def resolution(self) -> int:
        """Side of the pictures, in pixels."""
        return self.base.resolution

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of z."""
        side = self.resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.unet.config.in_channels, side, side

    @property
    def train_timesteps(self) -> int:
        return self.noise_schedule.config.num_train_timesteps

    def encoder_config(self, hidden_width: int | None = None) -> EncoderConfig:
        """Return the sizes of a word-embedding encoder for this base.

        Args:
            hidden_width: common width of the hierarchy. Paper silent: the tower's by default.
        """
        tower = self.image_tower
        return EncoderConfig(
            image_layers=len(tower.indices),
            image_width=tower.width,
            unet_widths=feature_widths(self.unet),
            hidden_width=hidden_width or tower.width,
            embedding_width=self.text_encoder.get_input_embeddings().embedding_dim,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identify the weights, so that a pack is not used with a base it was not made for."""
        if self.base.identity:
            # A commit of the hub names its content, in float32 and float16 alike, and each file
            # was compared with it.
            return hashlib.sha256(self.base.identity.encode()).hexdigest()[:32]
        return folder_fingerprint(self.base.folder)


DECODED_PIXELS = 512 * 512
"""Pixels that the VAE decodes at once, at least one picture."""


class TextToImageModel(FrozenParts):
    """A frozen base, ready to be looked at, tuned in copies, and drawn with.

    Its parts and how to load them are `FrozenParts`'.
    """

    # ── pictures ──

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pictures as (batch, 3, resolution, resolution) in −1 … 1."""
        planes = to_uint8(images, self.resolution, "RGB").to(self.device).float()
        return planes.permute(0, 3, 1, 2) / 127.5 - 1

    def masks(self, masks: Sequence[Image.Image]) -> Tensor:
        """Return masks as (batch, resolution, resolution) in 0 … 1."""
        return to_uint8(masks, self.resolution, "L").to(self.device).float() / 255

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
            pictures += to_pil(self.vae.decode(part).sample)
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
        text_encoder = self.text_encoder
        if e_c is not None:
            text_encoder = with_embedding(text_encoder, tokens.placeholder, e_c)
        embedded: Tensor = text_encoder(tokens.ids).last_hidden_state
        return embedded

    @cached_property
    def uncond_embeds(self) -> Tensor:
        """The text encoder's view of "", (1, length, width): what the feature pass reads.

        Paper silent: the prompt of the feature pass. The empty one makes it the unconditional
        branch of classifier-free guidance, so that generation gets it for nothing.
        """
        # Evaluated once, by whoever asks first, and it must not show who that was: training asks
        # under an autocast and with the plain attention kernel, generation with neither, and the
        # last bits of a fused kernel's result are others. One kernel, then, whoever asks.
        with torch.no_grad(), full_precision(self.device), math_attention():
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
