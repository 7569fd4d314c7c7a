"""``e4t domains rm``: remove one of one's own domains."""

from __future__ import annotations

from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json, Quiet, Yes
from e4t_cli.errors import UsageError


def complete_own(incomplete: str) -> list[str]:
    """Names of the user's own domains, for the shell's completion."""
    from e4t_cli.registry import own_names

    return [name for name in own_names() if name.startswith(incomplete)]


OwnName = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=complete_own, help="A domain of your own.")
]


def rm(name: OwnName, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove a domain of your own; what a package brought, its package manager removes."""
    from e4t_cli.shelf import find_own_folder, remove_domain

    console = consoles.start(json=json, quiet=quiet)
    folder = find_own_folder(name)
    if not yes and not console.ask(f"remove {folder} with its weights?"):
        raise UsageError("nothing was removed", hint="-y removes without asking")
    path = str(remove_domain(name))
    console.product(path, {"type": "removed", "name": folder.name, "path": path})
