"""``e4t domains``: what can be personalized here, and what is broken and why.

``e4t domains info``: everything about one domain.

``e4t domains add``: put a domain that somebody made among one's own.

``e4t domains rm``: remove one of one's own domains.

``e4t domains check``: does a domain keep the contract?

``e4t domains new``: begin a package with a domain in it.

``e4t domains push``: publish the weights of a domain on the hub.
"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e4t_cli.cli import console as consoles
from e4t_cli.cli.options import DomainName, Json, Offline, Quiet, Yes, complete_domain
from e4t_cli.errors import E4TError, UsageError
from e4t_cli.files import shown_size

if TYPE_CHECKING:
    from e4t_cli.registry.config import TuningConfig
    from e4t_cli.registry.discovery import Listing
    from e4t_cli.registry.domain import Domain
    from e4t_cli.registry.manifest import Manifest
    from e4t_cli.registry.weights import WeightsState

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
    from e4t_cli.registry.discovery import installed_domains

    console = consoles.start(json=json)
    listings = installed_domains()
    if json:
        rows = [_record(listing) for listing in listings]
        return consoles.write_stdout(json_format.dumps(rows))
    console.table(HEADINGS, [_row(listing) for listing in listings])
    if not listings:
        console.note("no domain is installed; domains/README.md says how to write one")
    return None


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


def domain_info(name: DomainName, json: Json = False) -> None:
    """Show everything about one domain: its packs, their files, recipes, licence and limits."""
    from e4t_cli.registry.discovery import find_listing

    console = consoles.start(json=json)
    listing = find_listing(name)
    assert listing.domain is not None
    about = {"source": f"{listing.package} {listing.version}".strip()}
    about |= about_domain(listing.domain)
    if not json:
        del about["name"]
        packs = about.pop("weights")
        for base, pack in packs.items():
            about[f"weights for {base}"] = state_text(pack, long=True)
            about |= {f"{base}: {key}": value for key, value in _lines(pack).items()}
    console.details(listing.domain.name, about)


def about_domain(domain: Domain) -> dict[str, Any]:
    """Return a domain as a record, with the state of its weights for each base."""
    from e4t_cli.registry.weights import weights_states  # pydantic, which --help does not wait for

    return {
        "name": domain.name,
        "summary": domain.summary,
        "descriptor": domain.descriptor,
        "tuning": recipe_text(domain.tuning),
        "licence": domain.licence,
        "weights": {state.base: _about_weights(state) for state in weights_states(domain)},
    }


def state_text(pack: dict[str, Any], *, long: bool = False) -> str:
    """Return the state of weights in a few words, or with everything there is to say."""
    size = shown_size(pack["size"]) if pack.get("size") else ""
    if pack["state"] == "to fetch":
        said = f"{size} to fetch".strip()
    else:
        said = f"{pack['state']}, {size}" if long and size else pack["state"]
    more = pack.get("tuning") or pack.get("hint") or pack.get("reason")
    return f"{said}: {more}" if long and more else said


def recipe_text(config: TuningConfig) -> str:
    """Return the numbers of tuning in a few words."""
    mask = ", masked" if config.mask else ""
    return (
        f"{config.steps} steps, rate {config.learning_rate:.3g}, "
        f"penalty {config.reg_weight:g}{mask}"
    )


def _about_weights(state: WeightsState) -> dict[str, Any]:
    plain = {key: getattr(state, key) for key in ("size", "location", "reason", "hint")}
    record = {"state": state.state, **{key: value for key, value in plain.items() if value}}
    return record | (_about_card(state.manifest, state) if state.manifest else {})


def _about_card(card: Manifest, state: WeightsState) -> dict[str, Any]:
    assert state.folder is not None
    return {
        "tuning": recipe_text(card.tuning),
        "pretraining": card.pretraining.as_dict(),
        "folder": str(state.folder),
        "images": card.images,
        "licence": card.licence,
        "limits": card.limits,
        "notes": card.notes,
        "base_revision": card.base_revision,
        "base_fingerprint": card.base_fingerprint,
        "base_config_hash": card.base_config_hash,
        "image_tower": card.image_tower,
        "files": {
            name: {"bytes": (state.folder / name).stat().st_size, "sha256": sha256}
            for name, sha256 in card.files.items()
        },
    }


def _lines(pack: dict[str, Any]) -> dict[str, str]:
    """Return what a card says, a line each, for people."""
    if "files" not in pack:
        return {}
    before = pack["pretraining"]
    lines = {
        "pictures": f"{pack['images']:,}",
        "pre-training": f"{before['steps']:,} steps of {before['batch_size']}",
        "made for": f"{pack['base_revision']} {pack['base_fingerprint'][:12]}".strip(),
        **{
            key.replace("_", " "): pack[key]
            for key in ("image_tower", "licence", "limits", "notes")
        },
        "folder": pack["folder"],
    }
    for name, file in pack["files"].items():
        lines[name] = f"{file['bytes']:,} bytes, SHA-256 {file['sha256']}"
    return lines


ADD_EXAMPLES = """
Examples: [bold]e4t domains add ./my_dogs[/bold] · [bold]e4t domains add my_dogs.zip[/bold] ·
[bold]e4t domains add someone/e4t-dogs@COMMIT[/bold]
"""

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A folder, a zip, or owner/repository@revision."),
]


def add(source: Source, offline: Offline = False, json: Json = False, quiet: Quiet = False) -> None:
    """Add a domain from a folder, a zip or the hub; nothing appears unless all of it is sound."""
    from e4t_cli.registry.store import add_domain  # pydantic: --help does not wait for it

    console = consoles.start(json=json, quiet=quiet)
    with console.progress() as on_progress:
        added = add_domain(source, offline=offline, on_progress=on_progress)
    name, path = added.domain.name, str(added.folder)
    console.product(
        path,
        {"type": "domain", "name": name, "base": added.manifest.base, "path": path,
         "licence": added.manifest.licence},
    )  # fmt: skip
    console.note(f"licence: {added.manifest.licence or 'none stated'}")
    console.note(
        f'try it: e4t personalize {name} PHOTO "S* on the beach" --base {added.manifest.base}'
    )


def complete_own(incomplete: str) -> list[str]:
    """Names of the user's own domains, for the shell's completion."""
    from e4t_cli.registry.discovery import user_domain_names

    return [name for name in user_domain_names() if name.startswith(incomplete)]


OwnName = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=complete_own, help="A domain of your own.")
]


def rm(name: OwnName, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove a domain of your own; what a package brought, its package manager removes."""
    from e4t_cli.registry.store import find_user_folder, remove_domain

    console = consoles.start(json=json, quiet=quiet)
    folder = find_user_folder(name)
    if not yes and not console.ask(f"remove {folder} with its weights?"):
        raise UsageError("nothing was removed", hint="-y removes without asking")
    path = str(remove_domain(name))
    console.product(path, {"type": "removed", "name": folder.name, "path": path})


CHECK_EXAMPLES = """
In a test: [bold]from e4t_cli import check_domain[/bold], then
[bold]check_domain("my_dogs")[/bold]
"""

Subject = Annotated[
    str,
    typer.Argument(
        metavar="NAME|DIR", autocompletion=complete_domain, help="A domain, or a domain's folder."
    ),
]


def check(subject: Subject, json: Json = False, quiet: Quiet = False) -> None:
    """Run every check on a domain: its value, sentences, preparation and weights."""
    console = consoles.start(json=json, quiet=quiet)
    from e4t_cli.registry.testing import examine_domain

    problems = 0
    folder = Path(subject)
    domain = folder if "/" in subject or (folder / "domain.toml").is_file() else subject
    for finding in examine_domain(domain):
        problems += bool(finding.problem)
        word = "FAILED" if finding.problem else "ok"
        said = finding.problem or finding.remark
        console.product(
            f"{word:7} {finding.subject}{': ' if said else ''}{said}",
            {"type": "finding", "subject": finding.subject, "ok": not finding.problem,
             "message": said},
        )  # fmt: skip
    if problems:
        raise E4TError(f"{problems} of the checks failed on {subject}")


NEW_EXAMPLES = """
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
    from e4t_cli.registry.scaffold import new_domain  # pydantic: --help does not wait for it

    console = consoles.start(json=json, quiet=quiet)
    folder = new_domain(name, directory, descriptor=descriptor, licence=licence, weights=pack)
    console.product(str(folder), {"type": "package", "name": name, "path": str(folder)})
    console.note(f"install it: pip install -e {folder}")


PUSH_EXAMPLES = """
Example: [bold]e4t domains push my_dogs me/e4t-my-dogs --licence CC0-1.0[/bold]
"""

Repository = Annotated[
    str, typer.Argument(metavar="OWNER/REPO", help="The repository; made if there is none.")
]
Which = Annotated[
    str,
    typer.Option("--base", metavar="NAME", show_default=False, help="Which pack, of several."),
]
PushLicence = Annotated[
    str, typer.Option("--licence", "--license", metavar="NAME", show_default=False,
                      help="Of weights and pictures; default: what the card says.")
]  # fmt: skip
Public = Annotated[bool, typer.Option("--public", help="For everybody; otherwise it is private.")]


def push(
    name: DomainName,
    repository: Repository,
    base: Which = "",
    licence: PushLicence = "",
    public: Public = False,
    yes: Yes = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a domain's weights and a page about them, into a private repository of yours.

    Weights can give away the pictures they were made from: publish only what you may.
    """
    from e4t_cli.registry.discovery import find_domain
    from e4t_cli.registry.publish import publish_domain  # pydantic: --help does not wait for it

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
        {"type": "repository", "name": domain.name, "base": done.manifest.base,
         "location": done.location, "private": done.private, "bytes": done.size},
    )  # fmt: skip
    console.note(f"others: e4t domains add {done.location}")


app.command("info")(domain_info)
app.command("new", epilog=NEW_EXAMPLES)(new)
app.command("add", epilog=ADD_EXAMPLES)(add)
app.command("check", epilog=CHECK_EXAMPLES)(check)
app.command("rm")(rm)
app.command("push", epilog=PUSH_EXAMPLES)(push)
