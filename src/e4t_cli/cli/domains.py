"""``e4t domains``: what can be personalized here, and what is broken and why."""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Any

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli import (
    domains_add,
    domains_check,
    domains_info,
    domains_new,
    domains_push,
    domains_rm,
)
from e4t_cli.cli.domains_info import about_domain, recipe_text, state_text
from e4t_cli.cli.options import Json

if TYPE_CHECKING:
    from e4t_cli.registry import Listing

HEADINGS = ("name", "source", "descriptor", "tuning", "weights", "licence")

app = typer.Typer(help="The domains on this machine: what can be personalized.")


@app.callback(invoke_without_command=True)
def domains(context: typer.Context, json: Json = False) -> None:
    """The domains on this machine: what can be personalized."""
    if context.invoked_subcommand is None:
        list_domains(json=json)


@app.command("list")
def list_domains(json: Json = False) -> None:
    """List every domain, with the reason beside those that cannot be used."""
    from e4t_cli.registry import installed_domains

    console = consoles.start(json=json)
    listings = installed_domains()
    if json:
        rows = [_record(listing) for listing in listings]
        return consoles.write_stdout(json_format.dumps(rows))
    console.table(HEADINGS, [_row(listing) for listing in listings])
    if not listings:
        console.note("no domain is installed; domains/README.md says how to write one")
    return None


app.command("info")(domains_info.domain_info)
app.command("new", epilog=domains_new.EXAMPLES)(domains_new.new)
app.command("add", epilog=domains_add.EXAMPLES)(domains_add.add)
app.command("check", epilog=domains_check.EXAMPLES)(domains_check.check)
app.command("rm")(domains_rm.rm)
app.command("push", epilog=domains_push.EXAMPLES)(domains_push.push)


def _record(listing: Listing) -> dict[str, Any]:
    about = {"name": listing.name, "source": source_text(listing), "reason": listing.reason}
    return {**about, **(about_domain(listing.domain) if listing.domain else {})}


def _row(listing: Listing) -> tuple[str, ...]:
    if listing.domain is None:
        return (listing.name, source_text(listing), f"broken: {listing.reason}", "", "", "")
    record = _record(listing)
    weights = "; ".join(f"{base} {state_text(one)}" for base, one in record["weights"].items())
    blocked = f" ({listing.reason})" if listing.reason else ""
    return (
        listing.name,
        record["source"],
        listing.domain.descriptor,
        recipe_text(listing.domain.tuning),
        weights,
        listing.domain.licence + blocked,
    )


def source_text(listing: Listing) -> str:
    """Return the distribution and its version, or "user"."""
    return f"{listing.package} {listing.version}".strip()
