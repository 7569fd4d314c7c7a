"""Writes the images in docs/ with the public API: `python -m mini_world sheets`."""

from __future__ import annotations

from pathlib import Path

from e4t_cli.api.personalization import generate, personalize
from e4t_cli.schedulers import SamplingConfig

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
CONCEPT_SCALES = (0, 0.3, 0.5, 0.7, 0.85, 1, 1.2, 1.5)


def write_sheets(folder: Path = Path("docs/sheets")) -> None:
    """One contact sheet per example: the photo, then eight scenes; and one scene at eight concept scales."""
    from e4t_cli.images.results import contact_sheet

    folder.mkdir(parents=True, exist_ok=True)
    write_concept_scales(folder)
    for domain, name, prompts in SHEETS:
        result = personalize(domain, f"examples/{name}.png", prompts, seed=1, base="mini")
        images = [result.concept.prepared.image, *(one.image for one in result.images)]
        sheet = contact_sheet(images, ["the photo", *prompts])
        sheet.quantize(256).save(folder / f"{name}.png", optimize=True)


def write_concept_scales(folder: Path) -> None:
    """One scene of one photo at several concept scales."""
    from e4t_cli.images.results import contact_sheet

    prompt = "S* wearing a crown in the forest"
    concept = personalize("face", "examples/me.png", prompt, seed=3, base="mini", keep_weights=True).concept
    images = [concept.prepared.image]
    for concept_scale in CONCEPT_SCALES:
        drawn = generate(concept, prompt, seed=3, base="mini", sampling=SamplingConfig(concept_scale=concept_scale))
        images.append(drawn.images[0].image)
    sheet = contact_sheet(images, ["the photo", *(f"--concept-scale {concept_scale:g}" for concept_scale in CONCEPT_SCALES)])
    sheet.quantize(256).save(folder / "concept-scale.png", optimize=True)
