"""Who or what in the photo is meant: masks and faces as the user asked for them, as values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from e4t_cli.api.choices import choose_domain, name_base, wants_half
from e4t_cli.domain import Domain, PreparationTarget, PreparedImage
from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.access import Access, AskLicence
from e4t_cli.hub.presence import look_up_base
from e4t_cli.images import OpenedImage
from e4t_cli.names import check_which
from e4t_cli.photos import Picture, open_own_mask, open_picture
from e4t_cli.preparation import MaskChoice, prepare_photo
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.segmenters import fetcher

PreparedCallback = Callable[[PreparedImage], None]
WORDS = "words"


def choose_mask(mask: Picture, photo: OpenedImage) -> MaskChoice:
    """Return what was asked for as a mask.

    Args:
        mask: "auto", "none", "words" for the domain's own words, "words:a cat", or a picture.
        photo: that it is for.

    Raises:
        UsageError: there is no such file, or no words behind the colon.
        InputError: it cannot be used, or has other proportions than the photo.
    """
    if mask in ("auto", "none", WORDS):
        return MaskChoice(kind=mask)  # type: ignore[arg-type]
    if isinstance(mask, str) and mask.startswith(f"{WORDS}:"):
        words = mask.partition(":")[2].strip()
        if not words:
            raise UsageError("--mask words: needs words", hint='--mask "words:a cat"')
        return MaskChoice(kind="words", words=words)
    return MaskChoice(kind="own", picture=open_own_mask(mask, photo.image))


def choose_target(
    domain: Domain,
    access: Access,
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
        fetch=fetcher(access),
    )


def prepare(
    domain: str | os.PathLike[str] | Domain,
    image: Picture,
    *,
    base: str | os.PathLike[str] = "auto",
    mask: Picture = "auto",
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
    value, _ = choose_domain(domain)
    photo = open_picture(image)
    access = Access(offline=offline, accept_license=accept_license, on_progress=on_progress)
    wanted = name_base(base, access, domain=value, device=device, confirm=False)
    name, size, _ = look_up_base(wanted, half=wants_half(device, "auto"))
    if not size:
        raise UsageError(
            f"the size of pictures for {printable(name)} is not known before it is fetched",
            hint=f"e4t fetch {printable(os.fspath(wanted))}",
        )
    target = choose_target(
        value, access, size=size, base=name, align=align, face=face, require_face=require_face
    )
    choice = choose_mask(mask, photo)
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
