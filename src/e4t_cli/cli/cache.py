"""``e4t cache`` and ``e4t fetch``: the files that e4t has downloaded or derived."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from e4t_cli.cli import console as terminal
from e4t_cli.cli import options
from e4t_cli.cli.options import Json, Quiet, Yes
from e4t_cli.errors import IntegrityError
from e4t_cli.files import shown_size
from e4t_cli.hub.bases import EMBEDDED, PUBLISHED
from e4t_cli.hub.paths import folder_problems, hub_cache, user_cache

if TYPE_CHECKING:
    from e4t_cli.hub.paths import HubAccess

app = typer.Typer(help="The files that e4t has downloaded or derived.")

Names = Annotated[list[str], typer.Argument(metavar="NAME", help="As `e4t cache ls` shows it.")]


@app.callback(invoke_without_command=True)
def cache(context: typer.Context) -> None:
    """The files that e4t has downloaded or derived."""
    terminal.show_help(context)


@app.command("dir")
def show_folders(json: Json = False) -> None:
    """Print the folders of downloaded and of derived files."""
    console = terminal.start(json=json)
    _warn_of_folders(console)
    folders = {"hub": str(hub_cache()), "own": str(user_cache())}
    if json:
        return console.details("cache", folders)
    for folder in folders.values():
        terminal.write_stdout(folder)
    return None


def _warn_of_folders(console: terminal.Console) -> None:
    for problem in folder_problems():
        console.warning(problem)


@app.command("ls")
def list_items(json: Json = False) -> None:
    """List downloaded and derived files, with their size."""
    console = terminal.start(json=json)
    from e4t_cli.hub.cache import list_cache

    _warn_of_folders(console)
    found = list_cache()
    if json:
        for item in found:
            console.details(item.name, {"type": "cached", **item.as_dict()})
        return None
    kinds = [f"{item.count} {item.kind}" if item.count > 1 else item.kind for item in found]
    rows = [(item.name, kind, shown_size(item.size), str(item.path)) for item, kind in zip(found, kinds, strict=True)]
    if rows:
        console.table(("name", "kind", "size", "path"), rows)
    total = sum(item.size for item in found)
    return console.note(f"{len(found)} in all, {shown_size(total)}" if found else "nothing yet")


@app.command("verify")
def verify(json: Json = False, quiet: Quiet = False) -> None:
    """Compare every downloaded file with the hub's checksum."""
    console = terminal.start(json=json, quiet=quiet)
    from e4t_cli.hub import cache as hub_files

    with console.progress() as on_progress:
        count, damaged = hub_files.verify(on_progress)
    for one in damaged:
        line = f"{one.repository}/{one.file}: expected {one.expected}, got {one.got}"
        console.product(line, {"type": "damaged", **asdict(one)})
    if damaged:
        hint = f"e4t fetch {damaged[0].repository} downloads it again"
        raise IntegrityError(f"{len(damaged)} of {count} files are damaged", hint=hint)
    console.note(f"{count} files match their checksums")


@app.command("prune")
def prune(yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove partial downloads, what killed commands left, and other files that are not needed.

    These are also files that have a smaller copy, checkpoints of pre-trainings to which nothing was written for 30
    days, and tuned concepts that were not used for as long.
    """
    console = terminal.start(json=json, quiet=quiet)
    from e4t_cli.hub import cache as hub_files

    found = hub_files.prunable()
    if found:
        size = shown_size(sum(item.size for item in found))
        console.confirm(yes, f"remove {len(found)} files or folders, {size}, that are not needed?")
    for item in hub_files.prune(found):
        console.product(str(item.path), {"type": "removed", **item.as_dict()})
    if not found:
        console.note("there is nothing to remove")


@app.command("rm")
def remove(names: Names, yes: Yes = False, json: Json = False, quiet: Quiet = False) -> None:
    """Remove downloaded repositories, also for other programs that use the hub's cache, or derived files.

    `tuned` is the weights of all concepts that were tuned here.
    """
    console = terminal.start(json=json, quiet=quiet)
    from e4t_cli.hub import cache as hub_files

    found = [item for name in names for item in hub_files.find_items(name)]
    size = shown_size(sum(item.size for item in found))
    what = ", ".join(dict.fromkeys(item.name for item in found))
    console.confirm(yes, f"remove {what}, {size}?")
    for item in found:
        hub_files.remove(item)
        console.product(str(item.path), {"type": "removed", **item.as_dict()})


FETCH_EXAMPLES = """
Examples:\n
e4t fetch face --base sd14\n
e4t fetch sd15\n
e4t fetch owner/a-stable-diffusion
"""


def complete_wanted(incomplete: str) -> list[str]:
    """Names of bases and domains, for the shell's completion."""
    names = [*EMBEDDED, *PUBLISHED, *options.complete_domain("")]
    return [name for name in names if name.startswith(incomplete)]


Wanted = Annotated[list[str], typer.Argument(
    metavar="DOMAIN|BASE", autocompletion=complete_wanted,
    help="face, …; sd14, sd15, sd21-base, sd21; OWNER/NAME of the hub, a base or a VAE.")]  # fmt: skip


@options.grouped
def fetch(wanted: Wanted, run: options.RunFlags, flags: options.TerminalFlags) -> None:
    """Download bases, VAEs and domains, complete and verified.

    What is in the cache of the Hugging Face hub is not downloaded again, unless it is damaged. A
    domain comes with its base, and with the networks it prepares photos with. The folders go to
    stdout.
    """
    console = flags.start()
    console.resume_hint = "the same command continues: finished files are kept"
    from e4t_cli.hub.paths import HubAccess

    accept = console.consent(run.accept_license)
    with console.progress() as on_progress:
        access = HubAccess(offline=run.offline, accept_license=accept, on_progress=on_progress)
        for name in wanted:
            _fetch(console, access, name, run)


def _fetch(console: terminal.Console, access: HubAccess, name: str, run: options.RunFlags) -> None:
    from e4t_cli.api.resolve import (
        check_weights,
        fetch_named_base,
        find_weights,
        name_before_fetching,
        needs_image_tower,
        prefers_half,
        resolve_base_name,
        resolve_domain_weights,
    )
    from e4t_cli.hub.bases import hub_location
    from e4t_cli.hub.repo_info import get_repo_info
    from e4t_cli.hub.single_file import is_file_name
    from e4t_cli.hub.vae import fetch_vae, is_only_vae
    from e4t_cli.images.preparation import snapshot_downloader
    from e4t_cli.registry.discovery import find_domain

    domain, place = None, name
    if name not in EMBEDDED and hub_location(name) is None and not is_file_name(name):
        domain = find_domain(name)
        place = resolve_base_name(run.base, access, domain=domain, device=run.device)
        check_weights(domain, place)
        if own := name_before_fetching(place, access):
            find_weights(domain, own)
    if domain is None and (address := hub_location(name)) is not None and name not in PUBLISHED:
        info = get_repo_info(address.repository, address.revision or None, access)
        if info is not None and is_only_vae([file.path for file in info.files]):
            folder = fetch_vae(name, access, repair=True)
            record = {"type": "vae", "name": address.repository, "revision": folder.name, "path": str(folder)}
            console.product(str(folder), record)
            return
    half, tower = prefers_half(run.device, run.dtype), needs_image_tower(domain, place)
    found = fetch_named_base(place, access, half=half, tower=tower, repair=True)
    path = str(found.folder)
    console.product(path, {"type": "base", "name": found.name, "revision": found.revision, "path": path})
    if domain is not None:
        path = str(resolve_domain_weights(domain, found, access, repair=True))
        console.product(path, {"type": "domain", "name": domain.name, "base": found.name, "path": path})
        fetch_network = snapshot_downloader(access)
        for repository in domain.networks if found.name not in EMBEDDED else ():
            path = str(fetch_network(repository))
            console.product(path, {"type": "network", "name": repository, "path": path})
