"""Finds domains (entry points of installed packages, folders of the user) and their weights on this machine.

Candidates are listed from metadata alone; only the requested domain is imported. A domain that is broken, of the wrong
type, or whose name two packages claim affects only who asks for it, and the list shows the reason. The domains of this
distribution cannot be shadowed.

`E4T_DOMAINS=face,cat` restricts what is considered (empty: nothing), for tests and for recovery.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from e4t_cli.errors import E4TError, UsageError, WeightsUnavailable, printable
from e4t_cli.hub.bases import PUBLISHED, converted_weights_folder, hub_weights_folder
from e4t_cli.hub.paths import user_data
from e4t_cli.registry.config import PretrainingConfig, format_hours
from e4t_cli.registry.domain import Domain, check_name, is_remote

GROUP = "e4t.domains"
OURS = "e4t"  # the distribution whose domains cannot be shadowed
USER = "user"  # the package name shown for domains that are folders of the user


def user_domains_folder() -> Path:
    """Return the folder whose sub-folders are the user's domains."""
    return user_data() / "domains"


def user_domain(folder: Path) -> Domain:
    """Return the domain of a folder; UsageError if it has no domain.toml, IntegrityError if that is invalid."""
    from e4t_cli.registry.manifest import MANIFEST_NAME, read_manifest  # pydantic takes 0.1 s

    path = folder / MANIFEST_NAME
    if _is_closed(folder):
        raise UsageError(f"{printable(str(folder))} cannot be read", hint="its permissions do not allow it")
    if not os.path.isfile(path):
        message = f"{printable(str(folder))} is no domain: it has no {MANIFEST_NAME}"
        raise UsageError(message, hint="e4t domains list shows what is installed")
    manifest = read_manifest(path)
    return Domain(
        name=manifest.name,
        descriptor=manifest.descriptor,
        tuning=manifest.tuning,
        pretraining=manifest.pretraining,
        weights={manifest.base: os.path.realpath(folder)},
        prompt_templates=tuple(manifest.templates),
        licence=manifest.licence,
        summary=f"pre-trained on {manifest.images:,} images" if manifest.images else "",
    )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One row of the list of domains."""

    name: str  # as claimed
    package: str  # the distribution it comes from; "user" for the user's folders
    version: str = ""
    load: Callable[[], object] = field(repr=False, compare=False)  # returns the value, if it is one
    domain: Domain | None = None  # the value, or None if it did not load
    reason: str | None = None  # why the bare name does not give this domain


def installed_domains() -> list[Listing]:
    """Return every domain on this machine, loaded or with the reason why not."""
    found = _candidates()
    rows = []
    for row in found:
        try:
            row = replace(row, domain=_load(row))
        except E4TError as error:
            cause = error.message.partition(" did not load: ")[2]
            row = replace(row, reason=f"did not load: {cause}")
        claims = _claimants([one for one in found if one.name == row.name])
        others = ", ".join(sorted(one.package for one in claims if one.package != row.package))
        if others and row.domain is not None and row.package != OURS:
            problem = "its weights serve the domain of" if row.package == USER else "its name is also claimed by"
            row = replace(row, reason=f"{problem} {others}; ask for it as {row.package}:{row.name}")
        rows.append(row)
    return rows


def find_domain(name: str) -> Domain:
    """Return the domain of that name; no other one is imported.

    Args:
        name: "face", or "package:face" where two packages claim the name, or the path of a folder with a domain.toml.

    Raises:
        UsageError: no domain or more than one has that name.
        E4TError: it did not load; the cause is chained.
    """
    domain = find_listing(name).domain
    assert domain is not None
    return domain


def find_listing(name: str) -> Listing:
    """Return the domain of that name with the package that it comes from; errors as of `find_domain`."""
    shown = printable(name)
    if "/" in name or os.sep in name:
        if not os.path.isdir(name):
            raise UsageError(f"there is no folder {shown}")
        load = partial(user_domain, Path(name))
        domain = load()
        return Listing(name=domain.name, package=USER, load=load, domain=domain)
    package, _, bare = name.rpartition(":")
    found = _candidates()
    named = [c for c in found if c.name == bare]
    claims = [c for c in named if package in ("", c.package)]
    claims = _claimants(claims or [c for c in named if _normal(c.package) == _normal(package)])
    if not claims:
        near = difflib.get_close_matches(bare, [c.name for c in found], n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no domain {shown!r} is installed", hint=f"{guess}e4t domains list shows them all")
    if len(claims) > 1:
        packages = " and ".join(sorted(c.package for c in claims))
        raise UsageError(f"domain {shown!r} is claimed by {packages}", hint=f"name one: {claims[0].package}:{bare}")
    return replace(claims[0], domain=_load(claims[0]))


def _claimants(claims: list[Listing]) -> list[Listing]:
    """Return the candidates of one name that the bare name can mean.

    Ours cannot be shadowed. A folder of the user does not compete with an installed domain but provides weights for it
    (`weights_folder`): `e4t pretrain` made it for another base.
    """
    ours = [c for c in claims if c.package == OURS]
    return ours or [c for c in claims if c.package != USER] or claims


def domain_names() -> list[str]:
    """Return the names of all domains, whether they load or not; nothing is imported."""
    return sorted({candidate.name for candidate in _candidates()})


def user_domain_names() -> list[str]:
    """Return the names of the user's domains; nothing is read."""
    return [candidate.name for candidate in _candidates() if candidate.package == USER]


def installed_packages(name: str) -> list[str]:
    """Return the distributions that claim a name, ours first; nothing is imported."""
    return [c.package for c in _candidates() if c.name == name and c.package != USER]


def _candidates() -> list[Listing]:
    """Return everything that claims to be a domain, importing nothing of it."""
    found = []
    for point in entry_points(group=GROUP):
        package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
        found.append(Listing(name=point.name, package=package, version=version, load=point.load))
    folder, entries = user_domains_folder(), list[str]()
    with contextlib.suppress(OSError, ValueError):  # no such folder yet, or no permission
        entries = os.listdir(folder)
    for name in entries:
        if os.path.isfile(folder / name / "domain.toml") or _is_closed(folder / name):
            found.append(Listing(name=name, package=USER, load=partial(user_domain, folder / name)))
    if (chosen := os.environ.get("E4T_DOMAINS")) is not None:
        names = {name.strip() for name in chosen.split(",")}
        found = [c for c in found if c.name in names or f"{c.package}:{c.name}" in names]
    return sorted(found, key=lambda c: (c.package != OURS, c.name, c.package))


def _is_closed(folder: Path) -> bool:
    """Whether a folder may not be looked into: it is listed with the reason, not passed over."""
    return not folder.name.startswith(".") and os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK)


def _load(candidate: Listing) -> Domain:
    """Import one domain and check it; E4TError if that fails in any way."""
    try:
        check_name(candidate.name)
        # What a plugin prints while it is imported must not mix with results on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            value = candidate.load()
        if not isinstance(value, Domain):
            raise TypeError(f"it is of type {type(value).__name__}, not Domain")
        if value.name != candidate.name:
            raise ValueError(f"its own name is {value.name!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin that calls sys.exit() must not end this program
        what = f"domain {printable(candidate.name)!r} from {printable(candidate.package)}"
        kind = "" if isinstance(error, E4TError) else f"{type(error).__name__}: "
        message = f"{what} did not load: {kind}{printable(str(error))}"
        raise E4TError(message, hint="E4T_DEBUG=1 shows the traceback") from error
    return value


def _normal(package: str) -> str:
    """Return a distribution name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def weights_folder(domain: Domain, base: str) -> Path:
    """Return the folder of the domain's weights for a base; WeightsUnavailable if there is none on this machine.

    A folder of the user with the domain's name serves a base for which the domain itself has no weights on this
    machine: `e4t pretrain` adds weights to an installed domain that way. IntegrityError if it cannot be read.
    """
    from e4t_cli.registry.manifest import MANIFEST_NAME

    location = domain.weights.get(base)
    for folder in _folders(location) if location else ():
        if os.path.isfile(folder / MANIFEST_NAME):
            return folder
    folder = user_domains_folder() / domain.name
    if os.path.isfile(folder / MANIFEST_NAME) and base in user_domain(folder).weights:
        return folder
    command = f"e4t pretrain --domain {domain.name} --base {base} --data FOLDER"
    if location is None:
        unpublished = time = ""
        if published := PUBLISHED.get(base):
            config = domain.pretraining or PretrainingConfig(steps=60_000)
            unpublished = ": nobody has published any"
            time = f" ({config.steps:,} steps, {format_hours(config, published.resolution)})"
        message = f"domain {domain.name!r} has no weights for the base {printable(base)!r}{unpublished}"
        raise WeightsUnavailable(message, hint=f"make them: {command}{time}")
    about = f"the weights of domain {domain.name!r} for {base} are"
    if is_remote(location):
        message = f"{about} on the hub ({printable(location.partition(':')[2])}) and not on this machine"
        raise WeightsUnavailable(message, hint=f"e4t fetch {domain.name} --base {base}")
    message = f"{about} not in this installation ({printable(location)})"
    raise WeightsUnavailable(message, hint=f"reinstall the package they come with, or make them: {command}")


def _folders(location: str) -> list[Path]:
    """Return the folders on this machine that a location can mean."""
    kind, _, rest = location.partition(":")
    if is_remote(location):
        folder = hub_weights_folder(location) if kind == "hub" else converted_weights_folder(location)
        return [folder] if folder is not None else []
    if kind != "package":
        return [Path(location)]
    package, *parts = rest.split("/")
    with contextlib.suppress(ImportError):
        if spec := find_spec(package):
            return [Path(root, *parts) for root in spec.submodule_search_locations or ()]
    return []
