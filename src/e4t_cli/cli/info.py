"""``e4t info``: what a picture or a concept says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json
from e4t_cli.errors import E4TError, InputError, UsageError, printable

File = Annotated[Path, typer.Argument(help="A PNG made here, or a saved concept.")]


def info(file: File, json: Json = False) -> None:
    """Show how a picture was made, or what is in a concept."""
    console = consoles.start(json=json)
    shown = printable(str(file))
    try:
        with file.open("rb") as opened:
            begin = opened.read(8)
    except FileNotFoundError:
        raise UsageError(f"there is no file {shown}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be read: {error}") from None
    told = _picture(file) if begin == b"\x89PNG\r\n\x1a\n" else _concept(file)
    console.details(shown, told)


def _picture(file: Path) -> dict[str, Any]:
    from e4t_cli.metadata import read_metadata

    found = read_metadata(file.read_bytes())
    if found.details is None and found.parameters is None and not found.ai_generated:
        raise InputError("this picture does not say how it was made")
    marked = {"type": "image", "marked as generated": found.ai_generated}
    if found.details is None:
        return {**marked, "parameters": found.parameters}
    return {**marked, **found.details}


def _concept(file: Path) -> dict[str, Any]:
    from e4t_cli.concept import Concept

    try:
        concept = Concept.load(file)
    except E4TError as error:
        hint = "e4t info reads PNG pictures and concepts (me.e4t)"
        raise type(error)(error.message, hint=hint) from error
    width, height = concept.prepared.image.size
    return {
        "type": "concept",
        "domain": concept.domain,
        "package": concept.package,
        "descriptor": concept.descriptor,
        "placeholder": concept.placeholder,
        "base": concept.base_name,
        "base_fingerprint": concept.base_fingerprint,
        "pack": concept.pack_digest,
        "photo_sha256": concept.image_sha256,
        "picture": f"{width}×{height}{', masked' if concept.prepared.mask else ''}",
        "photo": concept.photo,
        "tuning": {**concept.recipe.as_dict(), "seed": concept.seed},
        "weights": "kept" if concept.weights else "made again by tuning",
    }
