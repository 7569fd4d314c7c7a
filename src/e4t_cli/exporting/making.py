"""Where a model is put together before it gets its name: beside it, and gone afterwards."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from e4t_cli.errors import ResourceError, UsageError, printable
from e4t_cli.hub.places import free_bytes, shown_size

SPARE_BYTES = 50_000_000


def check_free(path: Path) -> None:
    """Refuse a name that is taken.

    Raises:
        UsageError: it is.
    """
    if path.exists():
        raise UsageError(
            f"{printable(str(path))} exists already", hint="choose a name that is free"
        )


@contextmanager
def making(path: Path, needed: int) -> Iterator[Path]:
    """Yield an empty folder on the disk of `path`; whatever is left in it goes at the end.

    Args:
        path: what is to be made.
        needed: how many bytes it will have.

    Raises:
        ResourceError: the disk has no room, or something could not be written.
    """
    free = free_bytes(path.parent)
    if needed + SPARE_BYTES > free:
        raise ResourceError(
            f"the model needs {shown_size(needed)}, and {shown_size(free)} are free on the disk of "
            f"{printable(str(path.parent))}",
            hint="make room, or choose a place on another disk",
        )
    place = path.parent / f".{path.name[:48]}.{secrets.token_hex(8)}~"
    try:
        place.mkdir(parents=True)
        yield place
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{printable(str(path))} could not be written: {printable(str(error))}",
            hint="choose a place on another disk",
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
