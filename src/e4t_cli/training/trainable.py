"""The weights that tuning trains: all of them, as the paper does, or LoRA adapters of some.

Paper silent: the text encoder and the VAE stay frozen in tuning, like the image encoder. Section
3.4 tunes "the entire text-to-image model", section 3.1 calls E and the U-Net the trained parts;
gradients flow through the text encoder to E, but a changed one would change every other word too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from e4t_cli.models.domain_folder import DomainEncoder
from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import LoraAdapters, frozen_copy, linear_layers, lora_target_layers, merge_lora
from e4t_cli.nn.fused_unet import FusedUNet
from e4t_cli.nn.precision import PrecisionPolicy
from e4t_cli.nn.randomness import generator
from e4t_cli.nn.unet_blocks import has_plain_blocks
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import FixedEmbedding
from e4t_cli.registry.config import TuningConfig
from e4t_cli.training.optim import Group

TrainableEncoder = DomainEncoder | FixedEmbedding


class TrainableParts(Protocol):
    """The copies in training."""

    unet: UNet2DConditionModel  # to run, as `encoder`: its output depends on the trained weights
    encoder: TrainableEncoder
    groups: list[Group]
    rounded: list[nn.Parameter]  # that may be in bfloat16 on the device; see `CPUOffloadedAdamW`
    detach_features: bool  # whether the method stops the gradient at the feature pass

    def cached(self) -> AbstractContextManager[None]:
        """Evaluate weight offsets once for both passes, see `WeightOffsets.cached`."""

    def converted(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Convert the small trained weights once for both passes, inside a `with` block."""

    def finish(self) -> dict[str, Tensor]:
        """Merge in float32; returns the trained tensors that are small enough to be stored."""


class FullFineTuning:
    """Encoder, offsets and the whole U-Net, all in float32 (section 3.4).

    Float32 whatever the base's dtype is: a whole tuning moves a weight by less than the spacing of bfloat16.

    Args:
        consume: tune the model's U-Net in place of a copy; the model cannot be used afterwards.
    """

    detach_features = False

    def __init__(
        self, model: TextToImageModel, pretrained: DomainWeights, config: TuningConfig, seed: int,
        *, precision: PrecisionPolicy, consume: bool = False,
    ) -> None:  # fmt: skip
        self._final = precision.sampled
        unet = model.unet if consume else copy.deepcopy(model.unet)
        self.unet: UNet2DConditionModel = nn.Module.to(unet, precision.trained)
        self.encoder: TrainableEncoder = copy.deepcopy(pretrained.encoder).to(model.device)
        self.offsets = WeightOffsets.from_factors(pretrained.offsets).to(model.device)
        rate = config.learning_rate
        self.groups: list[Group] = [
            (list(self.encoder.parameters()), rate * config.encoder_rate),
            (list(self.offsets.parameters()), rate * config.offsets_rate),
            (list(self.unet.parameters()), rate * config.unet_rate),
        ]
        self.rounded: list[nn.Parameter] = list(self.unet.parameters())  # without the offsets
        if self.offsets.paths:
            self.offsets.attach_to(self.unet)
        self._fused = FusedUNet(self.unet) if has_plain_blocks(self.unet) else None

    def cached(self) -> AbstractContextManager[None]:
        if self._fused is None or self.unet.is_gradient_checkpointing:
            return self.offsets.cached()
        return self._fused.step()

    def converted(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return nullcontext()  # autocast converts the U-Net's weights

    def finish(self) -> dict[str, Tensor]:
        if self.offsets.paths:
            self.offsets.merge()
        nn.Module.to(self.unet, self._final)  # diffusers' `to` logs a warning about intended casts
        return {}


class LoraFineTuning:
    """LoRA adapters of the attention layers and of the encoder; the base stays frozen.

    Departure: section 3.4 tunes every weight. No gradient flows through the feature pass, where it
    would cost more than everything that is trained.
    """

    detach_features = True

    def __init__(
        self, model: TextToImageModel, pretrained: DomainWeights, config: TuningConfig, seed: int,
        *, precision: PrecisionPolicy, consume: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._final = model, precision.sampled
        self._offsets, self._encoder = pretrained.offsets, pretrained.encoder
        self._consume = consume  # for the end: while tuning, the base's weights are shared anyway
        self.unet = frozen_copy(model.unet, pretrained.offsets, precision.half)
        self.rounded: list[nn.Parameter] = []
        self.encoder: TrainableEncoder = copy.deepcopy(pretrained.encoder).to(model.device).requires_grad_(False)
        source, rank, layers = generator(seed, "adapters"), config.lora_rank, lora_target_layers(self.unet)
        self.adapters = {
            "unet": LoraAdapters.for_layers(layers, rank, scaled=set(pretrained.offsets), source=source),
            "encoder": LoraAdapters.for_layers(linear_layers(self.encoder), rank, source=source),
        }
        for name, adapters in self.adapters.items():
            adapters.to(model.device).attach_to(getattr(self, name))
        rate = config.learning_rate * config.lora_rate
        self.groups: list[Group] = [
            *self.adapters["unet"].param_groups(rate * config.offsets_rate, rate * config.unet_rate),
            *self.adapters["encoder"].param_groups(0.0, rate * config.encoder_rate),
        ]

    def cached(self) -> AbstractContextManager[None]:
        return nullcontext()  # the offsets are merged

    def converted(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return self.adapters["unet"].converted(dtype)

    def finish(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, adapters in self.adapters.items():
            adapters.detach()
            kept |= {f"{name}.{key}": value for key, value in adapters.tensors().items()}
        base = self._model.unet
        self.unet, self.encoder = merge_lora(base, self._offsets, self._encoder, kept, dtype=self._final)
        if self._consume:
            self._model.unet = self.unet
        return kept


# `TuningConfig.method` -> what it trains.
METHODS: Mapping[str, type[FullFineTuning] | type[LoraFineTuning]] = {"full": FullFineTuning, "lora": LoraFineTuning}
