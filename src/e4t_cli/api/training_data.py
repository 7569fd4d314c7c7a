"""From a source of pictures to training data: looked at once and kept, or when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e4t_cli.errors import ResourceError, UsageError, printable
from e4t_cli.hub.places import free_bytes, own_cache, shown_size
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.sources import Generated, Listed, Preparation, Source, Streamed

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel
    from e4t_cli.pretraining import Processes, TrainingData

CACHES = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class CacheChoice:
    """Whether encoded pictures are kept on the disk.

    Args:
        used: whether they are.
        pictures: how many there are, 0 if nobody knows.
        size: what they take, in bytes.
        why: a sentence for the user where the answer may surprise, "" otherwise.
    """

    used: bool
    pictures: int
    size: int
    why: str = ""


def check_cache(wanted: str) -> None:
    """Make sure that a choice is one of the three.

    Raises:
        UsageError: it is not.
    """
    if wanted not in CACHES:
        raise UsageError(
            f"there is no cache {printable(wanted)!r}", hint=f"one of {', '.join(CACHES)}"
        )


def how_many(source: Source) -> int:
    """Return the number of a source's pictures, 0 if nobody knows."""
    if isinstance(source, Listed):
        return len(source)
    return source.about if isinstance(source, Streamed) else 0


def choose_cache(
    wanted: str, source: Source, model: TextToImageModel, samples: int, *, mask: bool
) -> CacheChoice:
    """Decide whether looking once pays: it does from the second pass over the pictures on.

    Args:
        wanted: "auto", "on" or "off".
        samples: pictures that the run will train on, counted as often as they come.
        mask: whether masks are kept too.

    Raises:
        UsageError: pictures that can be read once only, and no cache.
        ResourceError: it was asked for, and the disk is too small.
    """
    from e4t_cli.pretraining.looking import bytes_per_picture

    pictures = how_many(source)
    size = pictures * bytes_per_picture(model, mask=mask)
    once = isinstance(source, Generated)
    if wanted == "off" and once:
        raise UsageError(
            "an iterable can be read once, so its pictures have to be kept",
            hint="hand in a list, or let the cache be on",
        )
    if wanted == "off" or (wanted == "auto" and not once and not 0 < pictures < samples):
        return CacheChoice(used=False, pictures=pictures, size=size)
    free = free_bytes(own_cache())
    if size > 0.9 * free:
        needed = f"the encoded pictures need {shown_size(size)}, and {shown_size(free)} are free"
        if wanted == "on":
            raise ResourceError(
                needed, hint="E4T_CACHE_DIR moves the cache, --cache off trains without it"
            )
        return CacheChoice(
            used=False, pictures=pictures, size=size, why=f"{needed}: they are not kept"
        )
    return CacheChoice(used=True, pictures=pictures, size=size)


@contextlib.contextmanager
def training_data(
    model: TextToImageModel,
    source: Source,
    preparation: Preparation,
    choice: CacheChoice,
    *,
    processes: Processes,
    on_progress: ProgressCallback,
) -> Iterator[TrainingData]:
    """Hand out a run's pictures in the form that training reads.

    Raises:
        InputError: no picture can be used, or one cannot and the preparation is strict.
    """
    from e4t_cli.pretraining.cache import EncodingCache
    from e4t_cli.pretraining.live import LiveImages, LiveStream

    for note in (*source.notes, *([choice.why] if choice.why else [])):
        on_progress(Progress(stage="encode", note=note))
    if choice.used:
        yield EncodingCache(model, preparation).encode(
            source, total=choice.pictures, processes=processes, on_progress=on_progress
        )
        return
    for note in preparation.notes(choice.pictures or None):
        on_progress(Progress(stage="encode", note=note))
    if isinstance(source, Listed):
        live: LiveImages | LiveStream = LiveImages(model, source, preparation)
    else:
        assert isinstance(source, Streamed)
        live = LiveStream(model, source, preparation, processes)
    try:
        yield live
    finally:
        live.close()
        for note in preparation.notes(None):
            on_progress(Progress(stage="encode", note=note))
