"""The pictures in docs/: `python -m mini_world sheets` makes them with the public API."""

from __future__ import annotations

from pathlib import Path

from e4t_cli import personalize

SCENES = (
    "S* as an astronaut", "S* on the beach", "S* in the snow", "S* in the forest",
    "S* wearing a crown", "S* wearing a red hat", "a pencil sketch of S*", "an oil painting of S*",
)  # fmt: skip
SUBJECTS = (
    "a tree in the style of S*", "a house in the style of S*", "a boat in the style of S*", "a mountain in the style of S*",
    "a flower in the style of S*", "a house in the style of S* in the forest", "a boat in the style of S* on the beach",
    "a tree in the style of S* in the snow",
)  # fmt: skip
SHEETS = (
    ("face", "me", SCENES), ("face", "zoe", SCENES), ("face", "max", SCENES), ("cat", "tiger", SCENES),
    ("cat", "felix", SCENES), ("art", "mosaic", SUBJECTS), ("art", "dots", SUBJECTS),
)  # fmt: skip


def write_sheets(folder: Path = Path("docs/sheets")) -> None:
    """One contact sheet an example: the photo, then eight scenes."""
    from e4t_cli.results import contact_sheet

    folder.mkdir(parents=True, exist_ok=True)
    for domain, name, prompts in SHEETS:
        result = personalize(domain, f"examples/{name}.png", prompts, seed=1, base="mini")
        pictures = [result.concept.prepared.image, *(one.image for one in result.images)]
        sheet = contact_sheet(pictures, ["the photo", *prompts])
        sheet.quantize(256).save(folder / f"{name}.png", optimize=True)
