"""``e4t domains new``: begin a package with a domain in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json, Quiet

EXAMPLES = """
Example: [bold]e4t domains new my_dogs --descriptor dog[/bold], then
[bold]pip install -e ./e4t-domain-my-dogs[/bold]
"""

NewName = Annotated[str, typer.Argument(metavar="NAME", help="Its name: a-z, 0-9, - and _.")]
Directory = Annotated[
    Path | None,
    typer.Argument(metavar="DIR", help="A new or empty folder; by default ./e4t-domain-NAME."),
]
Descriptor = Annotated[
    str, typer.Option(metavar="WORD", help="The everyday word for such things.", show_default=False)
]
Licence = Annotated[
    str, typer.Option("--licence", "--license", metavar="NAME", show_default=False,
                      help="Of the weights and the pictures they are made from.")
]  # fmt: skip
Pack = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Weights that `e4t pretrain` made, to travel in the package."),
]


def new(
    name: NewName,
    directory: Directory = None,
    descriptor: Descriptor = "",
    licence: Licence = "",
    pack: Pack = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a plug-in package with one domain, whose own tests pass once it is installed."""
    from e4t_cli.shelf import new_domain  # pydantic: --help does not wait for it

    console = consoles.start(json=json, quiet=quiet)
    folder = new_domain(name, directory, descriptor=descriptor, licence=licence, pack=pack)
    console.product(str(folder), {"type": "package", "name": name, "path": str(folder)})
    console.note(f"install it: pip install -e {folder}")
