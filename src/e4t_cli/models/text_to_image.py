"""The base text-to-image model (section 3.5), `mini` or Stable Diffusion, behind one interface.

It wraps diffusers' U-Net and VAE, transformers' text encoder and open_clip's visual tower, and adds what E4T needs:
prompts in which one word's embedding is given from outside, latents, and [CLS] features. All sizes come from the
folder's configs. Every weight is frozen: training works on copies, and threads may share a model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import numpy
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.errors import DivergedError, IntegrityError, UsageError
from e4t_cli.hub.addons import Addon
from e4t_cli.hub.architecture import USABLE, check_schedule, wrong_schedule
from e4t_cli.hub.bases import Base, read_base
from e4t_cli.models.fingerprints import folder_fingerprint, recorded_fingerprint
from e4t_cli.models.loading import load_noise_schedule, load_part, load_tokenizer, load_tower
from e4t_cli.models.prompt_embedding import NO_WORDS, AddedWords, Tokens, emphasize, tokenize_prompts, with_embedding
from e4t_cli.nn.precision import PrecisionPolicy, full_precision, math_attention
from e4t_cli.nn.unet import check_unet, feature_widths
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, ImageTower
from e4t_cli.prompts import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Posterior:
    """The VAE's Gaussian over the latents of an image, in the U-Net's units: (batch, channels, height, width)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents z_0 for standard normal `noise`."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def __getitem__(self, index: Tensor) -> Posterior:
        """Return the rows of `index`, (batch,), which may repeat."""
        return Posterior(mean=self.mean[index], logvar=self.logvar[index])


def to_uint8(images: Sequence[Image.Image], side: int, mode: str) -> Tensor:
    """Return images as bytes: (batch, side, side, 3) for RGB, without the 3 for L."""
    converted = (image.convert(mode) for image in images)  # `resize` to the same size only copies
    arrays = [numpy.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in converted]
    return torch.from_numpy(numpy.stack(arrays))


def to_pil(decoded: Tensor) -> list[Image.Image]:
    """Return the images of (batch, 3, height, width), clipped to −1 … 1.

    Raises:
        DivergedError: a value is not finite; the image would be black.
    """
    if not decoded.isfinite().all():
        reason = "an image has values that are not finite: they are too large for this dtype"
        raise DivergedError(reason, hint="generate it again with --dtype fp32")
    colours = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(one) for one in colours.permute(0, 2, 3, 1).cpu().numpy()]


DECODED_PIXELS = 512 * 512  # that the VAE decodes at once, at least one image


class TextToImageModel:
    """A frozen base.

    Args:
        base: name, folder, resolution.
        unet, vae, text_encoder, tokenizer: parts of a model with Stable Diffusion's architecture.
        noise_schedule: the schedule it was trained with.
        image_tower: the visual tower, or None to load it from the folder when first needed.

    Attributes:
        addons, words: what was added to the base, and the words that came with it; see `formats.addons`.
    """

    def __init__(
        self, *, base: Base, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer, noise_schedule: DDPMScheduler, image_tower: ImageTower | None = None,
    ) -> None:  # fmt: skip
        try:
            check_unet(unet)
        except ValueError as error:
            raise IntegrityError(f"the base {base.name} cannot be used: {error}") from error
        if wrong := wrong_schedule(dict(noise_schedule.config)):
            raise IntegrityError(f"the base {base.name} cannot be used: {wrong}", hint=USABLE)
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.train(False).requires_grad_(False)
        self.base, self.tokenizer, self.noise_schedule = base, tokenizer, noise_schedule
        self.addons: tuple[Addon, ...] = ()
        self.words: AddedWords = NO_WORDS
        self._given_tower = image_tower is not None
        if image_tower is not None:
            self.__dict__["image_tower"] = image_tower

    @classmethod
    def load(
        cls, folder: str | Path | Base, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a base from a folder in diffusers' layout, without network access.

        Args:
            folder: the folder, or a `Base` that names it.
            dtype: of every part, whatever the files hold.

        Raises:
            WeightsUnavailable: a part is missing.
            IntegrityError: a part is damaged, or its architecture is not supported.
        """
        base = folder if isinstance(folder, Base) else read_base(Path(folder))
        device = torch.device(device)
        settings = base.folder / "scheduler"
        if os.path.isdir(settings):  # before diffusers fills in the values of another kind of schedule
            check_schedule(settings / "scheduler_config.json", base.name)
        noise_schedule = load_noise_schedule(settings)
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        parts = {
            name: load_part(kind, base.folder / name, device, dtype, half=base.half) for name, kind in kinds.items()
        }
        if device.type == "cuda" and dtype.itemsize == 2:
            for name in ("unet", "vae"):
                # Tensor cores need this memory format for convolutions, and would convert to it at each call.
                parts[name] = parts[name].to(memory_format=torch.channels_last)
        rows = parts["text_encoder"].get_input_embeddings().weight.shape[0]
        tokenizer = load_tokenizer(CLIPTokenizer, base.folder / "tokenizer", rows)
        return cls(base=base, tokenizer=tokenizer, noise_schedule=noise_schedule, **parts)

    @cached_property
    def image_tower(self) -> ImageTower:
        # On demand: sampling a saved concept does not need it, and ViT-H is a third of all weights.
        folder = self.base.tower or self.base.folder / "image_tower"
        return load_tower(folder).to(self.device, self.dtype)

    def release_tower(self) -> None:
        """Free the image tower once the image is encoded; it is loaded again when needed."""
        if not self._given_tower:
            self.__dict__.pop("image_tower", None)

    @property
    def tuned_dtype(self) -> torch.dtype:
        """The dtype of a tuned U-Net that is sampled with; see `PrecisionPolicy`."""
        return PrecisionPolicy.resolve(self.device, self.dtype, autocast=False).sampled

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.base.resolution

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of z."""
        side = self.resolution // 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return self.unet.config["in_channels"], side, side

    @property
    def train_timesteps(self) -> int:
        return int(self.noise_schedule.config["num_train_timesteps"])

    def encoder_config(self, hidden_width: int | None = None) -> EncoderConfig:
        """Return the sizes of a word-embedding encoder. Paper silent: the hidden width is the tower's by default."""
        tower = self.image_tower
        return EncoderConfig(
            image_layers=len(tower.indices), image_width=tower.width, unet_widths=feature_widths(self.unet),
            hidden_width=hidden_width or tower.width, embedding_width=self.embedding_width,
        )  # fmt: skip

    @property
    def embedding_width(self) -> int:
        """Width of the token table."""
        return int(self.text_encoder.config.hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """Identify the base's files, for caches and checkpoints."""
        return recorded_fingerprint(self.base) if self.base.identity else folder_fingerprint(self.base.folder)

    @cached_property
    def weights_fingerprint(self) -> str:
        """Identify the weights, for domain weights and concepts, which are used with the base they belong to."""
        return recorded_fingerprint(self.base)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return images as (batch, 3, resolution, resolution) in −1 … 1."""
        planes = to_uint8(images, self.resolution, "RGB").to(self.device).float()
        return planes.permute(0, 3, 1, 2) / 127.5 - 1

    def masks(self, masks: Sequence[Image.Image]) -> Tensor:
        """Return masks as (batch, resolution, resolution) in 0 … 1."""
        return to_uint8(masks, self.resolution, "L").to(self.device).float() / 255

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Return [CLS] of every second layer of the tower, (batch, layers, width), float32."""
        return cast(Tensor, self.image_tower(pixels))

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """Return the VAE's Gaussian over the latents of images in −1 … 1."""
        found = self.vae.encode(pixels.to(self.dtype)).latent_dist
        scale = torch.tensor(self.vae.config["scaling_factor"], device=self.device)
        return Posterior(mean=found.mean.float() * scale, logvar=found.logvar.float() + 2 * torch.log(scale))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the images of latents in the U-Net's units."""
        latents = (latents / self.vae.config["scaling_factor"]).to(self.dtype)
        # Large images one by one: one uses the whole device, and eight might not fit its memory.
        parts = torch.split(latents, max(1, DECODED_PIXELS // self.resolution**2))
        return [image for part in parts for image in to_pil(self.vae.decode(part).sample)]

    def descriptor_id(self, descriptor: str) -> int:
        """Return the token of a domain's descriptor.

        Raises:
            UsageError: it is not one token of this base.
        """
        ids: list[int] = self.tokenizer(descriptor, add_special_tokens=False).input_ids
        if len(ids) == 1:
            return ids[0]
        reason = f"the descriptor {descriptor!r} is {len(ids)} tokens to the base {self.base.name}; it has to be one"
        raise UsageError(reason, hint="use a more common word, such as face, cat, dog or art")

    def word_embedding(self, token_id: int) -> Tensor:
        """Return a row of the token table, (embedding_width,): e_domain for a descriptor's id."""
        table: Tensor = self.text_encoder.get_input_embeddings().weight
        return table[token_id].detach().float()

    def tokenize(self, prompts: Sequence[Prompt | str], descriptor_id: int) -> Tokens:
        """Tokenize prompts for this base, see `tokenize_prompts`."""
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        return tokenize_prompts(
            self.tokenizer, prompts, descriptor_id, length=length, device=self.device, words=self.words
        )

    def embed_prompts(self, tokens: Tokens, e_c: Tensor | None = None) -> Tensor:
        """Run the text encoder, with e_c as the word embedding at every placeholder, and apply the tokens' weights.

        Args:
            tokens: from `tokenize`.
            e_c: one embedding a prompt (batch, embedding_width); None leaves the descriptor.

        Returns:
            (batch, length, width), differentiable in e_c.
        """
        plain = self.words.attached(self.text_encoder)
        text_encoder = plain if e_c is None else with_embedding(plain, tokens.placeholder, e_c)
        text = cast(Tensor, text_encoder(tokens.ids).last_hidden_state)
        return text if tokens.weights is None else emphasize(text, tokens.weights)

    @cached_property
    def uncond_embeds(self) -> Tensor:
        """The text encoder's output for "", (1, length, width): what the feature pass reads.

        Paper silent: the prompt of the feature pass. With the empty one it is the unconditional pass of
        classifier-free guidance, which sampling computes anyway.
        """
        # Cached, so its bits must not depend on the first caller: training is under autocast and MATH attention,
        # sampling under neither, and a fused kernel gives other last bits.
        with torch.no_grad(), full_precision(self.device), math_attention():
            return self.embed_prompts(self.tokenize([""], self.tokenizer.eos_token_id))

    def add_noise(self, z_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Return z_t."""
        # diffusers' annotation of t excludes int64, which it accepts.
        return self.noise_schedule.add_noise(z_0, epsilon, cast(torch.IntTensor, t))

    def target(self, z_0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Return what the U-Net predicts: ε of eq. 4, or v for models trained with it."""
        if self.noise_schedule.config["prediction_type"] != "v_prediction":
            return epsilon
        return self.noise_schedule.get_velocity(z_0, epsilon, cast(torch.IntTensor, t))
