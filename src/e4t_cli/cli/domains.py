"""``e4t domains``: what can be personalized here, and what is broken and why."""

from __future__ import annotations

import json as json_format
from typing import Any

import typer

from e4t_cli.bases import installed_bases
from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import DomainName, Json
from e4t_cli.domain import Domain, TuningRecipe
from e4t_cli.errors import E4TError, WeightsUnavailable
from e4t_cli.registry import (
    Listing,
    find_domain,
    installed_domains,
    user_domain,
    weights_folder,
)

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
    console = consoles.start(json=json)
    listings = installed_domains()
    if json:
        rows = [_record(listing) for listing in listings]
        return consoles.write_stdout(json_format.dumps(rows))
    console.table(HEADINGS, [_row(listing) for listing in listings])
    if not listings:
        console.note("no domain is installed; domains/README.md says how to write one")
    return None


@app.command("info")
def domain_info(name: DomainName, json: Json = False) -> None:
    """Show everything about one domain, with the recipe of each of its packs."""
    console = consoles.start(json=json)
    domain = find_domain(name)
    about = _details(domain)
    if not json:
        weights = about.pop("weights")
        about |= {f"weights for {base}": _state_of(found) for base, found in weights.items()}
    console.details(domain.name, about)


def _record(listing: Listing) -> dict[str, Any]:
    source = f"{listing.package} {listing.version}".strip()
    about = {"name": listing.name, "source": source, "reason": listing.reason}
    return {**about, **(_details(listing.domain) if listing.domain else {})}


def _row(listing: Listing) -> tuple[str, ...]:
    record = _record(listing)
    if listing.domain is None:
        return (listing.name, record["source"], "broken: " + str(listing.reason), "", "", "")
    weights = "; ".join(f"{base} {found['state']}" for base, found in record["weights"].items())
    blocked = f" ({listing.reason})" if listing.reason else ""
    tuning = _recipe(listing.domain.tuning)
    licence = listing.domain.licence
    descriptor = listing.domain.descriptor
    return (listing.name, record["source"], descriptor, tuning, weights, licence + blocked)


def _details(domain: Domain) -> dict[str, Any]:
    bases = [base.name for base in installed_bases()]
    return {
        "name": domain.name,
        "summary": domain.summary,
        "descriptor": domain.descriptor,
        "tuning": _recipe(domain.tuning),
        "licence": domain.licence,
        "weights": {
            base: _weights(domain, base) for base in dict.fromkeys([*bases, *domain.weights])
        },
    }


def _weights(domain: Domain, base: str) -> dict[str, Any]:
    """Whether a pack is on this machine; nothing of it but its card is read."""
    location = domain.weights.get(base)
    try:
        folder = weights_folder(domain, base)
        return {"state": "ready", "tuning": _recipe(user_domain(folder).tuning)}
    except WeightsUnavailable as error:
        state = "none published" if location is None else "not on this machine"
        return {"state": state, "reason": error.message, "hint": error.hint}
    except E4TError as error:
        return {"state": "broken", "reason": error.message}


def _state_of(found: dict[str, Any]) -> str:
    more = found.get("tuning") or found.get("hint") or found.get("reason")
    return f"{found['state']}: {more}" if more else found["state"]


def _recipe(recipe: TuningRecipe) -> str:
    mask = ", masked" if recipe.mask else ""
    return (
        f"{recipe.steps} steps, rate {recipe.learning_rate:.3g}, "
        f"penalty {recipe.embedding_penalty:g}{mask}"
    )
