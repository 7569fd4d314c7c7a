"""``e4t fetch``: bring bases and domains here before they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from e4t_cli.bases import EMBEDDED, PUBLISHED
from e4t_cli.cli import console as consoles
from e4t_cli.cli import options as o

if TYPE_CHECKING:
    from e4t_cli.hub.access import Access

EXAMPLES = """
Examples:\n
e4t fetch face --base sd14\n
e4t fetch sd15\n
e4t fetch owner/a-stable-diffusion@fp16 --dtype fp32
"""


def complete_wanted(incomplete: str) -> list[str]:
    """Names of bases and domains, for the shell's completion."""
    names = [*EMBEDDED, *PUBLISHED, *o.complete_domain("")]
    return [name for name in names if name.startswith(incomplete)]


Wanted = Annotated[
    list[str],
    typer.Argument(metavar="DOMAIN|BASE", autocompletion=complete_wanted,
                   help="face, cat, ...; sd14, sd15, sd21-base, sd21, or OWNER/NAME of the hub."),
]  # fmt: skip


def fetch(
    wanted: Wanted, base: o.Base = "auto", device: o.Device = "auto", dtype: o.Dtype = "auto",
    offline: o.Offline = False, accept_license: o.AcceptLicense = False, json: o.Json = False,
    quiet: o.Quiet = False, verbose: o.Verbose = 0,
) -> None:  # fmt: skip
    """Bring bases and domains to this machine, whole and checked.

    What is here is not fetched again; what is here and damaged is. A domain comes with the base
    that it is for, and with what finds its subject in a photo. Everything lies in the cache of the
    Hugging Face hub. The folders go to stdout.
    """
    console = consoles.start(json=json, quiet=quiet, verbose=verbose)
    console.resume_hint = "the same command goes on: files that are finished are kept"
    from e4t_cli.hub.access import Access

    with console.progress() as on_progress:
        access = Access(
            offline=offline,
            accept_license=console.consent(accept_license),
            on_progress=on_progress,
        )
        for name in wanted:
            _fetch(console, access, name, base, device, dtype)


def _fetch(
    console: consoles.Console, access: Access, name: str, base: str, device: str, dtype: str
) -> None:
    from e4t_cli.api.choices import find_pack, name_base, reads_tower, wants_half
    from e4t_cli.hub.addresses import address_of
    from e4t_cli.hub.provision import provide_base
    from e4t_cli.registry import find_domain
    from e4t_cli.segmenters import fetcher

    domain = None
    place = name
    if name not in EMBEDDED and address_of(name) is None:
        domain = find_domain(name)
        place = name_base(base, access, domain=domain, device=device)
    half, tower = wants_half(device, dtype), reads_tower(domain, place)
    found = provide_base(place, access, half=half, tower=tower, repair=True)
    console.product(
        str(found.folder),
        {"type": "base", "name": found.name, "revision": found.revision, "path": str(found.folder)},
    )
    if domain is not None:
        folder = find_pack(domain, found, access, repair=True)
        record = {"type": "domain", "name": domain.name, "base": found.name, "path": str(folder)}
        console.product(str(folder), record)
        bring = fetcher(access)
        for repository in domain.networks if found.name not in EMBEDDED else ():
            place = str(bring(repository))
            console.product(place, {"type": "network", "name": repository, "path": place})
