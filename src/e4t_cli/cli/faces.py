"""``e4t faces``: the faces in a photo, with the numbers that `--face` takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import options
from e4t_cli.cli.prompt_files import STDIN
from e4t_cli.errors import UsageError, printable

EXAMPLES = """
Examples:\n
e4t faces party.jpg\n
e4t faces party.jpg --json -o party-faces.png
"""
PHOTOGRAPHS = "sd14"  # any base for photographs has their detector
MAX_HEIGHT = 1600  # pixels of the picture

Photo = Annotated[str, typer.Argument(metavar="PHOTO", help="A file, or -.")]
Out = Annotated[
    Path,
    options.output_option("-o", "--out", metavar="DIR|FILE.png", help="Folder for the picture, or its file."),
]
Base = Annotated[
    str,
    options.images_option(
        autocompletion=options.complete_base, help="What the faces are for; mini finds those of drawings."
    ),
]


@options.grouped
def faces(
    photo: Photo, terminal: options.TerminalFlags, out: Out = Path("outputs"), base: Base = PHOTOGRAPHS,
    device: options.Device = "auto", offline: options.Offline = False, accept_license: options.AcceptLicence = False,
    force: options.Force = False,
) -> None:  # fmt: skip
    """Show the faces in a photo, numbered from left to right as `--face` takes them.

    Writes the photo with boxes, points and, for the largest face, the square that would be cropped. Its path goes to
    stdout; with --json also one object for each face, in pixels of the photo. Without a face the command ends with
    code 3.
    """
    console = terminal.start()
    from e4t_cli.api.personalization import prepare
    from e4t_cli.cli.outputs import UserFile, is_own_picture
    from e4t_cli.images.annotation import annotate
    from e4t_cli.images.loading import open_image, read_bytes
    from e4t_cli.images.png_metadata import png_bytes
    from e4t_cli.images.results import check_folder, write_new
    from e4t_cli.prompts import slug

    file = UserFile(out, force, is_own_picture) if out.suffix and not os.path.isdir(out) else None
    if file is not None and out.suffix.lower() != ".png":
        raise UsageError(f"{printable(str(out))} is not the name of a PNG file", hint="such as faces.png")
    file.check(create=True) if file is not None else check_folder(out)
    source = read_bytes(photo) if photo == STDIN else photo
    picture = open_image(source).image
    with console.progress() as on_progress:
        prepared = prepare(
            "face", source, mask="none", require_face=True, base=base, device=device, offline=offline,
            accept_license=console.consent(accept_license), on_progress=on_progress,
        )  # fmt: skip
    for number, one in enumerate(prepared.found if console.json else (), start=1):
        place = {"box": _rounded(one.box), "points": [_rounded(point) for point in one.points]}
        about = {"score": round(one.score, 3), "chosen": one.chosen}
        console.product("", {"type": "face", "number": number, **place, **about})
    drawn = annotate(picture, prepared.found, prepared.frame, height=min(picture.height, MAX_HEIGHT))
    data, stem = png_bytes(drawn, None), slug("photo" if photo == STDIN else Path(photo).stem, limit=40)
    path = write_new(out, f"{stem}-faces", data) if file is None else file.write_bytes(data)
    console.product(str(path), {"type": "picture", "path": str(path), "faces": len(prepared.found)})


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in values]
