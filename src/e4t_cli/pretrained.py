"""A domain pre-trained for one base: encoder, offsets, and a card that says what they are.

A pack is a folder of three files, no code and no pickles:

    domain.toml            name, descriptor, base and its fingerprint, recipes, sha256 of the rest
    encoder.safetensors    the word-embedding encoder
    offsets.safetensors    the two factors of each ΔW

The recipes of a pack are those that work on *this* domain and *this* base; a `Domain` value holds
the paper's. Loading is strict: every tensor, its shape, its hash, and that it is finite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .base_model import TextToImageModel
from .domain import PretrainingRecipe, TuningRecipe
from .errors import IntegrityError, WeightsUnavailable, printable
from .files import sha256_of, write_atomically
from .manifest import SCHEMA, read_manifest
from .nn.weight_offsets import RANK, Factors
from .nn.word_embedding_encoder import EncoderConfig, FixedEmbedding, WordEmbeddingEncoder

CARD = "domain.toml"
_ENCODER, _OFFSETS = "encoder.safetensors", "offsets.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedDomain:
    """What domain pre-training yields (section 3.3), and what tuning starts from.

    Args:
        name, descriptor: of the domain.
        base_name, base_fingerprint: the base it was made for, and its exact weights.
        encoder: E of eq. 1; a `FixedEmbedding` makes a baseline, which cannot be saved.
        offsets: path of a projection -> the factors of its ΔW (eq. 3).
        tuning: the recipe of personalization with this pack.
        pretraining: the recipe it was made by; its `embedding_scale` is s of eq. 1.
        templates: training sentences with "{}" in the concept's place.
        images: how many pictures it was trained on.
        licence, notes: of the weights and the data; for people.
    """

    name: str
    descriptor: str
    base_name: str
    base_fingerprint: str
    encoder: WordEmbeddingEncoder | FixedEmbedding
    offsets: Mapping[str, Factors]
    tuning: TuningRecipe
    pretraining: PretrainingRecipe
    templates: tuple[str, ...]
    images: int = 0
    licence: str = ""
    notes: str = ""
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
        if model.fingerprint != self.base_fingerprint:
            raise IntegrityError(
                f"the {self.name} pack was made for the base {self.base_name} "
                f"({self.base_fingerprint[:12]}), not for this {model.base.name} "
                f"({model.fingerprint[:12]})",
                hint=f"e4t pretrain --domain {self.name} --data FOLDER makes a pack for it",
            )

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the pack into a folder, the card last.

        Args:
            folder: made if it does not exist; an older pack in it is replaced.
            dtype: of the stored numbers; float16 halves the files and moves ΔW by 5e-4 of itself.
        """
        assert isinstance(self.encoder, WordEmbeddingEncoder)
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
        hashes = {}
        for name, tensors in contents.items():
            data = save(
                {key: value.to("cpu", dtype).contiguous() for key, value in tensors.items()}
            )
            hashes[name] = hashlib.sha256(data).hexdigest()
            write_atomically(folder / name, data)
        card = {
            "schema": SCHEMA,
            "name": self.name,
            "descriptor": self.descriptor,
            "base": self.base_name,
            "base_fingerprint": self.base_fingerprint,
            "licence": self.licence,
            "images": self.images,
            "notes": self.notes,
            "templates": list(self.templates),
            "encoder": self.encoder.config.as_dict(),
            "tuning": self.tuning.as_dict(),
            "pretraining": self.pretraining.as_dict(),
            "files": hashes,
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
        if set(card.files) != {_ENCODER, _OFFSETS}:
            raise IntegrityError(f"the pack in {shown} must list {_ENCODER} and {_OFFSETS}")
        for name, sha256 in card.files.items():
            _check_file(folder, name, sha256)
        try:
            config = EncoderConfig.from_dict(card.encoder)
            with torch.device("meta"):
                encoder = WordEmbeddingEncoder(config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IntegrityError(f"the encoder's sizes in {shown} are wrong: {error}") from error
        expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
        encoder.load_state_dict(read_tensors(folder / _ENCODER, expected), assign=True)
        return cls(
            name=card.name,
            descriptor=card.descriptor,
            base_name=card.base,
            base_fingerprint=card.base_fingerprint,
            encoder=encoder.requires_grad_(True),
            offsets=_pair_factors(read_tensors(folder / _OFFSETS), folder),
            tuning=card.tuning,
            pretraining=card.pretraining,
            templates=tuple(card.templates),
            images=card.images,
            licence=card.licence,
            notes=card.notes,
            digest=sha256_of(folder / CARD),
        )


def read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file in float32, after a look at its header.

    Args:
        path: the file.
        expected: key -> shape, compared before anything is allocated; None takes what is there.

    Raises:
        IntegrityError: another format, other keys or shapes, or numbers that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            if expected is not None:
                for key in sorted(set(shapes) ^ set(expected)):
                    state = "lacks" if key in expected else "has an unexpected"
                    raise IntegrityError(f"{path.name} {state} tensor {printable(key)}")
                for key, shape in expected.items():
                    if shapes[key] != shape:
                        raise IntegrityError(
                            f"{path.name}: {printable(key)} has shape {shapes[key]}, not {shape}"
                        )
            tensors = {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path.name} is not a usable safetensors file: {error}") from error
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise IntegrityError(f"{path.name}: {printable(key)} has numbers that are not finite")
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


def toml_text(card: Mapping[str, Any]) -> str:
    """Return TOML for a flat mapping and one level of tables below it."""

    def line(key: str, value: Any) -> str:
        # JSON's strings, numbers, booleans and arrays of them are TOML's too.
        return f"{json.dumps(key) if '.' in key else key} = {json.dumps(value, ensure_ascii=True)}"

    plain = [line(key, value) for key, value in card.items() if not isinstance(value, Mapping)]
    for name, table in card.items():
        if isinstance(table, Mapping):
            plain += ["", f"[{name}]", *(line(key, value) for key, value in table.items())]
    return "\n".join(plain) + "\n"


def _check_file(folder: Path, name: str, expected: object) -> None:
    path = folder / name
    if not path.is_file():
        raise WeightsUnavailable(f"the pack in {printable(str(folder))} lacks {name}")
    found = sha256_of(path)
    if found != expected:
        raise IntegrityError(
            f"{name} in {printable(str(folder))} is damaged: "
            f"its SHA-256 is {found}, its card says {printable(str(expected), limit=80)}"
        )


def _pair_factors(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Factors]:
    offsets: dict[str, Factors] = {}
    for key, left in tensors.items():
        path, _, side = key.rpartition(".")
        if side != "left":
            continue
        right = tensors.get(f"{path}.right")
        if right is None or left.dim() != 2 or right.dim() != 2:
            break
        if left.shape[1] != RANK or right.shape[0] != RANK:
            break
        offsets[path] = left, right
    if len(tensors) != 2 * len(offsets):
        raise IntegrityError(f"{_OFFSETS} in {printable(str(folder))} holds no pairs of factors")
    return offsets
