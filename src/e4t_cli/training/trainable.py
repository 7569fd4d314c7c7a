"""What tuning trains: every weight, as the paper does, or low-rank adapters of some.

Both are one value to the loop: a U-Net and an encoder to run, groups of weights to move, and at
the end a model without anything of the training in it. `METHODS` maps a recipe's `method` to one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from e4t_cli.models.domain_weights import DomainWeights
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.adapters import (
    LoraAdapters,
    frozen_copy,
    linear_layers,
    lora_target_layers,
    merge_lora,
)
from e4t_cli.nn.precision import half_format
from e4t_cli.nn.randomness import generator
from e4t_cli.nn.weight_offsets import WeightOffsets
from e4t_cli.nn.word_embedding_encoder import Encoder
from e4t_cli.registry.config import TuningConfig
from e4t_cli.training.optim import Group


class TrainableParts(Protocol):
    """The copies in training.

    Args:
        unet, encoder: to run; their output depends on the trained weights.
        detach_features: whether the method lets no gradient through the feature pass.
        rounded: the weights that may be in bfloat16 on the device while an optimiser in the
            host's memory holds them in float32.
    """

    unet: nn.Module
    encoder: Encoder
    detach_features: bool
    rounded: list[nn.Parameter]

    def groups(self) -> list[Group]: ...

    def cached(self) -> AbstractContextManager[None]:
        """Evaluate weight offsets once for both passes, see `WeightOffsets.cached`."""
        ...

    def converted(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Bring what is small and trained into the format of the products, once for both passes.

        Inside a `with` block around the way there; the way back needs no more of it.
        """
        ...

    def finish(self) -> dict[str, Tensor]:
        """Merge in float32; returns what is small enough to be kept of it, by default nothing."""
        ...


class FullFineTuning:
    """Encoder, offsets and the whole U-Net, all in float32 (section 3.4).

    Float32 whatever the base is kept in: a whole tuning moves a weight by less than the spacing
    of bfloat16 numbers.

    Args:
        consume: tune the model's own U-Net in place of a copy, where nobody needs it afterwards.
    """

    detach_features = False

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: DomainWeights,
        config: TuningConfig,
        seed: int,
        *,
        consume: bool = False,
    ) -> None:
        self.config, self.final = config, model.tuned_dtype
        self.unet = (model.unet if consume else copy.deepcopy(model.unet)).float()
        self.encoder = copy.deepcopy(pretrained.encoder).to(model.device)
        self.offsets = WeightOffsets.from_factors(pretrained.offsets).to(model.device)
        self._groups = self._grouped()
        self.rounded = list(self.unet.parameters())  # before the offsets join them
        if self.offsets.paths:
            self.offsets.attach_to(self.unet)

    def _grouped(self) -> list[Group]:
        rate, config = self.config.learning_rate, self.config
        grouped = []
        for module, factor in (
            (self.encoder, config.encoder_rate),
            (self.offsets, config.offsets_rate),
            (self.unet, config.unet_rate),
        ):
            module.requires_grad_(factor > 0)
            grouped.append((list(module.parameters()), rate * factor))
        return grouped

    def groups(self) -> list[Group]:
        return self._groups

    def cached(self) -> AbstractContextManager[None]:
        return self.offsets.cached()

    def converted(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return nullcontext()  # the U-Net's weights are autocast's to convert

    def finish(self) -> dict[str, Tensor]:
        if self.offsets.paths:
            self.offsets.merge()
        # torch's own `to`: diffusers' logs a warning about casts that are meant.
        nn.Module.to(self.unet, self.final)
        return {}


class LoraFineTuning:
    """Low-rank changes of the attention layers and of the encoder; the base stays frozen.

    Departure: section 3.4 tunes every weight. The feature pass passes no gradient on, which would
    cost more than everything that is trained.
    """

    detach_features = True

    def __init__(
        self,
        model: TextToImageModel,
        pretrained: DomainWeights,
        config: TuningConfig,
        seed: int,
        *,
        consume: bool = False,
    ) -> None:
        self.model, self.offsets, self.config = model, pretrained.offsets, config
        self.consume = consume  # while tuning, the base's weights are shared and not copied anyway
        self.pretrained_encoder = pretrained.encoder
        self.unet = frozen_copy(model.unet, self.offsets, half_format(model.device, scaled=True))
        self.rounded = []
        self.encoder = copy.deepcopy(pretrained.encoder).to(model.device).requires_grad_(False)
        source, rank = generator(seed, "adapters"), config.lora_rank
        self.adapters = {
            "unet": LoraAdapters.for_layers(
                lora_target_layers(self.unet), rank, scaled=set(self.offsets), source=source
            ),
            "encoder": LoraAdapters.for_layers(linear_layers(self.encoder), rank, source=source),
        }
        for name, adapters in self.adapters.items():
            adapters.to(model.device).attach_to(getattr(self, name))

    def groups(self) -> list[Group]:
        config = self.config
        rate = config.learning_rate * config.lora_rate
        unet, encoder = self.adapters["unet"], self.adapters["encoder"]
        return [
            *unet.param_groups(rate * config.offsets_rate, rate * config.unet_rate),
            *encoder.param_groups(0.0, rate * config.encoder_rate),
        ]

    def cached(self) -> AbstractContextManager[None]:
        return nullcontext()  # the offsets are merged

    def converted(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return self.adapters["unet"].converted(dtype)

    def finish(self) -> dict[str, Tensor]:
        for adapters in self.adapters.values():
            adapters.detach()
        kept = {
            f"{name}.{key}": value
            for name, adapters in self.adapters.items()
            for key, value in adapters.tensors().items()
        }
        self.unet, self.encoder = merge_lora(
            self.model.unet,
            self.offsets,
            self.pretrained_encoder,
            kept,
            dtype=self.model.tuned_dtype,
        )
        if self.consume:
            self.model.unet = self.unet
        return kept


METHODS: Mapping[str, type[FullFineTuning] | type[LoraFineTuning]] = {
    "full": FullFineTuning,
    "lora": LoraFineTuning,
}
"""`TuningConfig.method` -> what it trains."""
