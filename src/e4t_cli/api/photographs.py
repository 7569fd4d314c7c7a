"""What to say about a photograph on a base that knows drawings only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from e4t_cli.api.resolve import has_weights
from e4t_cli.hub.bases import ACCELERATED
from e4t_cli.registry.domain import Domain, PreparedImage

if TYPE_CHECKING:
    from e4t_cli.api.session import Session
    from e4t_cli.models.text_to_image import TextToImageModel

SAMPLE = 8  # of the images of a domain
# The base, and with it the image tower or, for faces, domain weights that have their own: 4 GB.
DOWNLOAD, DOWNLOAD_HALF = "about 10 GB", "about 7 GB"


def doubts_about_photo(model: TextToImageModel, domain: Domain, prepared: PreparedImage, *, half: bool) -> list[str]:
    """Return notes about a photo that the base cannot know; `half`: whether float16 would be fetched."""
    from e4t_cli.models.drawings import is_drawing

    if is_drawing(model, prepared.image):
        return []
    command = f'e4t personalize {domain.name} IMAGE "S* …" --base {ACCELERATED}'
    if not has_weights(domain, ACCELERATED):
        command = f"e4t pretrain --domain {domain.name} --data FOLDER --base {ACCELERATED}, once, then personalize"
    needed = f"a photograph needs Stable Diffusion: {command} (downloads {DOWNLOAD_HALF if half else DOWNLOAD})"
    return [f"{model.base.name} knows drawings only, and this image is none of its kind: expect no likeness; {needed}"]


def note_photographs(session: Session, images: Sequence[PreparedImage]) -> None:
    """Report that most of these images are none of the kind that the base knows."""
    from e4t_cli.models.drawings import is_drawing

    name, some = session.model.base.name, images[:SAMPLE]
    if 2 * sum(not is_drawing(session.model, one.image) for one in some) > len(some):
        text = f"{name} knows drawings only, and most of these images are none of its kind"
        session.note("encode", f"{text}: a domain of photographs needs --base {ACCELERATED}")
