"""``e4t info``: what a file or folder is, and what it says of itself."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e4t_cli.cli import console as terminal
from e4t_cli.cli.options import Json
from e4t_cli.errors import E4TError, printable

if TYPE_CHECKING:
    from e4t_cli.formats.recognition import Recognized

EXAMPLES = "Example: e4t info outputs/*.png me.e4t ./me-model"

Files = Annotated[list[str], typer.Argument(metavar="FILE", help="Anything that e4t wrote; or a base: mini, sd14, …")]


def info(files: Files, json: Json = False) -> None:
    """Show how a picture was made, and what other files contain.

    What a file says of itself is under "recorded": anybody can write that. The rest is found in its structure.
    """
    console = terminal.start(json=json)
    failures: list[E4TError] = []
    shown = 0
    for given in files:
        try:
            about = _about(given)
        except E4TError as error:
            if len(files) == 1:
                raise
            console.error(error)
            failures.append(error)
            continue
        if shown and not json:
            terminal.write_stdout("")
        shown += 1
        console.details(printable(given), about if json else _rows(about))
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _about(given: str) -> dict[str, Any]:
    """Return the record of one argument: a file, a folder, or the name of a base."""
    from e4t_cli.api.base_details import base_details
    from e4t_cli.formats.recognition import recognize

    if not os.path.exists(given) and (base := base_details(given)) is not None:
        return base
    found: Recognized = recognize(given)
    return {"type": found.type, "path": given, **found.facts, "recorded": dict(found.recorded)}


def _rows(about: dict[str, Any]) -> dict[str, Any]:
    """Return it with a row for each recorded value, which names where it comes from."""
    from e4t_cli.api.base_details import as_text
    from e4t_cli.hub.addons import Addon

    if about["type"] == "base":
        return as_text(about)
    recorded = about.pop("recorded", {})
    with contextlib.suppress(ValueError, TypeError):  # a file can say anything
        recorded["addons"] = [str(Addon.from_dict(one)) for one in recorded.get("addons", ())]
    return {key: value for key, value in about.items() if key != "path"} | {
        f"recorded {key}": value for key, value in recorded.items() if value not in ("", None, [])
    }
