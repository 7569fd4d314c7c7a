"""The files of a pack, read with suspicion: hashes, headers, shapes, and finite numbers.

The kinds of encoder that a pack can hold, by the word in its card.

    e4t             the paper's reading: [CLS] of every second layer of the base's own image tower
    e4t-diffusion   [CLS] and patches of a fine-tuned tower that travels with the pack

This is the only place that knows them all; everything else meets an `Encoder`.

The folder of a pack: a few files, no code and no pickles.

    domain.toml            name, descriptor, base and its fingerprint, recipes, sha256 of the rest
    encoder.safetensors    the word-embedding encoder
    offsets.safetensors    the two factors of each ΔW
    tower.safetensors      the encoder's own image tower, if it has one (encoders.py)

Reading is strict: every tensor, its shape, its hash, and that it is finite. Only a tower's content
is left to whoever looks through it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from e4t_cli.errors import IntegrityError, WeightsUnavailable, printable
from e4t_cli.files import sha256_of, write_atomically
from e4t_cli.nn.patch_encoder import PatchEncoder, PatchEncoderConfig, PatchTower
from e4t_cli.nn.weight_offsets import RANK, Factors
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, WordEmbeddingEncoder
from e4t_cli.registry.manifest import SCHEMA, read_manifest, toml_text


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


def check_file(folder: Path, name: str, expected: str) -> None:
    """Compare a file of a pack with its card.

    Raises:
        WeightsUnavailable: it is not there.
        IntegrityError: its SHA-256 is another.
    """
    path = folder / name
    if not path.is_file():
        raise WeightsUnavailable(f"the pack in {printable(str(folder))} lacks {name}")
    found = sha256_of(path)
    if found != expected:
        raise IntegrityError(
            f"{name} in {printable(str(folder))} is damaged: "
            f"its SHA-256 is {found}, its card says {expected}"
        )


def pair_factors(tensors: Mapping[str, Tensor], shown: str) -> dict[str, Factors]:
    """Return path -> factors of ΔW from "path.left" and "path.right".

    Args:
        shown: the file, for messages.

    Raises:
        IntegrityError: they are no such pairs.
    """
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
        raise IntegrityError(f"{shown} holds no pairs of factors")
    return offsets


DomainEncoder = WordEmbeddingEncoder | PatchEncoder
"""An encoder that can be trained, saved and loaded."""

_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "e4t": (EncoderConfig, WordEmbeddingEncoder),
    "e4t-diffusion": (PatchEncoderConfig, PatchEncoder),
}
_FIRST = "e4t"  # what a card means that does not say: the first packs were written so


def describe_encoder(encoder: DomainEncoder) -> dict[str, Any]:
    """Return its architecture and sizes, ready for a card."""
    for name, (_, kind) in _KINDS.items():
        if isinstance(encoder, kind):
            return {"architecture": name, **encoder.config.as_dict()}
    raise TypeError(f"a pack cannot hold a {type(encoder).__name__}")


def empty_encoder(described: Mapping[str, Any]) -> DomainEncoder:
    """Build the encoder that a card describes, its weights on the meta device.

    Raises:
        TypeError, ValueError: the architecture is unknown, or a size is none.
    """
    sizes = dict(described)
    name = sizes.pop("architecture", _FIRST)
    if name not in _KINDS:
        raise ValueError(f"the architecture {name!r} is unknown; a newer e4t may know it")
    config_kind, kind = _KINDS[name]
    with torch.device("meta"):
        return kind(config_kind.from_dict(sizes))


def widths_read(encoder: DomainEncoder) -> tuple[int, int]:
    """Return how many pooled U-Net features it reads, and the width of the word it predicts."""
    config = encoder.config
    if isinstance(config, PatchEncoderConfig):
        return config.unet_width, config.embedding_width
    return sum(config.unet_widths), config.embedding_width


@dataclass(frozen=True, kw_only=True)
class DomainImageTower:
    """The image tower that travels with a pack, on disk until somebody looks through it.

    Args:
        path: its safetensors file.
        config: of the encoder it belongs to.
        sha256: of the file, as the pack's card says; "" for one that is being made.
    """

    path: Path
    config: PatchEncoderConfig
    sha256: str = ""

    def look(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what it sees of pictures in −1 … 1: (batch, vectors, tower_width), float32.

        The tower is a third of all weights and needed once for a photo: it is loaded for the
        look, on the device of the pixels, and let go after it. Its hash is compared here, so
        that drawing a saved concept does not read a gigabyte for nothing.

        Raises:
            IntegrityError: the file is no such tower, or another than the card says.
        """
        if self.sha256:
            check_file(self.path.parent, self.path.name, self.sha256)
        visual = empty_tower(self.config)
        try:
            visual.load_state_dict(load_file(self.path), strict=True, assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise IntegrityError(f"{self.path.name} is not the pack's tower: {error}") from error
        tower = PatchTower(
            visual,
            self.config.tower_image_size,
            normalised_patches=self.config.normalised_patches,
        )
        return tower.to(pixels.device, dtype)(pixels)


def empty_tower(config: PatchEncoderConfig) -> nn.Module:
    """Build open_clip's vision transformer of those sizes, its weights on the meta device."""
    from open_clip.transformer import QuickGELU, VisionTransformer  # only who looks pays for it

    with torch.device("meta"):
        visual = VisionTransformer(
            image_size=config.tower_image_size,
            patch_size=config.tower_patch_size,
            width=config.tower_width,
            layers=config.tower_layers,
            heads=config.tower_heads,
            mlp_ratio=config.tower_mlp_ratio,
            act_layer=QuickGELU if config.tower_quick_gelu else nn.GELU,
        )
    visual.proj = None  # e4t-diffusion looks before the projection to CLIP's common space
    return visual


CARD = "domain.toml"
_ENCODER, _OFFSETS = "encoder.safetensors", "offsets.safetensors"
_TOWER = "tower.safetensors"


def write_domain_folder(
    fields: Mapping[str, Any],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    offsets_dtype: torch.dtype | None = None,
) -> None:
    """Write the fields of a `DomainWeights` into a folder, the card last.

    Args:
        folder: made if it does not exist; an older pack in it is replaced.
        dtype: of the stored numbers; float16 halves the files and moves ΔW by 5e-4 of itself.
        offsets_dtype: of the offsets, if theirs is another.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        _ENCODER: fields["encoder"].state_dict(),
        _OFFSETS: {
            f"{path}.{side}": factor
            for path, factors in fields["offsets"].items()
            for side, factor in zip(("left", "right"), factors, strict=True)
        },
    }
    hashes, sizes = {}, {}
    for name, tensors in contents.items():
        kind = offsets_dtype or dtype if name == _OFFSETS else dtype
        data = save({key: value.to("cpu", kind).contiguous() for key, value in tensors.items()})
        hashes[name], sizes[name] = hashlib.sha256(data).hexdigest(), len(data)
        write_atomically(folder / name, data)
    if fields["tower"] is not None:
        source, copy = fields["tower"].path, folder / _TOWER
        if not copy.exists() or not copy.samefile(source):
            with source.open("rb") as file:
                write_atomically(copy, lambda target: shutil.copyfileobj(file, target))
        hashes[_TOWER], sizes[_TOWER] = sha256_of(copy), copy.stat().st_size
    card = {
        "schema": SCHEMA,
        "name": fields["name"],
        "descriptor": fields["descriptor"],
        "base": fields["base_name"],
        "base_fingerprint": fields["base_fingerprint"],
        "base_revision": fields["base_revision"],
        "base_config_hash": fields["base_config_hash"],
        "image_tower": fields["image_tower"],
        "licence": fields["licence"],
        "images": fields["images"],
        "limits": fields["limits"],
        "notes": fields["notes"],
        "templates": list(fields["templates"]),
        "encoder": describe_encoder(fields["encoder"]),
        "tuning": fields["tuning"].as_dict(),
        "pretraining": fields["pretraining"].as_dict(),
        "files": hashes,
        "sizes": sizes,
    }
    write_atomically(folder / CARD, toml_text(card).encode())


def read_domain_folder(folder: str | Path) -> dict[str, Any]:
    """Return the fields of a `DomainWeights`, in float32 on the CPU.

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
        tower = DomainImageTower(path=folder / _TOWER, config=encoder.config, sha256=digest)
    needed = {_ENCODER, _OFFSETS} | ({_TOWER} if tower else set())
    if set(card.files) != needed:
        raise IntegrityError(f"the pack in {shown} must list {', '.join(sorted(needed))}")
    if tower is not None and not tower.path.is_file():  # its content is checked by who looks
        raise WeightsUnavailable(f"the pack in {shown} lacks {_TOWER}")
    for name in (_ENCODER, _OFFSETS):
        check_file(folder, name, card.files[name])
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(read_tensors(folder / _ENCODER, expected), assign=True)
    return {
        "name": card.name,
        "descriptor": card.descriptor,
        "base_name": card.base,
        "base_fingerprint": card.base_fingerprint,
        "encoder": encoder.requires_grad_(True),
        "offsets": pair_factors(read_tensors(folder / _OFFSETS), f"{_OFFSETS} in {shown}"),
        "tuning": card.tuning,
        "pretraining": card.pretraining,
        "templates": tuple(card.templates),
        "tower": tower,
        "images": card.images,
        "licence": card.licence,
        "notes": card.notes,
        "limits": card.limits,
        "base_revision": card.base_revision,
        "base_config_hash": card.base_config_hash,
        "image_tower": card.image_tower,
        "digest": sha256_of(folder / CARD),
    }
