"""``e4t domains push``: publish the weights of a domain on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import DomainName, Json, Quiet, Yes
from e4t_cli.errors import UsageError

EXAMPLES = """
Example: [bold]e4t domains push my_dogs me/e4t-my-dogs --licence CC0-1.0[/bold]
"""

Repository = Annotated[
    str, typer.Argument(metavar="OWNER/REPO", help="The repository; made if there is none.")
]
Which = Annotated[
    str,
    typer.Option("--base", metavar="NAME", show_default=False, help="Which pack, of several."),
]
Licence = Annotated[
    str, typer.Option("--licence", "--license", metavar="NAME", show_default=False,
                      help="Of weights and pictures; default: what the card says.")
]  # fmt: skip
Public = Annotated[bool, typer.Option("--public", help="For everybody; otherwise it is private.")]


def push(
    name: DomainName,
    repository: Repository,
    base: Which = "",
    licence: Licence = "",
    public: Public = False,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a domain's weights and a page about them, into a private repository of yours.

    Weights can give away the pictures they were made from: publish only what you may.
    """
    from e4t_cli.registry import find_domain
    from e4t_cli.shelf import publish_domain  # pydantic: --help does not wait for it

    console = consoles.start(json=json, quiet=quiet)
    domain = find_domain(name)
    seen = "for everybody to see" if public else "privately"
    if not yes and not console.ask(f"upload the weights of {domain.name} to {repository}, {seen}?"):
        raise UsageError("nothing was uploaded", hint="-y uploads without asking")
    with console.progress() as on_progress:
        done = publish_domain(
            domain,
            repository,
            base=base,
            licence=licence,
            private=not public,
            on_progress=on_progress,
        )
    console.product(
        done.location,
        {"type": "repository", "name": domain.name, "base": done.card.base,
         "location": done.location, "private": done.private, "bytes": done.size},
    )  # fmt: skip
    console.note(f"others: e4t domains add {done.location}")
