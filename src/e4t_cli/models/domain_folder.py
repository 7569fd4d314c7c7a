"""Reads and writes a domain folder: one domain's weights for one base, no code and no pickles.

    domain.toml            manifest: name, descriptor, base and its fingerprint, configs, SHA-256
    encoder.safetensors    the word-embedding encoder
    offsets.safetensors    the two factors of each ΔW
    tower.safetensors      the encoder's own visual tower, if it has one

Reading checks every tensor, its shape and hash, and that it is finite; the content of the visual tower is checked when
it is used. The manifest names one of two encoder architectures, which only this module tells apart:

    e4t             the paper's: [CLS] of every second layer of the base's own visual tower
    e4t-diffusion   [CLS] and patches of a fine-tuned visual tower stored with the domain
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from e4t_cli.errors import IntegrityError, WeightsUnavailable, printable
from e4t_cli.files import sha256_of, write_atomically
from e4t_cli.nn.patch_encoder import PatchEncoder, PatchEncoderConfig, PatchTower
from e4t_cli.nn.weight_offsets import RANK, Factors
from e4t_cli.nn.word_embedding_encoder import EncoderConfig, WordEmbeddingEncoder
from e4t_cli.registry.manifest import SCHEMA, Manifest, read_manifest, toml_text

MANIFEST = "domain.toml"


def read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file in float32, after checking its header.

    Args:
        expected: key -> shape, compared before anything is allocated; None accepts all.

    Raises:
        IntegrityError: another format, other keys or shapes, or values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = _shapes(file)
            if expected is not None:
                _compare(path.name, shapes, expected)
            tensors = {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path.name} is not a usable safetensors file: {error}") from error
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise IntegrityError(f"{path.name}: {printable(key)} has values that are not finite")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _compare(name: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise IntegrityError for other keys or shapes than expected."""
    for key in sorted(set(shapes) ^ set(expected)):
        state = "lacks" if key in expected else "has an unexpected"
        raise IntegrityError(f"{name} {state} tensor {printable(key)}")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise IntegrityError(f"{name}: {printable(key)} has shape {shapes[key]}, not {shape}")


def check_headers(folder: Path, manifest: Manifest) -> None:
    """Raise IntegrityError if the encoder's file does not have the sizes of the manifest; no tensor is read."""
    name = printable(manifest.name)
    encoder = _stated_encoder(manifest, name)
    if _ENCODER not in manifest.files:
        raise IntegrityError(f"the {MANIFEST} of {name} lists no {_ENCODER}")
    with safe_open(folder / _ENCODER, framework="pt") as file:
        shapes = _shapes(file)
    _compare(_ENCODER, shapes, {key: tuple(value.shape) for key, value in encoder.state_dict().items()})


def check_file(folder: Path, name: str, expected: str) -> None:
    """Compare a file of a domain folder with its manifest.

    Raises:
        WeightsUnavailable: it does not exist.
        IntegrityError: its SHA-256 differs.
    """
    path, shown = folder / name, printable(str(folder))
    if not os.path.isfile(path):
        raise WeightsUnavailable(f"the domain folder {shown} lacks {name}")
    if (found := sha256_of(path)) != expected:
        raise IntegrityError(f"{name} in {shown} is damaged: its SHA-256 is {found}, not {expected} as in {MANIFEST}")


def pair_factors(tensors: Mapping[str, Tensor], shown: str) -> dict[str, Factors]:
    """Return path -> factors of ΔW from "path.left" and "path.right".

    Raises:
        IntegrityError: there are other tensors; the message names the file as `shown`.
    """
    offsets: dict[str, Factors] = {}
    for key, left in tensors.items():
        path, _, side = key.rpartition(".")
        right = tensors.get(f"{path}.right")
        fits = right is not None and left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] == RANK
        if side == "left" and right is not None and fits:
            offsets[path] = left, right
    if len(tensors) != 2 * len(offsets):
        raise IntegrityError(f"{shown} has tensors that are no pairs of factors")
    return offsets


DomainEncoder = WordEmbeddingEncoder | PatchEncoder  # can be trained, saved and loaded

_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "e4t": (EncoderConfig, WordEmbeddingEncoder),
    "e4t-diffusion": (PatchEncoderConfig, PatchEncoder),
}
_DEFAULT = "e4t"  # of the first manifests, which have no architecture


def describe_encoder(encoder: DomainEncoder) -> dict[str, Any]:
    """Return its architecture and sizes, ready for a manifest."""
    for name, (_, kind) in _KINDS.items():
        if isinstance(encoder, kind):
            return {"architecture": name, **encoder.config.as_dict()}
    raise TypeError(f"a domain folder cannot hold a {type(encoder).__name__}")


def empty_encoder(described: Mapping[str, Any]) -> DomainEncoder:
    """Build the encoder that a manifest describes, on the meta device.

    Raises:
        TypeError, ValueError: the architecture is unknown, or a size is invalid.
    """
    sizes = dict(described)
    name = sizes.pop("architecture", _DEFAULT)
    if name not in _KINDS:
        raise ValueError(f"the architecture {name!r} is unknown; a newer e4t may know it")
    config_kind, kind = _KINDS[name]
    with torch.device("meta"):
        encoder: DomainEncoder = kind(config_kind.from_dict(sizes))
    return encoder


def _stated_encoder(manifest: Manifest, shown: str) -> DomainEncoder:
    try:
        return empty_encoder(manifest.encoder)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        message = f"the encoder's sizes in {shown} are wrong: {printable(str(error))}"
        raise IntegrityError(message) from error


def features_read(encoder: DomainEncoder) -> tuple[int, int]:
    """Return the number and the width of the feature vectors of an image that it reads."""
    config = encoder.config
    if isinstance(config, PatchEncoderConfig):
        return config.vectors, config.tower_width
    return config.image_layers, config.image_width


def widths_read(encoder: DomainEncoder) -> tuple[int, int]:
    """Return the width of all pooled U-Net features it reads, and of the embedding it predicts."""
    config = encoder.config
    if isinstance(config, PatchEncoderConfig):
        return config.unet_width, config.embedding_width
    return sum(config.unet_widths), config.embedding_width


@dataclass(frozen=True, kw_only=True)
class DomainImageTower:
    """The visual tower stored with a domain, loaded when an image is encoded."""

    path: Path  # of its safetensors file
    config: PatchEncoderConfig  # of the encoder it belongs to
    sha256: str = ""  # of the file, from the manifest; "" while it is being converted

    def encode(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the features of images in −1 … 1: (batch, vectors, tower_width), float32.

        It is a third of all weights and needed once for a photo, so it is loaded for that and freed. Its hash is
        checked here: sampling a saved concept need not read it.

        Raises:
            IntegrityError: the file is no such tower, or has another hash.
        """
        if self.sha256:
            check_file(self.path.parent, self.path.name, self.sha256)
        visual = empty_tower(self.config)
        try:
            visual.load_state_dict(load_file(self.path), strict=True, assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise IntegrityError(f"{self.path.name} is not the domain's tower: {error}") from error
        size, normalised = self.config.tower_image_size, self.config.normalised_patches
        tower = PatchTower(visual, size, normalised_patches=normalised)
        return cast(Tensor, tower.to(pixels.device, dtype)(pixels))


def empty_tower(config: PatchEncoderConfig) -> nn.Module:
    """Build open_clip's vision transformer of those sizes, its weights on the meta device."""
    from open_clip.transformer import QuickGELU, VisionTransformer  # slow to import

    with torch.device("meta"):
        visual: Any = VisionTransformer(
            image_size=config.tower_image_size, patch_size=config.tower_patch_size, width=config.tower_width,
            layers=config.tower_layers, heads=config.tower_heads, mlp_ratio=config.tower_mlp_ratio,
            act_layer=QuickGELU if config.tower_quick_gelu else nn.GELU,
        )  # fmt: skip
    visual.proj = None  # e4t-diffusion reads the features before CLIP's projection
    module: nn.Module = visual
    return module


_ENCODER, _OFFSETS, _TOWER = "encoder.safetensors", "offsets.safetensors", "tower.safetensors"
_PLAIN = {
    **{key: key for key in ("name", "descriptor")},
    "base_name": "base",
    **{key: key for key in ("base_fingerprint", "base_revision", "base_config_hash")},
    **{key: key for key in ("image_tower", "licence", "images", "limits", "notes")},
}
"""Field of `DomainWeights` -> key of the manifest, in the order of the file."""


def write_domain_folder(
    fields: Mapping[str, Any], folder: str | Path,
    *, dtype: torch.dtype = torch.float32, offsets_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write the fields of a `DomainWeights`, see `DomainWeights.save`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    offsets: dict[str, Tensor] = {}
    for path, (left, right) in fields["offsets"].items():
        offsets |= {f"{path}.left": left, f"{path}.right": right}
    hashes, sizes = {}, {}
    for name, tensors in {_ENCODER: fields["encoder"].state_dict(), _OFFSETS: offsets}.items():
        stored = offsets_dtype or dtype if name == _OFFSETS else dtype
        data = save({key: value.to("cpu", stored).contiguous() for key, value in tensors.items()})
        hashes[name], sizes[name] = hashlib.sha256(data).hexdigest(), len(data)
        write_atomically(folder / name, data)
    if fields["tower"] is not None:
        source, copy = fields["tower"].path, folder / _TOWER
        if not os.path.exists(copy) or not copy.samefile(source):
            with source.open("rb") as file:
                write_atomically(copy, lambda target: shutil.copyfileobj(file, target))
        hashes[_TOWER], sizes[_TOWER] = sha256_of(copy), copy.stat().st_size
    manifest = {
        "schema": SCHEMA,
        **{key: fields[name] for name, key in _PLAIN.items()},
        "templates": list(fields["templates"]),
        "encoder": describe_encoder(fields["encoder"]),
        "tuning": fields["tuning"].as_dict(),
        "pretraining": fields["pretraining"].as_dict(),
        "files": hashes,
        "sizes": sizes,
    }
    write_atomically(folder / MANIFEST, toml_text(manifest).encode())  # last: it names the others


def read_domain_folder(folder: str | Path) -> dict[str, Any]:
    """Return the fields of a `DomainWeights`, see `DomainWeights.load`."""
    folder = Path(folder)
    shown = printable(str(folder))
    if not os.path.isfile(folder / MANIFEST):
        raise WeightsUnavailable(f"{shown} is no domain folder: it has no {MANIFEST}")
    manifest = read_manifest(folder / MANIFEST)
    encoder = _stated_encoder(manifest, shown)
    tower = None
    if isinstance(encoder, PatchEncoder):
        digest = manifest.files.get(_TOWER, "")
        tower = DomainImageTower(path=folder / _TOWER, config=encoder.config, sha256=digest)
    needed = {_ENCODER, _OFFSETS} | ({_TOWER} if tower else set())
    if set(manifest.files) != needed:
        raise IntegrityError(f"{MANIFEST} in {shown} must list {', '.join(sorted(needed))}")
    if tower is not None and not os.path.isfile(tower.path):
        raise WeightsUnavailable(f"the domain folder {shown} lacks {_TOWER}")
    for name in (_ENCODER, _OFFSETS):
        check_file(folder, name, manifest.files[name])
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(read_tensors(folder / _ENCODER, expected), assign=True)
    return {
        **{name: getattr(manifest, key) for name, key in _PLAIN.items()},
        "encoder": encoder.requires_grad_(True),
        "offsets": pair_factors(read_tensors(folder / _OFFSETS), f"{_OFFSETS} in {shown}"),
        "tuning": manifest.tuning,
        "pretraining": manifest.pretraining,
        "templates": tuple(manifest.templates),
        "tower": tower,
        "digest": sha256_of(folder / MANIFEST),
    }
