"""For authors of domains: `check_domain(dog)` in a test says whether the contract is kept."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .domain import Domain, PreparationTarget
from .errors import E4TError
from .images import image_sha256, prepare_image
from .prompts import training_prompts, training_templates

SIZES = ((64, 64), (200, 100), (96, 300), (64, 512))
"""Width and height of the pictures that a preparation is tried on."""


def check_domain(domain: Domain) -> None:
    """Check a domain as the program will use it.

    The value itself was validated when it was made. Here its preparation is run on drawn pictures
    of several shapes, for each of its bases and for one it does not know, and its training
    sentences are parsed.

    Raises:
        AssertionError: one sentence about what is wrong.
    """
    if not isinstance(domain, Domain):
        raise AssertionError(f"it is of type {type(domain).__name__}, not Domain")
    for prompt in training_prompts(training_templates(domain)):
        if prompt.placeholders != 1:
            raise AssertionError(f"the sentence {prompt.text!r} names the concept more than once")
    for base in (*domain.weights, "some-other-base"):
        for size in SIZES:
            _check_preparation(domain, _drawing(size), base)


def _check_preparation(domain: Domain, picture: Image.Image, base: str) -> None:
    before = image_sha256(picture)
    target = PreparationTarget(size=64, base=base)
    about = f"for a picture of {picture.width}×{picture.height} and the base {base!r}"
    try:
        first = prepare_image(domain, picture, target)
        again = prepare_image(domain, picture, target)
        bare = prepare_image(domain, picture, PreparationTarget(size=64, base=base, mask=None))
    except E4TError as error:
        raise AssertionError(f"{error} ({about})") from error
    if image_sha256(picture) != before:
        raise AssertionError(f"prepare changed the picture it was given ({about})")
    if image_sha256(first.image) != image_sha256(again.image):
        raise AssertionError(f"prepare gave two results for one picture ({about})")
    if image_sha256(first.image) != image_sha256(bare.image):
        raise AssertionError(f"prepare crops differently when no mask is asked for ({about})")


def _drawing(size: tuple[int, int]) -> Image.Image:
    """Draw something with a middle and corners that differ."""
    width, height = size
    picture = Image.new("RGB", size, (150, 190, 220))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=(230, 180, 150))
    draw.rectangle((0, 0, width // 8, height // 8), fill=(60, 40, 30))
    return picture
