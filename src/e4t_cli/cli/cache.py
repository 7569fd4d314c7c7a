"""``e4t cache``: what lies on the disk because of this program, and how to be rid of it."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import Json, Quiet, Yes
from e4t_cli.errors import IntegrityError, UsageError
from e4t_cli.hub.places import hub_cache, own_cache, shown_size

app = typer.Typer(help="What lies on this disk because of e4t.", no_args_is_help=True)

Names = Annotated[
    list[str], typer.Argument(metavar="NAME...", help="As `e4t cache ls` shows them.")
]


@app.callback()
def cache() -> None:
    """What lies on this disk because of e4t."""


@app.command("dir")
def show_folders(json: Json = False) -> None:
    """Say where fetched files lie, and where what was derived from them."""
    console = consoles.start(json=json)
    folders = {"hub": str(hub_cache()), "own": str(own_cache())}
    if json:
        return console.details("cache", folders)
    for folder in folders.values():
        consoles.write_stdout(folder)
    return None


@app.command("ls")
def list_items(json: Json = False) -> None:
    """List what was fetched and derived, with its size."""
    console = consoles.start(json=json)
    from e4t_cli.hub.housekeeping import items

    found = items()
    if json:
        return consoles.write_stdout(json_format.dumps([item.as_dict() for item in found]))
    rows = [(item.name, item.kind, shown_size(item.size), str(item.path)) for item in found]
    if rows:
        console.table(("name", "kind", "size", "path"), rows)
    total = sum(item.size for item in found)
    return console.note(f"{len(found)} in all, {shown_size(total)}" if found else "nothing yet")


@app.command("verify")
def verify(json: Json = False, quiet: Quiet = False) -> None:
    """Read every fetched file again, and compare it with the checksum that the hub declared."""
    console = consoles.start(json=json, quiet=quiet)
    from e4t_cli.hub import housekeeping

    with console.progress() as on_progress:
        count, damaged = housekeeping.verify(on_progress)
    for one in damaged:
        line = f"{one.repository}/{one.file}: expected {one.expected}, got {one.got}"
        record = {"type": "damaged", "repository": one.repository, "file": one.file}
        console.product(line, {**record, "expected": one.expected, "got": one.got})
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {count} files are damaged",
            hint=f"e4t fetch {damaged[0].repository} brings it again",
        )
    console.note(f"{count} files are as they were fetched")


@app.command("prune")
def prune(yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove what can go without a loss: partial downloads, and what a slim copy has replaced."""
    console = consoles.start(json=json, quiet=quiet)
    from e4t_cli.hub import clearing

    found = clearing.prunable()
    if found:
        size = shown_size(sum(item.size for item in found))
        _make_sure(console, yes, f"remove {len(found)} files, {size}, that nothing needs?")
    for item in clearing.prune(found):
        console.product(str(item.path), {"type": "removed", **item.as_dict()})
    if not found:
        console.note("there is nothing to remove")


@app.command("rm")
def remove(names: Names, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove fetched repositories, also for other programs that share the hub's cache."""
    console = consoles.start(json=json, quiet=quiet)
    from e4t_cli.hub import clearing

    found = [item for name in names for item in clearing.find_items(name)]
    size = shown_size(sum(item.size for item in found))
    what = ", ".join(dict.fromkeys(item.name for item in found))
    _make_sure(console, yes, f"remove {what}, {size}?")
    for item in found:
        clearing.remove(item)
        console.product(str(item.path), {"type": "removed", **item.as_dict()})


def _make_sure(console: consoles.Console, yes: bool, question: str) -> None:
    if not yes and not console.ask(question):
        raise UsageError("nothing was removed", hint="-y removes without asking")
