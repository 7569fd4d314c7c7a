"""``e4t domains``: lists, checks, creates, adds, removes and publishes domains."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e4t_cli.cli import console as terminal
from e4t_cli.cli.options import DomainName, Force, Json, Offline, Quiet, Yes, complete_domain
from e4t_cli.errors import E4TError, UsageError, printable
from e4t_cli.files import shown_size

if TYPE_CHECKING:
    from e4t_cli.registry.discovery import Listing
    from e4t_cli.registry.domain import Domain
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
    """List all domains, with the reason where one cannot be used."""
    from e4t_cli.registry.discovery import installed_domains

    console = terminal.start(json=json)
    listings = installed_domains()
    if json:
        for listing in listings:
            console.details(listing.name, {"type": "domain", **_record(listing)})
        return
    console.table(HEADINGS, [_row(listing) for listing in listings])
    if not listings:
        console.note("no domain is installed; domains/README.md says how to write one")
    return


def _record(listing: Listing) -> dict[str, Any]:
    about = {"name": listing.name, "source": _source_text(listing), "reason": listing.reason}
    return {**about, **(_about_domain(listing.domain) if listing.domain else {})}


def _row(listing: Listing) -> tuple[str, ...]:
    record = _record(listing)
    if listing.domain is None:
        return (listing.name, record["source"], "broken", "", "", listing.reason or "")  # the last column is as wide
    weights = "; ".join(f"{base} {_state_text(one)}" for base, one in record["weights"].items())
    licence = record["licence"] + (f" ({listing.reason})" if listing.reason else "")
    return (listing.name, record["source"], record["descriptor"], _tuning_text(record["tuning"]), weights, licence)


def _source_text(listing: Listing) -> str:
    """Return the distribution and its version, or "user"."""
    return f"{listing.package} {listing.version}".strip()


@app.command("info")
def domain_info(name: DomainName, json: Json = False) -> None:
    """Show a domain: its weights, their files, configs, licence and limits."""
    from e4t_cli.registry.discovery import find_listing

    console = terminal.start(json=json)
    listing = find_listing(name)
    assert listing.domain is not None
    about: dict[str, Any] = {"source": _source_text(listing), **_about_domain(listing.domain)}
    if not json:
        del about["name"]
        about["tuning"] = _tuning_text(about["tuning"])
        for base, weights in about.pop("weights").items():
            about[f"weights for {base}"] = _state_text(weights, long=True)
            about |= {f"{base}: {key}": value for key, value in _lines(weights).items()}
    console.details(listing.domain.name, about)


def _about_domain(domain: Domain) -> dict[str, Any]:
    """Return a domain as a record, with the state of its weights for each base."""
    from e4t_cli.registry.weights import weights_states  # imports pydantic: too slow for --help

    return {
        "name": domain.name,
        "summary": domain.summary,
        "descriptor": domain.descriptor,
        "tuning": dict(vars(domain.tuning)),
        "licence": domain.licence,
        "weights": {state.base: _about_weights(state) for state in weights_states(domain)},
    }


def _state_text(weights: dict[str, Any], *, long: bool = False) -> str:
    """Return the state of domain weights in a few words, or with all details."""
    size = shown_size(weights["size"]) if weights.get("size") else ""
    text: str = weights["state"]
    if text == "to fetch":
        text = f"{size} to fetch".strip()
    elif long and size:
        text = f"{text}, {size}"
    more = _tuning_text(weights["tuning"]) if "tuning" in weights else weights.get("hint") or weights.get("reason")
    return f"{text}: {more}" if long and more else text


def _tuning_text(config: dict[str, Any]) -> str:
    """Return the fields of a tuning config in a few words."""
    rate, mask = config["base_learning_rate"] * config["batch_size"], ", masked" if config["mask"] else ""
    return f"{config['steps']} steps, rate {rate:.3g}, regularization {config['reg_weight']:g}{mask}"


def _about_weights(state: WeightsState) -> dict[str, Any]:
    plain = {key: getattr(state, key) for key in ("size", "location", "reason", "hint")}
    record = {"state": state.state, **{key: value for key, value in plain.items() if value}}
    manifest, folder = state.manifest, state.folder
    if manifest is None or folder is None:
        return record
    texts = ("licence", "limits", "notes", "base_revision", "base_fingerprint", "base_config_hash", "image_tower")
    files = manifest.files.items()
    return {
        **record,
        "tuning": dict(vars(manifest.tuning)),
        "pretraining": dict(vars(manifest.pretraining)),
        "folder": str(folder),
        "images": manifest.images,
        **{field: getattr(manifest, field) for field in texts},
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in files},
    }


def _lines(weights: dict[str, Any]) -> dict[str, str]:
    """Return a manifest as lines of text."""
    if "files" not in weights:
        return {}
    before = weights["pretraining"]
    lines = {
        "images": f"{weights['images']:,}",
        "pre-training": f"{before['steps']:,} steps of {before['batch_size']}",
        "made for": f"{weights['base_revision']} {weights['base_fingerprint'][:12]}".strip(),
        **{key.replace("_", " "): weights[key] for key in ("image_tower", "licence", "limits", "notes")},
        "folder": weights["folder"],
    }
    files = weights["files"].items()
    return lines | {name: f"{file['bytes']:,} bytes, SHA-256 {file['sha256']}" for name, file in files}


ADD_EXAMPLES = """
Examples:\n
e4t domains add ./my_dogs\n
e4t domains add my_dogs.zip\n
e4t domains add someone/e4t-dogs@COMMIT
"""

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, a zip, or owner/repository@revision.")]


@app.command("add", epilog=ADD_EXAMPLES)
def add(
    source: Source, force: Force = False, offline: Offline = False, json: Json = False, quiet: Quiet = False
) -> None:
    """Add a domain from a folder, a zip or the hub, if all checks pass."""
    from e4t_cli.registry.store import add_domain  # imports pydantic: too slow for --help

    console = terminal.start(json=json, quiet=quiet)
    with console.progress() as on_progress:
        added = add_domain(source, force=force, offline=offline, on_progress=on_progress)
    name, path = added.domain.name, str(added.folder)
    base, licence = added.manifest.base, added.manifest.licence
    console.product(path, {"type": "domain", "name": name, "base": base, "path": path, "licence": licence})
    console.note(f"licence: {licence or 'none stated'}")
    console.note(f'try it: e4t personalize {name} PHOTO "S* on the beach" --base {base}')


def complete_user_domain(incomplete: str) -> list[str]:
    """Names of the user domains, for the shell's completion."""
    from e4t_cli.registry.discovery import user_domain_names

    return [name for name in user_domain_names() if name.startswith(incomplete)]


UserDomainName = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=complete_user_domain, help="A user domain.")
]


@app.command("rm")
def rm(name: UserDomainName, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove a user domain; that of a package goes with its package."""
    from e4t_cli.registry.store import find_user_folder, remove_domain

    console = terminal.start(json=json, quiet=quiet)
    folder = find_user_folder(name)
    console.confirm(yes, f"remove {folder} with its weights?")
    path = str(remove_domain(name))
    console.product(path, {"type": "removed", "name": folder.name, "path": path})


CHECK_EXAMPLES = "Example: e4t domains check ./my_dogs"

Subject = Annotated[
    str, typer.Argument(metavar="NAME|DIR", autocompletion=complete_domain, help="A domain, or a domain's folder.")
]


@app.command("check", epilog=CHECK_EXAMPLES)
def check(subject: Subject, json: Json = False, quiet: Quiet = False) -> None:
    """Check a domain: its value, prompt templates, preparation and weights."""
    console = terminal.start(json=json, quiet=quiet)
    from e4t_cli.registry.discovery import find_listing, installed_domains
    from e4t_cli.registry.testing import examine_domain

    problems = 0
    folder = Path(subject)
    domain = folder if "/" in subject or os.path.isfile(folder / "domain.toml") else subject
    if isinstance(domain, Path) and not os.path.isfile(folder / "domain.toml"):
        raise UsageError(f"there is no domain in {printable(subject)}", hint="a domain's folder has a domain.toml")
    if domain == subject and all(one.name != subject for one in installed_domains()):
        find_listing(subject)  # raises
    for finding in examine_domain(domain):
        problems += bool(finding.problem)
        message, ok = finding.problem or finding.remark, not finding.problem
        line = f"{'ok' if ok else 'FAILED':7} {finding.subject}{': ' if message else ''}{message}"
        console.product(line, {"type": "finding", "subject": finding.subject, "ok": ok, "message": message})
    if problems:
        raise E4TError(f"{problems} of the checks failed on {subject}")


NEW_EXAMPLES = """
Examples:\n
e4t domains new my_dogs --descriptor dog\n
pip install -e ./e4t-domain-my-dogs
"""

NewName = Annotated[str, typer.Argument(metavar="NAME", help="Its name: a-z, 0-9, - and _.")]
Directory = Annotated[
    Path | None, typer.Argument(metavar="DIR", help="A new or empty folder; by default ./e4t-domain-NAME.")
]
Descriptor = Annotated[
    str,
    typer.Option(
        metavar="WORD", help="The everyday word for such things; default: from the name.", show_default=False
    ),
]
licence_option = functools.partial(typer.Option, "--licence", "--license", metavar="NAME", show_default=False)
Licence = Annotated[str, licence_option(help="Of the weights and of their images.")]
Pack = Annotated[Path | None, typer.Option(metavar="DIR", help="Weights of `e4t pretrain`, for the package.")]


@app.command("new", epilog=NEW_EXAMPLES)
def new(
    name: NewName, directory: Directory = None, descriptor: Descriptor = "", licence: Licence = "",
    pack: Pack = None, force: Force = False, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write a plug-in package with one domain and its tests."""
    from e4t_cli.registry.scaffold import new_domain  # imports pydantic: too slow for --help

    console = terminal.start(json=json, quiet=quiet)
    folder = new_domain(name, directory, descriptor=descriptor, licence=licence, weights=pack, force=force)
    console.product(str(folder), {"type": "package", "name": name, "path": str(folder)})
    console.note(f"install it: pip install -e {folder}")


PUSH_EXAMPLES = "Example: e4t domains push my_dogs me/e4t-my-dogs --licence CC0-1.0"

Repository = Annotated[str, typer.Argument(metavar="OWNER/REPO", help="The repository; created if there is none.")]
Which = Annotated[str, typer.Option("--base", metavar="NAME", show_default=False, help="Which weights, of several.")]
PushLicence = Annotated[str, licence_option(help="Of weights and images; default: as recorded.")]
Public = Annotated[bool, typer.Option("--public", help="For everybody; else it is private.")]


@app.command("push", epilog=PUSH_EXAMPLES)
def push(
    name: DomainName, repository: Repository, base: Which = "", licence: PushLicence = "",
    public: Public = False, yes: Yes = False, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Upload a domain's weights with a model card, to a private repository.

    Weights can reveal the images they were made from: publish only what you may.
    """
    from e4t_cli.registry.discovery import find_domain
    from e4t_cli.registry.publish import publish_domain  # imports pydantic: too slow for --help

    console = terminal.start(json=json, quiet=quiet)
    domain = find_domain(name)
    how = "publicly" if public else "privately"
    console.confirm(yes, f"upload the weights of {domain.name} to {repository}, {how}?", verb="upload")
    with console.progress() as on_progress:
        done = publish_domain(
            domain, repository, base=base, licence=licence, private=not public, on_progress=on_progress
        )
    record = {"type": "repository", "name": domain.name, "base": done.manifest.base, "location": done.location}
    console.product(done.location, {**record, "private": done.private, "bytes": done.size})
    console.note(f"others: e4t domains add {done.location}")
