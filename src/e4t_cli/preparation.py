"""A photo, a domain and a wish about the mask in; the prepared square and its mask out.

Where the mask comes from, in this order: the user's file, the user's words, the photo's own
transparency, the domain's preparation, the domain's words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from .domain import Domain, PreparationTarget, PreparedImage
from .errors import UsageError, WeightsUnavailable
from .images import LEAST_COVERAGE, OpenedImage, center_square, mask_coverage, prepare_image
from .segmenters import mask_by_words


@dataclass(frozen=True, kw_only=True)
class MaskChoice:
    """Which part of the photo the user says is the concept.

    Args:
        kind: "auto" leaves it to the photo and the domain, "none" is all of it, "words" what the
            words say, "own" what is white in a picture.
        words: of kind "words".
        picture: of kind "own": mode L, of the photo's proportions.
    """

    kind: Literal["auto", "none", "words", "own"]
    words: str = ""
    picture: Image.Image | None = None


def prepare_photo(
    domain: Domain,
    photo: OpenedImage,
    mask: MaskChoice,
    target: PreparationTarget,
    *,
    masked: bool,
) -> PreparedImage:
    """Prepare a photo as its domain does, with the mask that was asked for.

    Args:
        domain: whose preparation crops and turns.
        photo: opened.
        mask: what the user wants.
        target: what the base needs; its own `mask` is not looked at.
        masked: whether the domain's recipe uses a mask.

    Returns:
        The prepared picture, with the photo's own notes before its own.

    Raises:
        UsageError: words are wanted, and there are none.
        WeightsUnavailable: the network that finds by words is not here.
        E4TError: the domain's function failed.
    """
    opaque = photo.alpha is None or mask.kind != "auto"
    automatic = mask.kind == "auto" and opaque
    wanted = replace(target, mask="auto" if automatic else None)
    prepared = prepare_image(domain, photo.image, wanted)
    if mask.kind == "own":
        assert mask.picture is not None
        prepared = with_mask(prepared, photo.image, mask.picture)
    elif mask.kind == "words":
        words = mask.words or domain.mask_words
        if not words:
            raise UsageError(
                f"the domain {domain.name!r} has no words for its mask",
                hint='--mask "words:a cat" says what to look for',
            )
        prepared = _with_words(prepared, words, target)
    elif not opaque:
        assert photo.alpha is not None
        prepared = with_mask(prepared, photo.image, photo.alpha)
        remark = "the photo is transparent in places: what is opaque is the concept"
        prepared = replace(prepared, remarks=(*prepared.remarks, remark))
    elif automatic and masked and prepared.mask is None and domain.mask_words:
        try:
            prepared = _with_words(prepared, domain.mask_words, target)
        except WeightsUnavailable as error:
            note = f"there is no mask, the whole picture counts in tuning: {error.message}"
            prepared = replace(prepared, notes=(*prepared.notes, note))
    return replace(prepared, notes=(*photo.notes, *prepared.notes))


def with_mask(prepared: PreparedImage, photo: Image.Image, mask: Image.Image) -> PreparedImage:
    """Put a mask that lies on the photo onto the prepared picture, cropped and turned alike.

    Args:
        prepared: of `photo`.
        photo: before its preparation.
        mask: mode L, of the photo's proportions.
    """
    size, notes, image = prepared.image.width, prepared.notes, prepared.image
    if prepared.frame is not None:
        cut = prepared.frame.apply_to_mask(mask, size)
    else:
        cut = center_square(mask, size)
        square = center_square(photo, size)
        if square.tobytes() != image.tobytes():
            # Where the domain looked, only the domain knows; a mask must lie on the right pixels.
            notes = (*notes, "with a mask of your own the centred square is used")
            image = square
    return _checked(replace(prepared, image=image, mask=cut, notes=notes), "the mask covers")


def _with_words(prepared: PreparedImage, words: str, target: PreparationTarget) -> PreparedImage:
    mask = mask_by_words(prepared.image, words, target)
    found = _checked(replace(prepared, mask=mask), f"the words {words!r} were found in")
    if found.mask is None:
        return found
    remark = f"{words!r}: mask {mask_coverage(mask):.0%}"
    return replace(found, remarks=(*found.remarks, remark))


def _checked(prepared: PreparedImage, found: str) -> PreparedImage:
    """Leave out a mask over nearly nothing: the loss divides by its area."""
    if prepared.mask is None or mask_coverage(prepared.mask) >= LEAST_COVERAGE:
        return prepared
    note = f"{found} less than 1 % of the picture: the whole picture counts in tuning"
    return replace(prepared, mask=None, notes=(*prepared.notes, note))
