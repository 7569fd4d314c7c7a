"""Weights of another program on the hub, which a domain names: fetched, converted once, used.

A folder of e4t-diffusion made a domain of the user's.

A tuned checkpoint of e4t-diffusion as a concept: drawn as it is, without tuning again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from e4t_cli.api.resolve import base_name, resolve_base
from e4t_cli.api.session import Session
from e4t_cli.errors import IntegrityError, UsageError, WeightsUnavailable, printable
from e4t_cli.files import sha256_of
from e4t_cli.formats.e4t_diffusion.checkpoint import (
    MERGED_UNET,
    Checkpoint,
    ConversionRequest,
    convert,
    read_checkpoint,
    tower_sizes,
)
from e4t_cli.formats.e4t_diffusion.checkpoint import UNET as TUNED
from e4t_cli.hub.bases import (
    converted_weights_folder,
    converted_weights_path,
    e4t_diffusion_repository,
    hub_location,
    read_base,
)
from e4t_cli.hub.download import cached_commit, cached_repo_info, fetch_files, get_repo_info
from e4t_cli.hub.paths import HubAccess, Terms, accept
from e4t_cli.images.loading import ImageInput, center_square, open_image
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.prompts import training_templates
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import USER, installed_domains, user_domains_folder
from e4t_cli.registry.domain import Domain, PreparedImage, check_name
from e4t_cli.registry.manifest import read_manifest

FILES = ("config.json", "encoder.pt", "weight_offsets.pt")
UNSTATED = (
    "no licence is stated; the face weights were trained on FFHQ and CelebA-HQ, which are for "
    "non-commercial research"
)


def fetch_converted(
    domain: Domain, base: str, location: str, access: HubAccess, *, repair: bool = False
) -> Path:
    """Return a domain's pack that is made from a checkpoint of the hub; made now if need be.

    Args:
        domain: for its recipes and sentences.
        base: its name.
        location: "e4t-diffusion:owner/name", from `Domain.weights`.
        access: how the hub may be used.
        repair: read the whole pack, and make it again if it is damaged.

    Raises:
        WeightsUnavailable: not here, and it cannot be fetched, or its licence is not accepted.
        IntegrityError: what was fetched is not a checkpoint.
        ResourceError: the disk has no room.
    """
    ready = converted_weights_folder(location)
    if ready is not None:
        if not repair or is_whole(ready):
            return ready
        access.note(f"the converted weights of {domain.name} are damaged: making them again")
        shutil.rmtree(ready)
    repository = e4t_diffusion_repository(location)
    if repository is None:
        raise WeightsUnavailable(f"{printable(location)!r} is no place of weights")
    info = get_repo_info(repository, None, access)
    licence = info.licence if info is not None else ""
    known = cached_commit(repository, None)
    if info is None and known is None:
        raise WeightsUnavailable(
            f"the weights of domain {domain.name!r} for {base} are not on this machine, "
            "and e4t is offline",
            hint=f"with a network: e4t fetch {domain.name} --base {base}",
        )
    accept(Terms(repository=repository, licence=licence, note=UNSTATED), access)
    folder = fetch_files(
        repository,
        None,
        FILES,
        access,
        repair=repair,
        command=f"e4t fetch {domain.name} --base {base}",
    )
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
    result = convert(request, target, access.on_progress)
    access.remark(result.summary())
    return target


def is_whole(folder: Path) -> bool:
    """Read a pack, and compare every file with its card."""
    try:
        card = read_manifest(folder / "domain.toml")
        return all(sha256_of(folder / name) == digest for name, digest in card.files.items())
    except (IntegrityError, OSError):
        return False


_GONE = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-2-1": "sd21",
}
"""Repositories that checkpoints name and that exist no more -> the mirror's name here."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint that is now a domain's pack.

    Args:
        name: of the domain.
        base: that it is for.
        folder: of the pack.
        checkpoint: what was read.
        summary: what the conversion found, one sentence.
    """

    name: str
    base: str
    folder: Path
    checkpoint: Checkpoint
    summary: str


def import_checkpoint(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    licence: str = "",
    normalised_patches: bool = False,
    keep_unet: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Imported:
    """Convert a checkpoint folder of e4t-diffusion into a domain of the user's.

    Args:
        folder: with config.json, encoder.pt, and weight_offsets.pt or, tuned, unet.pt.
        name: of the domain; by default the installed one with its descriptor, or the descriptor.
        base: the model it was trained on, as `--base` takes it; by default what it says itself.
        licence: of the weights, for the pack's card.
        normalised_patches: see `PatchTower`; for an open_clip from 2024 on.
        keep_unet: keep the merged weights of a tuned U-Net beside the pack, for a concept.
        on_progress: called as it goes.

    Raises:
        UsageError: no such folder, a name that cannot be used, or a base that nobody knows.
        IntegrityError: it is no such checkpoint, or hostile.
        ResourceError: the disk has no room.
    """
    checkpoint = read_checkpoint(Path(folder))
    alike = _domain_alike(checkpoint, name)
    chosen = name or (alike.name if alike else _slug(checkpoint.descriptor))
    try:
        check_name(chosen)
    except ValueError as error:
        raise UsageError(str(error), hint="choose one with --name") from error
    target = user_domains_folder() / chosen
    if target.exists():
        raise UsageError(
            f"there is a domain in {printable(str(target))} already",
            hint="choose another name with --name",
        )
    request = replace(
        conversion_request(
            checkpoint, alike, chosen, _base_name(checkpoint, base), normalised_patches
        ),
        licence=licence or "as the checkpoint's, which does not state one",
        keep_unet=keep_unet,
    )
    if on_progress and checkpoint.tuned and not keep_unet:
        note = "this checkpoint was tuned on one picture: it knows one subject better than others"
        on_progress(Progress(stage="convert", note=note))
    result = convert(request, target, on_progress)
    return Imported(
        name=chosen,
        base=request.base,
        folder=target,
        checkpoint=checkpoint,
        summary=result.summary(),
    )


def conversion_request(
    checkpoint: Checkpoint,
    domain: Domain | None,
    name: str,
    base: str,
    normalised_patches: bool = False,
) -> ConversionRequest:
    # The paper's numbers for cats, its unmasked domain of things (section 3.5).
    usual = TuningConfig(steps=5, base_learning_rate=3e-6, reg_weight=1e-4)
    pretraining = domain.pretraining if domain else None
    plain = Domain(name="x", descriptor=checkpoint.descriptor, tuning=usual)
    return ConversionRequest(
        folder=str(checkpoint.folder.resolve()),
        weights=checkpoint.weights,
        tower=tower_sizes(checkpoint.tower, normalised_patches=normalised_patches),
        name=name,
        descriptor=checkpoint.descriptor,
        base=base,
        tuning=domain.tuning if domain else usual,
        pretraining=(pretraining or PretrainingConfig(steps=60_000)).replace(
            embedding_scale=checkpoint.scale
        ),
        templates=tuple(training_templates(domain or plain)),
        image_tower=f"its own: {checkpoint.tower}, trained further",
    )


def _domain_alike(checkpoint: Checkpoint, name: str | None) -> Domain | None:
    """Return the installed domain whose recipes suit: of that name, or of that descriptor."""
    known = [one.domain for one in installed_domains() if one.domain is not None]
    named = [one for one in known if one.name == name]
    described = [one for one in known if one.descriptor == checkpoint.descriptor]
    return next(iter(named + described), None)


def base_of(checkpoint: Checkpoint) -> str:
    """Return the base it was trained on, under a name that still leads somewhere."""
    return _GONE.get(checkpoint.base, checkpoint.base)


def _base_name(checkpoint: Checkpoint, base: str | os.PathLike[str] | None) -> str:
    wanted = os.fspath(base) if base is not None else base_of(checkpoint)
    if Path(wanted).is_dir():
        return read_base(Path(wanted)).name
    address = hub_location(wanted)
    if address is not None:
        return address.name
    if base is not None:
        try:
            return check_name(wanted, "base")
        except ValueError as error:
            raise UsageError(str(error)) from error
    raise UsageError(
        f"the checkpoint was trained on {printable(checkpoint.base)!r}, which means nothing here",
        hint="say which base that is: --base sd14, or --base FOLDER",
    )


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", word.lower()).strip("-_")[:64]


def import_concept(
    folder: str | os.PathLike[str],
    save: str | os.PathLike[str],
    *,
    image: ImageInput | None = None,
    name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    licence: str = "",
    normalised_patches: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    access: HubAccess | None = None,
    on_progress: ProgressCallback | None = None,
) -> Imported:
    """Convert a tuned checkpoint into a domain of the user's and a concept with its weights.

    The concept holds the tuned U-Net with its offsets merged, in half precision, and what the
    tuned encoder says of the picture: what e4t-diffusion itself would draw from.

    Args:
        folder: with unet.pt, encoder.pt, config.json.
        save: the concept's file.
        image: the picture it was tuned on; by default the domain.png that lies there.
        access: how the base may be fetched.

    The other arguments are those of `import_checkpoint` and of `personalize`.

    Raises:
        UsageError: it has no tuned U-Net, or nobody knows the picture.
        E4TError: another of its children.
    """
    checkpoint = read_checkpoint(Path(folder))
    if checkpoint.weights != TUNED:
        raise UsageError(
            f"{printable(str(folder))} has no {TUNED}: it is a domain, and no concept to save",
            hint="leave --save away, then: e4t personalize DOMAIN PHOTO PROMPT",
        )
    if image is None and checkpoint.photo is None:
        raise UsageError(
            "the picture it was tuned on is not in the folder", hint="give it with --image FILE"
        )
    opened = open_image(image if image is not None else str(checkpoint.photo))
    session = Session(device, dtype, on_progress)
    access = access or HubAccess(on_progress=session.report)
    place = resolve_base(
        base if base is not None else base_of(checkpoint), access, device=device, dtype=dtype
    )
    imported = import_checkpoint(
        folder,
        name=name,
        base=base if base is not None else base_name(place),
        licence=licence,
        normalised_patches=normalised_patches,
        keep_unet=True,
        on_progress=session.report,
    )
    try:
        with session.running():
            session.load(place, imported.folder)
            _save(session, imported, opened.image, opened.sha256, Path(save))
    except BaseException:
        shutil.rmtree(imported.folder, ignore_errors=True)  # both, or nothing
        raise
    with contextlib.suppress(OSError):
        (imported.folder / MERGED_UNET).unlink()  # the concept has them now
    return imported


def _save(session: Session, imported: Imported, photo: object, sha256: str, path: Path) -> None:
    import torch

    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.domain_folder import read_tensors

    model, pretrained = session.model, session.pretrained
    # Theirs sees the whole square, without a mask.
    prepared = PreparedImage(image=center_square(photo, model.resolution))  # type: ignore[arg-type]
    features = pretrained.image_features(model, model.pixels([prepared.image]))
    with torch.no_grad():
        encoded_image = pretrained.encoder.to(features.device).encode_image(features)
    unet = read_tensors(imported.folder / MERGED_UNET)
    weights = {f"unet.{key}": value.half() for key, value in unet.items()}
    for_inference = pretrained.encoder.for_inference().state_dict()
    weights |= {f"encoder.{key}": value.cpu() for key, value in for_inference.items()}
    concept = Concept(
        domain=imported.name,
        descriptor=pretrained.descriptor,
        base_name=model.base.name,
        base_fingerprint=model.fingerprint,
        weights_digest=pretrained.digest,
        prepared=prepared,
        image_features=features[0].cpu(),
        config=pretrained.tuning.replace(steps=0),  # nothing was tuned by this program
        seed=0,
        image_sha256=sha256,
        package=USER,
        weights={**weights, "folded": encoded_image.cpu()},
    )
    concept.tuned(model, pretrained)  # weights of another model stop us before a file is written
    concept.save(path)
