"""The photos that a concept is made from: checked before the base is loaded, and prepared one after the other.

Of several photos only the bytes of the files wait in memory: each is decoded again for its preparation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from e4t_cli.errors import InputError, ResourceError, UsageError, printable
from e4t_cli.images.decoding import OpenedImage, decode
from e4t_cli.images.loading import ImageInput, ImageInputs, image_sha256, open_mask, read_image
from e4t_cli.images.preparation import MaskSource, prepare_photo
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.config import TuningConfig
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

NAMED_MASKS = {
    "auto": MaskSource(kind="auto"),
    "none": MaskSource(kind="none"),
    "words": MaskSource(kind="words"),
    "face-ellipse": MaskSource(kind="face-ellipse"),
}


def as_inputs(given: ImageInputs) -> list[ImageInput]:
    """Return one image, or a sequence of them, as a list."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray | memoryview):
        return list(given)
    return [given]  # type: ignore[list-item] # a str is a Sequence, too


def stem(source: ImageInput) -> str:
    """Return the name of a photo's or concept's file without its ending; "" if it has none that is known."""
    return Path(source).stem if isinstance(source, str | os.PathLike) and source != "-" else ""


def resolve_mask(mask: ImageInput, photo: OpenedImage) -> MaskSource:
    """Return where the mask comes from; `mask` is one of `PhotoOptions`.

    Raises:
        UsageError: there is no such file, or no words behind the colon.
        InputError: it cannot be used, or has other proportions than the photo.
    """
    if isinstance(mask, str) and mask in NAMED_MASKS:
        return NAMED_MASKS[mask]
    if isinstance(mask, str) and mask.startswith("words:"):
        words = mask.partition(":")[2].strip()
        if not words:
            raise UsageError("--mask words: needs words", hint='--mask "words:a cat"')
        return MaskSource(kind="words", words=words)
    return MaskSource(kind="image", image=open_mask(mask, photo.image))


@dataclass(frozen=True, kw_only=True, eq=False)
class Photo:
    """One photo that can be decoded, and where its mask comes from.

    Args:
        label: begins every message about it, "" if it is the only one.
        name: of its file, without the ending; "" if it has none.
        source: the decoded photo; the bytes of its file, if there are others.
        mask: what of it is the concept.
        transparent: whether it has transparent pixels.
        size: width and height in pixels.
        sha256: of the bytes.
    """

    label: str
    name: str
    source: bytes | OpenedImage
    mask: MaskSource
    transparent: bool
    size: tuple[int, int]
    sha256: str

    def prepare(self, domain: Domain, target: PreparationTarget, *, masked: bool) -> PreparedImage:
        """Run `prepare_photo`; errors and notes name the photo."""
        with _located(self.label):
            opened = decode(self.source, self.name) if isinstance(self.source, bytes) else self.source
            prepared = prepare_photo(domain, opened, self.mask, target, masked=masked)
        return replace(prepared, name=self.name)

    def report(
        self,
        prepared: PreparedImage,
        on_progress: ProgressCallback | None,
        doubts: Sequence[str] = (),
        *,
        strict: bool,
    ) -> None:
        """Report what is to be known about it; with `strict` raise InputError for what casts doubt on it."""
        notes, before = (*doubts, *prepared.notes), f"{self.label}: " if self.label else ""
        if strict and notes:
            raise InputError(before + "; ".join(notes), hint="--strict refuses this; without it, it is a note")
        if on_progress is not None:
            for note in notes:
                on_progress(Progress(stage="prepare", note=before + note))
            for remark in prepared.remarks:
                on_progress(Progress(stage="prepare", remark=before + remark))


@dataclass(frozen=True, kw_only=True, eq=False)
class PhotoSet:
    """The photos of one subject, without duplicates, at least one."""

    photos: Sequence[Photo]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Photo]:
        return iter(self.photos)

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def name(self) -> str:
        """That of the first photo, for the names of images."""
        return self.photos[0].name

    @property
    def sha256(self) -> tuple[str, ...]:
        """Of the bytes of each photo's file."""
        return tuple(photo.sha256 for photo in self)

    @property
    def sizes(self) -> list[dict[str, int]]:
        """Width and height of each photo, in pixels."""
        return [dict(zip(("width", "height"), photo.size, strict=True)) for photo in self]

    def tuning(self, config: TuningConfig) -> TuningConfig:
        """Return the config with a mask where one is asked for, without where none is for any photo."""
        kinds = {photo.mask.kind for photo in self}
        if kinds == {"none"}:
            return config.replace(mask=False)
        asked = any(one.mask.kind != "none" and (one.mask.kind != "auto" or one.transparent) for one in self)
        return config.replace(mask=True) if asked else config

    def remarks(self, prepared: Sequence[PreparedImage]) -> str:
        """Return what preparation found in the photos, in one line."""
        found = ["; ".join(one.remarks) for one in prepared]
        if len(found) == 1:
            return found[0]
        return "; ".join(f"photo {number}: {text}" for number, text in enumerate(found, start=1) if text)


def open_photos(images: ImageInputs, mask: ImageInputs) -> PhotoSet:
    """Open and check the photos and their masks; a photo that is there twice is used once, with a note.

    Args:
        images: one photo, or several of the same subject.
        mask: a word of `PhotoOptions.mask` for all of them; or one mask for each, in their order.

    Raises:
        UsageError: there is no such file, no photo, or another number of masks than of photos.
        InputError: a photo or a mask cannot be used.
    """
    sources, masks = as_inputs(images), as_inputs(mask)
    if not sources:
        raise UsageError("there is no photo", hint="give one, or several of the same subject")
    if len(masks) == 1 and (len(sources) == 1 or _is_word(masks[0])):
        masks *= len(sources)
    if len(masks) != len(sources):
        counted = f"there are {len(masks)} masks" if len(masks) != 1 else "there is one mask"
        wanted = f"{len(sources)} photos" if len(sources) > 1 else "one photo"
        raise UsageError(f"{counted} for {wanted}", hint="--mask FILE once for each photo, in their order")
    several = len(sources) > 1
    photos: list[Photo] = []
    seen: dict[tuple[str, ...], str] = {}
    notes = []
    for number, (source, one) in enumerate(zip(sources, masks, strict=True), start=1):
        label = _label(number, source) if several else ""
        with _located(label):
            data, shown = read_image(source)
            opened = decode(data, shown)
            found = resolve_mask(one, opened)
        if several:
            pixels = tuple(image_sha256(layer) for layer in (opened.image, opened.alpha) if layer is not None)
            if pixels in seen:
                notes.append(f"{label} is {seen[pixels]} again: it is used once")
                continue
            seen[pixels] = label
        photos.append(
            Photo(
                label=label,
                name=stem(source),
                source=data if several else opened,
                mask=found,
                transparent=opened.alpha is not None,
                size=opened.image.size,
                sha256=opened.sha256,
            )  # fmt: skip
        )
    return PhotoSet(photos=photos, notes=tuple(notes))


def _is_word(mask: ImageInput) -> bool:
    """Whether a mask is asked for by a word, which is for any photo."""
    return isinstance(mask, str) and (mask in NAMED_MASKS or mask.startswith("words:"))


def _label(number: int, source: ImageInput) -> str:
    """Return what messages call one of several photos."""
    if not isinstance(source, str | os.PathLike) or source in ("", "-"):
        return f"photo {number}"
    return f"photo {number} ({printable(Path(source).name)})"


@contextlib.contextmanager
def _located(label: str) -> Iterator[None]:
    """Begin the message of an error about a photo that is raised inside with the photo's label."""
    try:
        yield
    except (UsageError, InputError, ResourceError) as error:
        if not label:
            raise
        raise type(error)(f"{label}: {error.message}", hint=error.hint) from error
