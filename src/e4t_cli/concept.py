"""A concept: one personalized subject.

The prepared picture, what the encoder sees of it, and the recipe and seed: enough to tune it again,
to the same bits, in seconds. On wish it also holds the tuned weights, which saves those seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from .base_model import TextToImageModel
from .concept_file import read_concept, write_concept
from .domain import PreparedImage
from .errors import IntegrityError
from .nn.branching import merge_adapters
from .pretrained import PretrainedDomain
from .recipes import TuningRecipe
from .tuned_model import TunedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Concept:
    """What personalization yields, and what can be saved and drawn again.

    Args:
        domain, descriptor: whose encoder looked at the picture.
        base_name, base_fingerprint: the base it lives on.
        pack_digest: which pack of the domain.
        prepared: the square picture and its mask.
        image_features: what the pack's encoder sees of the picture (vectors, width), float32.
        recipe: the tuning recipe that was really used.
        seed: of the tuning.
        image_sha256: of the file that was handed in, "" if there was none.
        placeholder: what prompts call it.
        photo: what was found in the photo and done to it, such as "1 face, turned 4°".
        package: the distribution that the domain came with, "user" for the user's own, or "".
        weights: the tuned tensors, if they are kept; see `kept` and `tuned`.
    """

    domain: str
    descriptor: str
    base_name: str
    base_fingerprint: str
    pack_digest: str
    prepared: PreparedImage
    image_features: Tensor
    recipe: TuningRecipe
    seed: int
    image_sha256: str = ""
    placeholder: str = "S*"
    photo: str = ""
    package: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, model: TextToImageModel, pretrained: PretrainedDomain) -> None:
        """Refuse a base or a pack other than those the concept was made with.

        Raises:
            IntegrityError: the concept would come out as something else.
        """
        if model.fingerprint != self.base_fingerprint:
            raise IntegrityError(
                f"this concept lives on the base {self.base_name} ({self.base_fingerprint[:12]}), "
                f"not on this {model.base.name} ({model.fingerprint[:12]})",
                hint="personalize the picture again on this base",
            )
        if pretrained.digest != self.pack_digest:
            raise IntegrityError(
                f"this concept was made with another version of the {self.domain} pack "
                f"({self.pack_digest[:12] or 'unsaved'}, here: {pretrained.digest[:12]})",
                hint="personalize the picture again",
            )

    @staticmethod
    def kept(tuned: TunedModel) -> dict[str, Tensor]:
        """Return the tensors of a tuned model, for `weights`."""
        if tuned.adapters:  # megabytes: the rest is the base's and the pack's
            return {f"adapters.{key}": value for key, value in tuned.adapters.items()}
        assert isinstance(tuned.encoder, nn.Module)
        tensors = {f"unet.{key}": value for key, value in tuned.unet.state_dict().items()}
        tensors |= {f"encoder.{key}": value for key, value in tuned.encoder.state_dict().items()}
        tensors["folded"] = tuned.folded  # a settled encoder cannot look at the picture again
        return {key: value.detach().cpu() for key, value in tensors.items()}

    def tuned(self, model: TextToImageModel, pretrained: PretrainedDomain) -> TunedModel | None:
        """Return the tuned model from the kept weights, or None if they were not kept.

        Raises:
            IntegrityError: another base or pack, or weights that do not fit.
        """
        if not self.weights:
            return None
        self.check(model, pretrained)
        adapters = self._own("adapters")
        try:
            if adapters:
                unet, encoder = merge_adapters(
                    model.unet,
                    pretrained.offsets,
                    pretrained.encoder,
                    adapters,
                    dtype=model.tuned_dtype,
                )
            else:
                # torch's own `to`: diffusers' logs a warning about casts that are meant.
                unet = nn.Module.to(copy.deepcopy(model.unet), model.tuned_dtype)
                encoder = copy.deepcopy(pretrained.encoder.settled())
                unet.load_state_dict(self._own("unet"))
                encoder.load_state_dict(self._own("encoder"))
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(f"the concept's weights do not fit its base: {error}") from error
        encoder.to(model.device).requires_grad_(False)
        token = model.descriptor_id(self.descriptor)
        folded = self.weights.get("folded")
        with torch.no_grad():
            if folded is None:  # of adapters, or kept before there were encoders that settle
                folded = encoder.fold(self.image_features[None].to(model.device))
            folded = folded.to(model.device)
        return TunedModel(
            unet=unet,
            encoder=encoder.settled(),
            folded=folded,
            e_domain=model.word_embedding(token),
            descriptor_id=token,
            scale=pretrained.embedding_scale,
            adapters=adapters,
        )

    def _own(self, part: str) -> dict[str, Tensor]:
        """Return one part's tensors from the kept weights."""
        prefix = f"{part}."
        return {
            key[len(prefix) :]: value
            for key, value in self.weights.items()
            if key.startswith(prefix)
        }

    def save(self, path: str | Path, *, overwrite: bool = True) -> None:
        """Write the concept to one file.

        Raises:
            FileExistsError: it exists and may not be overwritten.
        """
        write_concept(vars(self), path, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a concept.

        Raises:
            UsageError: there is no such file.
            IntegrityError: it is not a concept, or damaged.
        """
        return cls(**read_concept(path))
