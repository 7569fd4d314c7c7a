"""``e4t domains add``: put a domain that somebody made among one's own."""

from __future__ import annotations

from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json, Offline, Quiet

EXAMPLES = """
Examples: [bold]e4t domains add ./my_dogs[/bold] · [bold]e4t domains add my_dogs.zip[/bold] ·
[bold]e4t domains add someone/e4t-dogs@COMMIT[/bold]
"""

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A folder, a zip, or owner/repository@revision."),
]


def add(source: Source, offline: Offline = False, json: Json = False, quiet: Quiet = False) -> None:
    """Add a domain from a folder, a zip or the hub; nothing appears unless all of it is sound."""
    from e4t_cli.shelf import add_domain  # pydantic: --help does not wait for it

    console = consoles.start(json=json, quiet=quiet)
    with console.progress() as on_progress:
        added = add_domain(source, offline=offline, on_progress=on_progress)
    name, path = added.domain.name, str(added.folder)
    console.product(
        path,
        {"type": "domain", "name": name, "base": added.card.base, "path": path,
         "licence": added.card.licence},
    )  # fmt: skip
    console.note(f"licence: {added.card.licence or 'none stated'}")
    console.note(f'try it: e4t personalize {name} PHOTO "S* on the beach" --base {added.card.base}')
