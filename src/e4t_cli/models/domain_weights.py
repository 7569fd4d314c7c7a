"""A domain pre-trained for one base: encoder, offsets, configs and metadata.

Its configs are those that work for this domain on this base; a `Domain` value has the paper's.
Files are read and written in `domain_folder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from e4t_cli.errors import IntegrityError
from e4t_cli.models import domain_folder
from e4t_cli.models.domain_folder import DomainEncoder, DomainImageTower
from e4t_cli.models.fingerprints import differing_parts, is_recorded
from e4t_cli.models.loading import config_hash, describe_tower
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.unet import feature_widths
from e4t_cli.nn.weight_offsets import Factors, projection_shapes
from e4t_cli.nn.word_embedding_encoder import FixedEmbedding
from e4t_cli.registry.config import PretrainingConfig, TuningConfig

FEW_IMAGES = 100  # below it, the manifest warns of over-fitting


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainWeights:
    """The result of domain pre-training (section 3.3), from which tuning starts."""

    name: str
    descriptor: str
    base_name: str  # the base it was trained for
    base_fingerprint: str  # of its exact weights; "" where they are unknown, as in checkpoints of other programs
    encoder: DomainEncoder | FixedEmbedding  # E of eq. 1; a `FixedEmbedding` is a baseline, which cannot be saved
    offsets: Mapping[str, Factors]  # path of a projection -> the factors of its ΔW (eq. 3)
    tuning: TuningConfig  # the config of tuning with these weights
    pretraining: PretrainingConfig  # the config they were trained with; its `embedding_scale` is s of eq. 1
    templates: tuple[str, ...]  # prompt templates with "{}" in the concept's place
    tower: DomainImageTower | None = None  # the encoder's own visual tower; None for encoders that use the base's
    images: int = 0  # the number of training images
    licence: str = ""  # of the weights and the data, as text, like the notes
    notes: str = ""
    limits: str = ""  # what it cannot do, as text
    base_revision: str = ""  # as the next two, more about the base; see `facts_about`
    base_config_hash: str = ""
    image_tower: str = ""
    digest: str = ""  # SHA-256 of its manifest if it was loaded from a folder; recorded in concepts

    @property
    def embedding_scale(self) -> float:
        return self.pretraining.embedding_scale

    def is_for(self, model: TextToImageModel) -> bool:
        """Whether they were trained for this base; by its name where its weights are unknown."""
        recorded = self.base_fingerprint
        return is_recorded(model.base, recorded) if recorded else self.base_name == model.base.name

    def check_base(self, model: TextToImageModel) -> None:
        """Refuse a base that these weights were not trained for.

        Raises:
            IntegrityError: the weights of the base differ.
        """
        if not self.base_fingerprint:
            return self.check_shapes(model)
        if is_recorded(model.base, self.base_fingerprint):
            return None
        raise IntegrityError(
            f"the domain {self.name} was made for the base {self.base_name} ({self.base_fingerprint[:12]}), not for "
            f"this {model.base.name} ({model.weights_fingerprint[:12]})" + self._difference(model),
            hint=f"e4t pretrain --domain {self.name} --data FOLDER trains it for this base"
            + (f"; --domain-base {self.base_name} takes it as it is" if self._fits(model) else ""),
        )

    def _difference(self, model: TextToImageModel) -> str:
        if parts := differing_parts(model.base, self.base_fingerprint):
            return f", which has another {' and '.join(parts)}"
        if self.base_config_hash and self.base_config_hash == config_hash(model.base.folder, model.base.tower):
            return ", which is the same architecture with other weights"
        return ""

    def check_shapes(self, model: TextToImageModel) -> None:
        """Compare all shapes: what can be checked where the base's weights are unknown, or others are meant."""
        if self._fits(model):
            return
        raise IntegrityError(
            f"the domain {self.name} was made for a model of other sizes than {model.base.name}",
            hint=f"it was made for {self.base_name}: --base {self.base_name}",
        )

    def _fits(self, model: TextToImageModel) -> bool:
        found = {path: (len(left), right.shape[1]) for path, (left, right) in self.offsets.items()}
        sizes = (sum(feature_widths(model.unet)), model.embedding_width)
        return isinstance(self.encoder, FixedEmbedding) or (
            found == projection_shapes(model.unet) and domain_folder.widths_read(self.encoder) == sizes
        )

    def check_features(self, features: Tensor) -> None:
        """Raise IntegrityError if the encoder does not read features of this shape, (…, vectors, width)."""
        if isinstance(self.encoder, FixedEmbedding):
            return
        found, wanted = tuple(features.shape[-2:]), domain_folder.features_read(self.encoder)
        if found != wanted:
            shapes = " instead of ".join(f"{count} × {width}" for count, width in (found, wanted))
            raise IntegrityError(
                f"the image features do not fit the encoder of the domain {self.name}: {shapes} values",
                hint=f"it was made for the base {self.base_name}, with the image tower of that base",
            )

    def image_features(self, model: TextToImageModel, pixels: Tensor) -> Tensor:
        """Return the features of images in −1 … 1, (batch, vectors, width), float32.

        Raises:
            IntegrityError: the base's image tower is another one than the encoder was trained with.
        """
        if self.tower is None:
            features = model.image_features(pixels)
            self.check_features(features)
            return features
        features = self.tower.encode(pixels, model.dtype)
        # Rounded, so that a concept stores the same values in float16, a third of a megabyte.
        rounded = features.half().float()
        return rounded if rounded.isfinite().all() else features

    def save(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, offsets_dtype: torch.dtype | None = None
    ) -> None:
        """Write a domain folder, the manifest last.

        Args:
            folder: created if needed; older weights in it are replaced.
            dtype: of the files; float16 halves them and changes ΔW by 5e-4 of itself.
            offsets_dtype: of the offsets, if that is another.
        """
        assert not isinstance(self.encoder, FixedEmbedding)
        domain_folder.write_domain_folder(vars(self), folder, dtype=dtype, offsets_dtype=offsets_dtype)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a domain folder, in float32 on the CPU.

        Raises:
            WeightsUnavailable: it is no domain folder, or a file is missing.
            IntegrityError: a file is damaged or does not match the manifest.
        """
        return cls(**domain_folder.read_domain_folder(folder))


def facts_about(model: TextToImageModel) -> dict[str, str]:
    """Return the fields of `DomainWeights` that describe the base."""
    folder, tower = model.base.folder, model.base.tower
    return {
        "base_name": model.base.name,
        "base_fingerprint": model.weights_fingerprint,
        "base_revision": model.base.revision,
        "base_config_hash": config_hash(folder, tower),
        "image_tower": describe_tower(folder, tower),
    }


def usual_limits(descriptor: str, base: str, images: int) -> str:
    """Return what any domain of this size cannot do, for the manifest."""
    few = "; so few images may have been learned by heart" if images < FEW_IMAGES else ""
    trained = f"Trained on {images:,} images of {descriptor}; the image quality is that of the base {base}."
    return f"{trained} Anything else in the photo is generated as {descriptor}{few}."
