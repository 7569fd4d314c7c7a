"""The pictures in examples/: held-out identities, enlarged so that they can be looked at."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mini_world.evaluate import held_out_photos

# Name of the file, kind, and the number of the held-out photo of seed 123.
EXAMPLES = (
    ("me", "face", 2), ("zoe", "face", 10), ("max", "face", 15), ("tiger", "cat", 2), ("felix", "cat", 14),
    ("mosaic", "art", 2), ("dots", "art", 6),
)  # fmt: skip


def write_examples(folder: Path = Path("examples")) -> None:
    """Draw them again; the same pictures every time."""
    folder.mkdir(exist_ok=True)
    for name, kind, number in EXAMPLES:
        photo = held_out_photos(kind, number + 1, seed=123)[number]
        photo.image.resize((256, 256), Image.Resampling.NEAREST).save(folder / f"{name}.png", optimize=True)
