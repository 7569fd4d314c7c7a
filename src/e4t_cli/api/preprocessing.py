"""Who or what in the photo is meant: masks and faces as the user asked for them, as values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from e4t_cli.api.resolve import prefers_half, resolve_base_name, resolve_domain
from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.paths import AskLicence, HubAccess
from e4t_cli.hub.resolve import look_up_base
from e4t_cli.images.decoding import OpenedImage
from e4t_cli.images.loading import ImageInput, open_image, open_mask
from e4t_cli.images.preparation import MaskSource, prepare_photo, snapshot_downloader
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage, check_which

PreparedCallback = Callable[[PreparedImage], None]
WORDS = "words"


def resolve_mask(mask: ImageInput, photo: OpenedImage) -> MaskSource:
    """Return what was asked for as a mask.

    Args:
        mask: "auto", "none", "words" for the domain's own words, "words:a cat", or a picture.
        photo: that it is for.

    Raises:
        UsageError: there is no such file, or no words behind the colon.
        InputError: it cannot be used, or has other proportions than the photo.
    """
    if mask in ("auto", "none", WORDS):
        return MaskSource(kind=mask)  # type: ignore[arg-type]
    if isinstance(mask, str) and mask.startswith(f"{WORDS}:"):
        words = mask.partition(":")[2].strip()
        if not words:
            raise UsageError("--mask words: needs words", hint='--mask "words:a cat"')
        return MaskSource(kind="words", words=words)
    return MaskSource(kind="image", image=open_mask(mask, photo.image))


def preparation_target(
    domain: Domain,
    access: HubAccess,
    *,
    size: int,
    base: str,
    align: bool,
    face: str | int,
    require_face: bool,
    device: str = "cpu",
) -> PreparationTarget:
    """Return what the preparation is to do.

    Raises:
        UsageError: `face` means nothing, or the domain looks for none and one is required.
    """
    try:
        which = check_which(face)
    except ValueError as error:
        raise UsageError(f"--face: {printable(str(error))}") from error
    if domain.prepare is None and require_face:
        raise UsageError(
            f"the domain {domain.name!r} looks for no face", hint="leave --require-face out"
        )
    return PreparationTarget(
        size=size,
        base=base,
        align=align,
        which=which,
        required=require_face,
        device=device,
        fetch=snapshot_downloader(access),
    )


def prepare(
    domain: str | os.PathLike[str] | Domain,
    image: ImageInput,
    *,
    base: str | os.PathLike[str] = "auto",
    mask: ImageInput = "auto",
    align: bool = True,
    face: str | int = "largest",
    require_face: bool = False,
    device: str = "auto",
    offline: bool = False,
    accept_license: bool | AskLicence = False,
    on_progress: ProgressCallback | None = None,
) -> PreparedImage:
    """Do only the first part of `personalize`: crop, turn, mask. No base is loaded or fetched.

    The arguments are those of `personalize`.

    Raises:
        E4TError: as `personalize`.
    """
    value, _ = resolve_domain(domain)
    photo = open_image(image)
    access = HubAccess(offline=offline, accept_license=accept_license, on_progress=on_progress)
    wanted = resolve_base_name(base, access, domain=value, device=device, confirm=False)
    name, size, _ = look_up_base(wanted, half=prefers_half(device, "auto"))
    if not size:
        raise UsageError(
            f"the size of pictures for {printable(name)} is not known before it is fetched",
            hint=f"e4t fetch {printable(os.fspath(wanted))}",
        )
    target = preparation_target(
        value, access, size=size, base=name, align=align, face=face, require_face=require_face
    )
    choice = resolve_mask(mask, photo)
    prepared = prepare_photo(value, photo, choice, target, masked=value.tuning.mask)
    tell(prepared, on_progress)
    return prepared


def tell(prepared: PreparedImage, on_progress: ProgressCallback | None) -> None:
    """Pass on what the preparation has to say."""
    if on_progress is None:
        return
    said: list[dict[str, Any]] = [{"note": note} for note in prepared.notes]
    said += [{"remark": remark} for remark in prepared.remarks]
    for sentence in said:
        on_progress(Progress(stage="prepare", **sentence))
