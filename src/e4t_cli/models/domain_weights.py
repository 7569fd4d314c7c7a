"""A domain pre-trained for one base: encoder, offsets, and what is known about them.

The recipes of a pack are those that work on *this* domain and *this* base; a `Domain` value holds
the paper's. How it lies in a folder is `pack_folder`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from e4t_cli.errors import IntegrityError
from e4t_cli.models.domain_folder import (
    DomainEncoder,
    DomainImageTower,
    read_domain_folder,
    widths_read,
    write_domain_folder,
)
from e4t_cli.models.loading import config_hash, describe_tower
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.nn.unet import feature_widths
from e4t_cli.nn.weight_offsets import Factors, projection_shapes
from e4t_cli.nn.word_embedding_encoder import FixedEmbedding
from e4t_cli.registry.config import PretrainingConfig, TuningConfig

FEW_IMAGES = 100
"""Below it, a domain's card warns of over-fitting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainWeights:
    """What domain pre-training yields (section 3.3), and what tuning starts from.

    Args:
        name, descriptor: of the domain.
        base_name, base_fingerprint: the base it was made for, and its exact weights; "" where
            nobody wrote them down, as in checkpoints of other programs.
        encoder: E of eq. 1; a `FixedEmbedding` makes a baseline, which cannot be saved.
        offsets: path of a projection -> the factors of its ΔW (eq. 3).
        tuning: the recipe of personalization with this pack.
        pretraining: the recipe it was made by; its `embedding_scale` is s of eq. 1.
        templates: training sentences with "{}" in the concept's place.
        images: how many pictures it was trained on.
        tower: the encoder's own image tower; None for encoders that look through the base's.
        licence, notes: of the weights and the data; for people.
        limits: what it cannot do; for people.
        base_revision, base_config_hash, image_tower: more about the base; see `facts_about`.
    """

    name: str
    descriptor: str
    base_name: str
    base_fingerprint: str
    encoder: DomainEncoder | FixedEmbedding
    offsets: Mapping[str, Factors]
    tuning: TuningConfig
    pretraining: PretrainingConfig
    templates: tuple[str, ...]
    tower: DomainImageTower | None = None
    images: int = 0
    licence: str = ""
    notes: str = ""
    limits: str = ""
    base_revision: str = ""
    base_config_hash: str = ""
    image_tower: str = ""
    digest: str = ""
    """SHA-256 of its card when it was loaded from a folder: a concept remembers it."""

    @property
    def embedding_scale(self) -> float:
        return self.pretraining.embedding_scale

    def check_base(self, model: TextToImageModel) -> None:
        """Refuse a base that this pack was not made for.

        Raises:
            IntegrityError: the weights of the base differ.
        """
        if not self.base_fingerprint:
            return self._check_shapes(model)
        if model.fingerprint != self.base_fingerprint:
            known = self.base_config_hash
            alike = known and known == config_hash(model.base.folder, model.base.tower)
            raise IntegrityError(
                f"the {self.name} pack was made for the base {self.base_name} "
                f"({self.base_fingerprint[:12]}), not for this {model.base.name} "
                f"({model.fingerprint[:12]})"
                + (", which is the same model with other weights" if alike else ""),
                hint=f"e4t pretrain --domain {self.name} --data FOLDER makes a pack for it",
            )
        return None

    def _check_shapes(self, model: TextToImageModel) -> None:
        """What can be checked of a pack that does not know its base's weights: every shape."""
        found = {path: (len(left), right.shape[1]) for path, (left, right) in self.offsets.items()}
        width = model.text_encoder.get_input_embeddings().embedding_dim
        sizes = (sum(feature_widths(model.unet)), width)
        if isinstance(self.encoder, FixedEmbedding) or (
            found == projection_shapes(model.unet) and widths_read(self.encoder) == sizes
        ):
            return
        raise IntegrityError(
            f"the {self.name} pack was made for a model of other sizes than {model.base.name}",
            hint=f"it was made for {self.base_name}: --base {self.base_name}",
        )

    def image_features(self, model: TextToImageModel, pixels: Tensor) -> Tensor:
        """Return what this pack's encoder sees of pictures, (batch, vectors, width), float32.

        Args:
            model: the base.
            pixels: (batch, 3, height, width) in −1 … 1.
        """
        if self.tower is None:
            return model.image_features(pixels)
        seen = self.tower.look(pixels, model.dtype)
        # In half precision a concept keeps them in a third of a megabyte, and exactly.
        rounded = seen.half().float()
        return rounded if rounded.isfinite().all() else seen

    def save(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        offsets_dtype: torch.dtype | None = None,
    ) -> None:
        """Write the pack into a folder, the card last.

        Args:
            folder: made if it does not exist; an older pack in it is replaced.
            dtype: of the stored numbers; float16 halves the files and moves ΔW by 5e-4 of itself.
            offsets_dtype: of the offsets, if theirs is another.
        """
        assert not isinstance(self.encoder, FixedEmbedding)
        write_domain_folder(vars(self), folder, dtype=dtype, offsets_dtype=offsets_dtype)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a pack, in float32 on the CPU.

        Raises:
            WeightsUnavailable: there is no pack in the folder.
            IntegrityError: anything about it is not as its card says.
        """
        return cls(**read_domain_folder(folder))


def facts_about(model: TextToImageModel) -> dict[str, str]:
    """Return what a card says about the base a pack was made for, as fields of the pack."""
    folder, tower = model.base.folder, model.base.tower
    return {
        "base_name": model.base.name,
        "base_fingerprint": model.fingerprint,
        "base_revision": model.base.revision,
        "base_config_hash": config_hash(folder, tower),
        "image_tower": describe_tower(folder, tower),
    }


def usual_limits(descriptor: str, base: str, images: int) -> str:
    """Return what any domain of its kind cannot do, for the card."""
    few = "; so few pictures may have been learned by heart" if images < FEW_IMAGES else ""
    return (
        f"Knows {descriptor} as {images:,} pictures show it, and draws as well as the base {base} "
        f"does. Anything else in the photo comes out as {descriptor}{few}."
    )
