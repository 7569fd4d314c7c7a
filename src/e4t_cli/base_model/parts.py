"""The parts of a base: loaded, frozen, and what follows from them alone."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from e4t_cli.bases import Base, read_base
from e4t_cli.errors import IntegrityError
from e4t_cli.nn.image_tower import ImageTower
from e4t_cli.nn.unet_features import check_unet, feature_widths
from e4t_cli.nn.word_embedding_encoder import EncoderConfig

from .loading import folder_fingerprint, load_part, load_settings, load_tower


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
        """The number format of a tuned U-Net that is drawn with: never bfloat16 on a card.

        Fifteen steps at the paper's rate move a weight by a spacing or two of bfloat16 numbers, and
        a third of that is lost in the rounding; float16, as fast, loses 4 % (a test measures it).
        On a CPU float16 is slow, and bfloat16 is there only for whoever asks for it.
        """
        coarse = self.dtype == torch.bfloat16 and self.device.type != "cpu"
        return torch.float16 if coarse else self.dtype

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
