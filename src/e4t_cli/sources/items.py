"""One picture of a source, not opened yet."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from e4t_cli.domain import Domain, PreparationTarget, PreparedImage
from e4t_cli.errors import InputError
from e4t_cli.images import MOST_BYTES, image_sha256, prepare_image
from e4t_cli.photos import Picture, open_picture


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """A name for messages, and the way to a picture.

    Args:
        name: unique in its source; for a file its path below the source's folder.
        picture: a path, bytes, a PIL image, or a picture that is prepared already.
        fault: why there is none, if that is known already.
    """

    name: str
    picture: Picture | PreparedImage
    fault: str = ""

    def digest(self) -> bytes:
        """Return a hash of the content, whatever its name: 32 bytes.

        Raises:
            InputError: it cannot be read.
        """
        picture = self.picture
        if self.fault:
            raise InputError(self.fault)
        if isinstance(picture, PreparedImage):
            parts = [image_sha256(one) for one in (picture.image, picture.mask) if one is not None]
            return hashlib.sha256(" ".join(parts).encode()).digest()
        try:
            if isinstance(picture, Image.Image):
                turned = picture.getexif().tobytes()
                return hashlib.sha256(image_sha256(picture).encode() + turned).digest()
            if isinstance(picture, bytes):
                return hashlib.sha256(picture).digest()
            if isinstance(picture, str | os.PathLike):
                return _file_digest(Path(picture))
            picture.seek(0)
            found = hashlib.sha256(picture.read(MOST_BYTES + 1)).digest()
            picture.seek(0)
            return found
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"it cannot be read: {error.strerror or error}") from error
        except Exception as error:  # a lazily opened PIL image decodes here, hostile bytes and all
            raise InputError(f"it is damaged: {error}") from error

    def stamp(self) -> str | None:
        """Return what changes whenever a file is changed, without reading it; None if unknown."""
        if not isinstance(self.picture, str | os.PathLike):
            return None
        path = os.path.abspath(self.picture)
        try:
            about = os.stat(path)
        except OSError:
            return None
        return f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}"

    def prepare(self, domain: Domain, target: PreparationTarget) -> PreparedImage:
        """Open the picture as `personalize` opens a photo, and run the domain's preparation.

        Raises:
            InputError, UsageError: it cannot be used as a picture.
            E4TError: the domain's function failed.
        """
        if self.fault:
            raise InputError(self.fault)
        if isinstance(self.picture, PreparedImage):
            return self.picture
        return prepare_image(domain, open_picture(self.picture).image, target)


def _file_digest(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a FIFO that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise InputError("it is not a plain file")
        if about.st_size > MOST_BYTES:
            raise InputError(f"it is larger than {MOST_BYTES >> 20} MiB")
        return hashlib.file_digest(file, "sha256").digest()
