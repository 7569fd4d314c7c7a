"""Generated pictures, each with its story: prompt, seed, and everything it depends on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from e4t_cli.metadata import GenerationRecord, png_bytes
from e4t_cli.prompts import slug

from .new_files import write_new
from .sheets import contact_sheet

if TYPE_CHECKING:
    from e4t_cli.concept import Concept


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of each part of the work; `tune` is what the paper's Table 2 counts."""

    imports: float = 0.0
    load: float = 0.0
    prepare: float = 0.0
    tune: float = 0.0
    generate: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """Return plain numbers, in the order of the work."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One picture and its story.

    Args:
        image: PIL, mode RGB.
        prompt: as it was given.
        seed: this picture's own; the same seed gives the same picture, alone or among others.
        record: everything it depends on.
    """

    image: Image.Image
    prompt: str
    seed: int
    record: GenerationRecord

    def save(
        self,
        folder: str | os.PathLike[str] = "outputs",
        *,
        name: str | None = None,
        include_prompts: bool = True,
    ) -> Path:
        """Write `<name>-<prompt>-<seed>.png`, with a number behind it if that name is taken.

        Args:
            folder: made if it is not there.
            name: the beginning of the file's name; the domain's by default.
            include_prompts: False leaves prompts out of the file; the AI mark is always in it.

        Returns:
            The path written. No existing file is ever touched, whoever else writes there.

        Raises:
            UsageError: the folder cannot be one, or may not be written to.
            ResourceError: the disk is full.
        """
        begin = slug(name or self.record.domain, limit=40)
        data = png_bytes(self.image, self.record, include_prompts=include_prompts)
        return write_new(folder, f"{begin}-{slug(self.prompt)}-{self.seed}", data)


@dataclass(frozen=True, kw_only=True)
class Personalization:
    """What `personalize` and `generate` return.

    Args:
        concept: to keep (`concept.save("me.e4t")`) and to draw from again.
        images: in the order of the prompts, those of one prompt together.
        seed: the first picture's; a random one if none was asked for.
        timings: where the time went.
        notes: sentences for the user, such as "no face was found".
        withheld: the records of pictures that the base's safety checker kept back.
    """

    concept: Concept
    images: list[GeneratedImage]
    seed: int
    timings: Timings
    notes: tuple[str, ...] = field(default=())
    withheld: tuple[GenerationRecord, ...] = field(default=())

    def save(self, folder: str | os.PathLike[str] = "outputs", **options: Any) -> list[Path]:
        """Save every picture; see `GeneratedImage.save`."""
        return [image.save(folder, **options) for image in self.images]

    def save_grid(
        self,
        folder: str | os.PathLike[str] = "outputs",
        *,
        name: str | None = None,
        include_prompts: bool = True,
    ) -> Path:
        """Write `<name>-grid.png`: the photo first, then every picture under its prompt."""
        photo = self.concept.prepared.image
        captions = [image.prompt for image in self.images]
        if len(set(captions)) < len(captions):
            captions = [f"{image.prompt} (seed {image.seed})" for image in self.images]
        pictures = [photo, *(image.image for image in self.images)]
        sheet = contact_sheet(pictures, ["the photo", *captions])
        records = [image.record for image in self.images]
        data = png_bytes(sheet, records, include_prompts=include_prompts)
        return write_new(folder, f"{slug(name or self.concept.domain, limit=40)}-grid", data)
