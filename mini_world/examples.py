"""Writes the images in examples/: held-out identities, enlarged."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mini_world.evaluate import held_out_photos
from mini_world.world import sample

# Name of the file, kind, and the number of the held-out photo of seed 123.
EXAMPLES = (
    ("me", "face", 2), ("zoe", "face", 10), ("max", "face", 15), ("tiger", "cat", 2), ("felix", "cat", 14),
    ("mosaic", "art", 2), ("dots", "art", 6), ("rex", "dog", 3),
)  # fmt: skip

DOGS = 200
"""Number of drawings in examples/dogs, of dogs that are not held out, for `e4t pretrain`."""


def write_examples(folder: Path = Path("examples")) -> None:
    """Write all example images; the result is the same every time."""
    folder.mkdir(exist_ok=True)
    for name, kind, number in EXAMPLES:
        photo = held_out_photos(kind, number + 1, seed=123)[number]
        photo.image.resize((256, 256), Image.Resampling.NEAREST).save(folder / f"{name}.png", optimize=True)
    dogs = folder / "dogs"
    dogs.mkdir(exist_ok=True)
    for number in range(DOGS):
        # Drawings 2k and 2k + 1 show the same dog: use one of them.
        drawing = sample(2 * number, seed=77, kind="dog", portrait=True)
        drawing.image.save(dogs / f"dog-{number:03d}.png", optimize=True)
