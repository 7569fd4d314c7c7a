"""The folder of a pack: a few files, no code and no pickles.

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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from .encoders import PackTower, describe_encoder, empty_encoder
from .errors import IntegrityError, WeightsUnavailable, printable
from .files import sha256_of, write_atomically
from .manifest import SCHEMA, read_manifest, toml_text
from .nn.patch_encoder import PatchEncoder
from .pack_files import check_file, pair_factors, read_tensors

CARD = "domain.toml"
_ENCODER, _OFFSETS = "encoder.safetensors", "offsets.safetensors"
_TOWER = "tower.safetensors"


def write_pack(
    fields: Mapping[str, Any],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    offsets_dtype: torch.dtype | None = None,
) -> None:
    """Write the fields of a `PretrainedDomain` into a folder, the card last.

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


def read_pack(folder: str | Path) -> dict[str, Any]:
    """Return the fields of a `PretrainedDomain`, in float32 on the CPU.

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
