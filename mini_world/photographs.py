"""`python -m mini_world.photographs`: what tells photographs from drawings, measured on the shipped base.

The photographs are scikit-image's. The drawings are held-out ones and the examples, also as users change them. The limits in
base.toml follow from the table; `tests/mini_world/test_photographs.py` holds them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from e4t_cli.hub.bases import find_base
from e4t_cli.images.framing import Frame
from e4t_cli.images.loading import prepare_image
from e4t_cli.models.drawings import drawing_scores
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.registry.discovery import find_domain
from e4t_cli.registry.domain import PreparationTarget
from mini_world.evaluate import held_out_photos
from mini_world.examples import EXAMPLES
from mini_world.world import sample

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "motorcycle_left", "ihc", "coins", "hubble_deep_field", "camera", "rocket")
DRAWN = (("face", 20), ("cat", 15), ("art", 10), ("dog", 5))
MEASURED = ("as it is", "JPEG, quality 75", "512 pixels", "cropped by a fifth", "white border", "rotated by 5°")


def photograph(name: str) -> Image.Image:
    """A photograph that comes with scikit-image."""
    import skimage.data

    return Image.open(next(Path(skimage.data.__file__).parent.glob(f"{name}.*"))).convert("RGB")


def drawings(examples: Path = Path("examples")) -> Iterator[tuple[str, Image.Image]]:
    """Held-out portraits, scenes, and the examples, each with the domain it is for."""
    for kind, count in DRAWN:
        for drawn in held_out_photos(kind, count, seed=9):
            yield kind, drawn.image
    for number in range(20):
        drawn = sample(number, seed=31, held_out=True)
        yield drawn.who.kind if drawn.who else "thing", drawn.image
    for name, kind, _ in EXAMPLES:
        yield kind, Image.open(examples / f"{name}.png").convert("RGB")


def changed(image: Image.Image, how: str) -> Image.Image:
    """A drawing as a user may have saved it: one of `MEASURED`."""
    if how == "JPEG, quality 75":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
        return Image.open(buffer).convert("RGB")
    if how == "as it is":
        return image
    large = image.resize((512, 512), Image.Resampling.BICUBIC)
    if how == "cropped by a fifth":
        return large.crop((51, 51, 461, 461))
    if how == "white border":
        return ImageOps.expand(large, 40, "white")
    if how == "rotated by 5°":
        return large.rotate(5, Image.Resampling.BICUBIC, fillcolor="white")
    return large


def scores(model: TextToImageModel, image: Image.Image, domain: str) -> tuple[float, float]:
    """The two scores of an image as it is prepared for a domain."""
    if domain in ("face", "cat", "art"):
        target = PreparationTarget(size=model.resolution, base=model.base.name)
        return drawing_scores(model, prepare_image(find_domain(domain), image, target).image)
    return drawing_scores(model, Frame.centered(image.size).apply(image, model.resolution))


def main() -> None:
    """Print the table."""
    model = TextToImageModel.load(find_base("mini"))
    limits = model.base.drawing_limits
    assert limits is not None
    print(f"limits: loss {limits[0]}, error {limits[1]}; a photograph is above both\n")
    for name in PHOTOGRAPHS:
        loss, error = scores(model, photograph(name), "face")
        alarm = "alarm" if loss > limits[0] and error > limits[1] else ""
        print(f"{name:45}  loss {loss:.3f}  error {error:.4f}  {alarm}")
    some = list(drawings())
    for how in MEASURED:
        for styles in (False, True):
            found = [scores(model, changed(image, how), kind) for kind, image in some if (kind == "art") == styles]
            alarms = sum(loss > limits[0] and error > limits[1] for loss, error in found)
            highest = f"loss to {max(loss for loss, _ in found):.3f}  error to {max(error for _, error in found):.4f}"
            label = f"{'styles' if styles else 'faces, cats, dogs, things'}, {how}"
            print(f"{label:45}  {highest}  alarms {alarms} of {len(found)}")


if __name__ == "__main__":
    main()
