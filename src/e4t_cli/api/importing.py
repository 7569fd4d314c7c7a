"""Imports checkpoints of e4t-diffusion: as domain weights, and, if tuned, as a concept.

A checkpoint is a folder of the user's, or a repository that a domain names, which is fetched and
converted once (`fetch_converted`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from e4t_cli.api.options import ImportKeywords, ImportOptions
from e4t_cli.api.requests import NEW_PRETRAINING, NEW_TUNING
from e4t_cli.api.resolve import base_name, refuse_addons, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable, printable
from e4t_cli.files import check_absent, put_in_place, sha256_of, staging_directory
from e4t_cli.formats.e4t_diffusion.checkpoint import (
    MERGED_UNET,
    Checkpoint,
    ConversionRequest,
    convert,
    converting,
    read_checkpoint,
    tower_sizes,
)
from e4t_cli.formats.e4t_diffusion.checkpoint import UNET as TUNED
from e4t_cli.hub.bases import (
    converted_weights_folder,
    converted_weights_path,
    e4t_diffusion_repository,
    hub_location,
)
from e4t_cli.hub.download import fetch_files
from e4t_cli.hub.paths import HubAccess, Terms, accept
from e4t_cli.hub.repo_info import cached_commit, cached_repo_info, get_repo_info
from e4t_cli.hub.resolve import look_up_base
from e4t_cli.images.loading import ImageInput, center_square, open_image
from e4t_cli.progress import Progress
from e4t_cli.prompts import training_templates
from e4t_cli.registry.discovery import USER, installed_domains, user_domains_folder
from e4t_cli.registry.domain import Domain, PreparedImage, check_name
from e4t_cli.registry.manifest import read_manifest
from e4t_cli.registry.store import add_to_store, check_free_in_store
from e4t_cli.temporary import sweep

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.text_to_image import TextToImageModel

FILES = ("config.json", "encoder.pt", "weight_offsets.pt")
UNSTATED = (
    "no licence is stated; the face weights were trained on FFHQ and CelebA-HQ, which are for non-commercial research"
)


def fetch_converted(domain: Domain, base: str, location: str, access: HubAccess, *, repair: bool = False) -> Path:
    """Return the folder of domain weights converted from a checkpoint of the hub, for the base of that name.

    Args:
        location: "e4t-diffusion:owner/name", from `Domain.weights`.
        repair: verify the checksums, and convert again if the folder is damaged.

    Raises:
        WeightsUnavailable: not here, and it cannot be fetched, or its licence is not accepted.
        IntegrityError, ResourceError: it is not a checkpoint; the disk has no room.
    """
    ready = converted_weights_folder(location)
    if ready is not None:
        if not repair or is_whole(ready):
            return ready
        access.note(f"the converted weights of {domain.name} are damaged; converting them again")
        shutil.rmtree(ready)
    repository = e4t_diffusion_repository(location)
    if repository is None:
        raise WeightsUnavailable(f"{printable(location)!r} is no location of weights")
    info, command = get_repo_info(repository, None, access), f"e4t fetch {domain.name} --base {base}"
    licence = info.licence if info is not None else ""
    if info is None and cached_commit(repository, None) is None:
        message = f"the weights of domain {domain.name!r} for {base} are not on this machine, and e4t is offline"
        raise WeightsUnavailable(message, hint=f"with a network: {command}")
    accept(Terms(repository=repository, licence=licence, note=UNSTATED), access)
    folder = fetch_files(repository, None, FILES, access, repair=repair, command=command)
    checkpoint = read_checkpoint(folder)
    declared = cached_repo_info(repository, folder.name)
    digests = declared.digests if declared is not None else {}
    request = replace(
        conversion_request(checkpoint, domain, domain.name, base),
        licence=licence or UNSTATED,
        sha256={name: digests[name] for name in FILES if len(digests.get(name, "")) == 64},
        notes=f"From {repository} at {folder.name}.",
    )
    target = converted_weights_path(repository, folder.name)
    access.remark(convert(request, target, access.on_progress).summary())
    return target


def is_whole(folder: Path) -> bool:
    """Compare every file of a domain folder with its manifest."""
    try:
        files = read_manifest(folder / "domain.toml").files
        return all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (IntegrityError, OSError):
        return False


# Repositories that checkpoints name and that exist no more -> the name of the mirror's base.
_GONE = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-2-1": "sd21",
}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint that was converted: name of the domain and its base, folder of the weights, a one-line summary."""

    name: str
    base: str
    folder: Path
    summary: str


def import_checkpoint(folder: str | os.PathLike[str], **options: Unpack[ImportKeywords]) -> Imported:
    """Convert a checkpoint folder of e4t-diffusion into a user domain.

    Args:
        folder: with config.json, encoder.pt, and weight_offsets.pt or, tuned, unet.pt.
        options: keywords, the fields of `ImportOptions`.

    Raises:
        UsageError: no such folder, a name that cannot be used or is taken, or an unknown base.
        IntegrityError, ResourceError: it is no such checkpoint, or hostile; the disk has no room.
    """
    asked = ImportOptions(**options)
    checkpoint = read_checkpoint(Path(folder))
    request, target = _request(checkpoint, asked)
    check_free_in_store(target, force=asked.force)
    if asked.on_progress and checkpoint.tuned:
        note = "this checkpoint was tuned on one image: it knows one subject better than others"
        asked.on_progress(Progress(stage="convert", note=note))
    with converting(request, target, asked.on_progress) as (made, result):
        add_to_store(made, target, force=asked.force)
    return Imported(name=request.name, base=request.base, folder=target, summary=result.summary())


def _request(checkpoint: Checkpoint, asked: ImportOptions) -> tuple[ConversionRequest, Path]:
    """Return what to convert and the new domain's place."""
    refuse_addons(asked)
    alike = _domain_alike(checkpoint, asked.name)
    chosen = asked.name or (
        alike.name if alike else re.sub(r"[^a-z0-9_-]+", "-", checkpoint.descriptor.lower()).strip("-_")[:64]
    )
    try:
        check_name(chosen)
    except ValueError as error:
        raise UsageError(str(error), hint="choose one with --name") from error
    request = conversion_request(
        checkpoint, alike, chosen, _base_name(checkpoint, asked.base), asked.normalised_patches
    )
    licence = asked.licence or "as the checkpoint's, which does not state one"
    return replace(request, licence=licence), user_domains_folder() / chosen


def conversion_request(
    checkpoint: Checkpoint, domain: Domain | None, name: str, base: str, normalised_patches: bool = False
) -> ConversionRequest:
    domain = domain or Domain(name="x", descriptor=checkpoint.descriptor, tuning=NEW_TUNING)
    pretraining = (domain.pretraining or NEW_PRETRAINING).replace(embedding_scale=checkpoint.scale)
    return ConversionRequest(
        folder=os.path.realpath(checkpoint.folder), weights=checkpoint.weights, name=name, base=base,
        descriptor=checkpoint.descriptor, templates=tuple(training_templates(domain)),
        tower=tower_sizes(checkpoint.tower, normalised_patches=normalised_patches),
        image_tower=f"its own: {checkpoint.tower}, trained further",
        tuning=domain.tuning, pretraining=pretraining,
    )  # fmt: skip


def _domain_alike(checkpoint: Checkpoint, name: str | None) -> Domain | None:
    """Return the installed domain whose configs fit: of that name, or of that descriptor."""
    known = [one.domain for one in installed_domains() if one.domain is not None]
    alike = [one for one in known if name == one.name or checkpoint.descriptor == one.descriptor]
    return min(alike, key=lambda one: one.name != name, default=None)


def _base_name(checkpoint: Checkpoint, base: str | os.PathLike[str] | TextToImageModel) -> str:
    if not isinstance(base, str | os.PathLike):
        return base_name(base)
    wanted = _named_base(checkpoint) if base == "auto" else os.fspath(base)
    if os.path.exists(wanted):
        return look_up_base(wanted)[0]
    if (address := hub_location(wanted)) is not None:
        return address.name
    if base != "auto":
        try:
            return check_name(wanted, "base")
        except ValueError as error:
            raise UsageError(str(error)) from error
    raise UsageError(
        f"the checkpoint was trained on {printable(checkpoint.base)!r}, which is no known base",
        hint="name the base: --base sd14, or --base FOLDER",
    )


def _named_base(checkpoint: Checkpoint) -> str:
    return _GONE.get(checkpoint.base, checkpoint.base)


def import_concept(
    folder: str | os.PathLike[str],
    save: str | os.PathLike[str],
    *,
    image: ImageInput | None = None,
    **options: Unpack[ImportKeywords],
) -> Imported:
    """Convert a tuned checkpoint into a user domain and a concept with its weights.

    The concept holds the tuned U-Net with its offsets merged, in half precision, and the tuned
    encoder's output for the image: what e4t-diffusion itself would sample from.

    Args:
        folder: with unet.pt, encoder.pt, config.json.
        save: the concept's file.
        image: the image it was tuned on; by default the domain.png in the folder.
        options: keywords, the fields of `ImportOptions`.

    Raises:
        UsageError: it has no tuned U-Net, or the image is missing.
        E4TError: another of its children.
    """
    asked, path = ImportOptions(**options), Path(save)
    checkpoint = read_checkpoint(Path(folder))
    if checkpoint.weights != TUNED:
        message = f"{printable(str(folder))} has no {TUNED}: it is a domain, and no concept to save"
        raise UsageError(message, hint="without --save, then: e4t personalize DOMAIN PHOTO PROMPT")
    image = image if image is not None else checkpoint.photo
    if image is None:
        raise UsageError("the image it was tuned on is not in the folder", hint="give it with --image FILE")
    photo = open_image(image)
    session = Session(asked)
    named = asked if asked.base != "auto" else replace(asked, base=_named_base(checkpoint))
    base = resolve_base(named, session.access)
    named = replace(asked, base=base_name(base) if asked.base == "auto" else asked.base)
    request, target = _request(checkpoint, named)
    ours = is_concept if asked.force else None
    sweep(target)  # also where the concept is complete, and nothing else is done
    check_absent(path, ours=ours)
    if not _is_from(target, checkpoint):
        check_free_in_store(target, force=asked.force)
    with converting(replace(request, keep_unet=True), target, session.report) as (made, result):
        with session.running():
            session.load(base, made)
            concept = _concept(session, request.name, made, photo.image, photo.sha256)
        (made / MERGED_UNET).unlink()  # the concept has them now
        with staging_directory(path) as staging:
            concept.save(staging / path.name)
            known = _same_manifest(made, target)  # of a run that was killed between domain and concept
            if not known:
                add_to_store(made, target, force=asked.force)
            try:
                put_in_place(staging / path.name, path, ours=ours)
            except BaseException:
                if not known and not asked.force:
                    shutil.rmtree(target, ignore_errors=True)  # both, or nothing
                raise
    return Imported(name=request.name, base=request.base, folder=target, summary=result.summary())


def is_concept(path: Path) -> bool:
    """Whether a file is a concept."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return "e4t" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _is_from(folder: Path, checkpoint: Checkpoint) -> bool:
    """Whether a domain folder was converted from the files of a checkpoint."""
    with contextlib.suppress(IntegrityError, OSError):
        notes = read_manifest(folder / "domain.toml").notes
        return all(sha256_of(checkpoint.folder / name) in notes for name in ("encoder.pt", checkpoint.weights))
    return False


def _same_manifest(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return (one / "domain.toml").read_bytes() == (other / "domain.toml").read_bytes()
    return False


def _concept(session: Session, name: str, folder: Path, photo: Image, sha256: str) -> Concept:
    import torch

    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.domain_folder import read_tensors

    model, pretrained = session.model, session.pretrained
    # e4t-diffusion encodes the whole square, without a mask.
    prepared = PreparedImage(image=center_square(photo, model.resolution))
    features = pretrained.image_features(model, model.pixels([prepared.image]))
    with torch.no_grad():
        encoded_image = pretrained.encoder.to(features.device).encode_image(features)
    unet = read_tensors(folder / MERGED_UNET)
    weights = {f"unet.{key}": value.half() for key, value in unet.items()}
    for_inference = pretrained.encoder.for_inference().state_dict()
    weights |= {f"encoder.{key}": value.cpu() for key, value in for_inference.items()}
    config = pretrained.tuning.replace(steps=0)  # this program tuned nothing
    concept = Concept(
        domain=name, package=USER, descriptor=pretrained.descriptor,
        base_name=model.base.name, base_fingerprint=model.weights_fingerprint, weights_digest=pretrained.digest,
        prepared=prepared, image_features=features[0].cpu(), config=config, seed=0, image_sha256=sha256,
        weights={**weights, "folded": encoded_image.cpu()},
    )  # fmt: skip
    concept.tuned(model, pretrained)  # raises before a file is written if the weights do not fit
    return concept
