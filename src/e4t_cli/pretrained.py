"""A domain pre-trained for one base: encoder, offsets, and a card that says what they are.

A pack is a folder of a few files, no code and no pickles:

    domain.toml            name, descriptor, base and its fingerprint, recipes, sha256 of the rest
    encoder.safetensors    the word-embedding encoder
    offsets.safetensors    the two factors of each ΔW
    tower.safetensors      the encoder's own image tower, if it has one (encoders.py)

The recipes of a pack are those that work on *this* domain and *this* base; a `Domain` value holds
the paper's. Loading is strict: every tensor, its shape, its hash, and that it is finite.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save
from torch import Tensor

from .architecture import config_hash, describe_tower
from .base_model import TextToImageModel
from .encoders import PackEncoder, PackTower, describe_encoder, empty_encoder, widths_read
from .errors import IntegrityError, WeightsUnavailable, printable
from .files import sha256_of, write_atomically
from .manifest import SCHEMA, read_manifest, toml_text
from .nn.patch_encoder import PatchEncoder
from .nn.unet_features import feature_widths
from .nn.weight_offsets import Factors, projection_shapes
from .nn.word_embedding_encoder import FixedEmbedding
from .pack_files import check_file, pair_factors, read_tensors
from .recipes import PretrainingRecipe, TuningRecipe

CARD = "domain.toml"
_ENCODER, _OFFSETS = "encoder.safetensors", "offsets.safetensors"
_TOWER = "tower.safetensors"
FEW_IMAGES = 100
"""Below it, a domain's card warns of over-fitting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedDomain:
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
    encoder: PackEncoder | FixedEmbedding
    offsets: Mapping[str, Factors]
    tuning: TuningRecipe
    pretraining: PretrainingRecipe
    templates: tuple[str, ...]
    tower: PackTower | None = None
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            _ENCODER: self.encoder.state_dict(),
            _OFFSETS: {
                f"{path}.{side}": factor
                for path, factors in self.offsets.items()
                for side, factor in zip(("left", "right"), factors, strict=True)
            },
        }
        hashes, sizes = {}, {}
        for name, tensors in contents.items():
            kind = offsets_dtype or dtype if name == _OFFSETS else dtype
            data = save({key: value.to("cpu", kind).contiguous() for key, value in tensors.items()})
            hashes[name], sizes[name] = hashlib.sha256(data).hexdigest(), len(data)
            write_atomically(folder / name, data)
        if self.tower is not None:
            source, copy = self.tower.path, folder / _TOWER
            if not copy.exists() or not copy.samefile(source):
                with source.open("rb") as file:
                    write_atomically(copy, lambda target: shutil.copyfileobj(file, target))
            hashes[_TOWER], sizes[_TOWER] = sha256_of(copy), copy.stat().st_size
        card = {
            "schema": SCHEMA,
            "name": self.name,
            "descriptor": self.descriptor,
            "base": self.base_name,
            "base_fingerprint": self.base_fingerprint,
            "base_revision": self.base_revision,
            "base_config_hash": self.base_config_hash,
            "image_tower": self.image_tower,
            "licence": self.licence,
            "images": self.images,
            "limits": self.limits,
            "notes": self.notes,
            "templates": list(self.templates),
            "encoder": describe_encoder(self.encoder),
            "tuning": self.tuning.as_dict(),
            "pretraining": self.pretraining.as_dict(),
            "files": hashes,
            "sizes": sizes,
        }
        write_atomically(folder / CARD, toml_text(card).encode())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a pack, in float32 on the CPU.

        Raises:
            WeightsUnavailable: there is no pack in the folder.
            IntegrityError: anything about it is not as its card says.
        """
        folder = Path(folder)
        shown = printable(str(folder))
        if not (folder / CARD).is_file():
            raise WeightsUnavailable(f"there is no pack in {shown}: it has no {CARD}")
        card = read_manifest(folder / CARD)
        try:
            encoder = empty_encoder(card.encoder)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IntegrityError(f"the encoder's sizes in {shown} are wrong: {error}") from error
        tower = None
        if isinstance(encoder, PatchEncoder):
            digest = card.files.get(_TOWER, "")
            tower = PackTower(path=folder / _TOWER, config=encoder.config, sha256=digest)
        needed = {_ENCODER, _OFFSETS} | ({_TOWER} if tower else set())
        if set(card.files) != needed:
            raise IntegrityError(f"the pack in {shown} must list {', '.join(sorted(needed))}")
        if tower is not None and not tower.path.is_file():  # its content is checked by who looks
            raise WeightsUnavailable(f"the pack in {shown} lacks {_TOWER}")
        for name in (_ENCODER, _OFFSETS):
            check_file(folder, name, card.files[name])
        expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
        encoder.load_state_dict(read_tensors(folder / _ENCODER, expected), assign=True)
        return cls(
            name=card.name,
            descriptor=card.descriptor,
            base_name=card.base,
            base_fingerprint=card.base_fingerprint,
            encoder=encoder.requires_grad_(True),
            offsets=pair_factors(read_tensors(folder / _OFFSETS), f"{_OFFSETS} in {shown}"),
            tuning=card.tuning,
            pretraining=card.pretraining,
            templates=tuple(card.templates),
            tower=tower,
            images=card.images,
            licence=card.licence,
            notes=card.notes,
            limits=card.limits,
            base_revision=card.base_revision,
            base_config_hash=card.base_config_hash,
            image_tower=card.image_tower,
            digest=sha256_of(folder / CARD),
        )


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
