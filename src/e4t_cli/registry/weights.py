"""Where a domain's weights for a base are on this machine, or how to get them in one sentence."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path

from e4t_cli.bases import PUBLISHED
from e4t_cli.domain import Domain
from e4t_cli.errors import WeightsUnavailable, printable
from e4t_cli.estimates import shown_hours
from e4t_cli.hub.addresses import pack_folder
from e4t_cli.hub.converted import converted_folder, foreign_repository
from e4t_cli.recipes import PretrainingRecipe

from .own_domains import user_domain, user_domains_folder


def weights_folder(domain: Domain, base: str) -> Path:
    """Return the folder of the domain's pack for a base.

    A folder of the user's with the domain's name serves a base for which the domain itself has
    no weights here: what `e4t pretrain` made stands beside what was installed.

    Raises:
        WeightsUnavailable: there is none on this machine.
        IntegrityError: the user's folder cannot be read.
    """
    location = domain.weights.get(base)
    for folder in () if location is None else _places(location):
        if (folder / "domain.toml").is_file():
            return folder
    own = user_domains_folder() / domain.name
    if (own / "domain.toml").is_file() and base in user_domain(own).weights:
        return own
    command = f"e4t pretrain --domain {domain.name} --base {base} --data FOLDER"
    if location is None:
        published = PUBLISHED.get(base)
        nobody = ": nobody has published any" if published else ""
        recipe = domain.pretraining or PretrainingRecipe(steps=60_000)
        time = ""
        if published:
            time = f" ({recipe.steps:,} steps, {shown_hours(recipe, published.resolution)})"
        raise WeightsUnavailable(
            f"domain {domain.name!r} has no weights for the base {printable(base)!r}{nobody}",
            hint=f"make them: {command}{time}",
        )
    if location.startswith("hub:") or foreign_repository(location):
        raise WeightsUnavailable(
            f"the weights of domain {domain.name!r} for {base} are on the hub "
            f"({printable(location.partition(':')[2])}) and not on this machine",
            hint=f"e4t fetch {domain.name} --base {base}",
        )
    raise WeightsUnavailable(
        f"the weights of domain {domain.name!r} for {base} are not in this installation "
        f"({printable(location)})",
        hint=f"reinstall the package they come with, or make them: {command}",
    )


def _places(location: str) -> list[Path]:
    """Return the folders on this machine that a location can mean; nothing is fetched."""
    kind, _, rest = location.partition(":")
    if kind == "hub":
        folder = pack_folder(location)
        return [folder] if folder is not None else []
    if foreign_repository(location):
        folder = converted_folder(location)
        return [folder] if folder is not None else []
    if kind != "package":
        return [Path(location)]
    package, *parts = rest.split("/")
    with contextlib.suppress(ImportError):
        spec = find_spec(package)
        if spec is not None:
            return [Path(root, *parts) for root in spec.submodule_search_locations or ()]
    return []
