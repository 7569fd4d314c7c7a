"""The user's own domains: folders that `e4t pretrain` and `e4t domains add` put on the shelf.

Finding domains: entry points and folders in, `Domain` values or reasons out.

Two steps: candidates are found by metadata alone; only what was asked for is imported. A domain
that is broken, of the wrong type, or whose name is claimed twice hurts only those who ask for it,
and is explained in the list. The domains of this very distribution are never shadowed.

`E4T_DOMAINS=face,cat` narrows what is considered (empty: nothing), for tests and for rescue.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from e4t_cli.errors import E4TError, UsageError, printable
from e4t_cli.registry.domain import Domain, check_name

USER = "user"
"""The package name shown for domains that are folders of the user."""


def user_domains_folder() -> Path:
    """Return the folder whose sub-folders are the user's domains."""
    from platformdirs import user_data_path

    return user_data_path("e4t", appauthor=False) / "domains"


def user_domain(folder: Path) -> Domain:
    """Return the domain that a folder made by `e4t pretrain` is.

    Raises:
        UsageError: there is no domain.toml in it.
        IntegrityError: its domain.toml is not one.
    """
    path = folder / "domain.toml"
    if not path.is_file():
        raise UsageError(
            f"{printable(str(folder))} is no domain: it has no domain.toml",
            hint="e4t domains list shows what is installed",
        )
    from e4t_cli.registry.manifest import (
        read_manifest,  # pydantic takes a tenth of a second to import
    )

    manifest = read_manifest(path)
    return Domain(
        name=manifest.name,
        descriptor=manifest.descriptor,
        tuning=manifest.tuning,
        pretraining=manifest.pretraining,
        weights={manifest.base: str(folder.resolve())},
        prompt_templates=tuple(manifest.templates),
        licence=manifest.licence,
        summary=f"pre-trained on {manifest.images:,} pictures" if manifest.images else "",
    )


GROUP = "e4t.domains"
OURS = "e4t"
"""The distribution whose domains cannot be shadowed."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One row of the list of domains.

    Args:
        name: the claimed name.
        package, version: the distribution it comes from; "user" and "" for the user's folders.
        domain: the value, or None if it did not load.
        reason: why the bare name does not give this domain; None if it does.
    """

    name: str
    package: str
    version: str = ""
    domain: Domain | None = None
    reason: str | None = None

    @property
    def reference(self) -> str:
        """The spelling that means this row even if another claims its name."""
        return f"{self.package}:{self.name}"


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    name: str
    package: str
    version: str
    load: Callable[[], object]


def installed_domains() -> list[Listing]:
    """Return every domain on this machine, loaded or with the reason why not."""
    found = _candidates()
    rows = []
    for candidate in found:
        domain: Domain | None = None
        reason: str | None = None
        try:
            domain = _load(candidate)
        except E4TError as error:
            reason = f"did not load: {error.message.partition(' did not load: ')[2]}"
        claims = [c for c in found if c.name == candidate.name]
        rivals = [c for c in _claimants(claims) if c is not candidate]
        if rivals and reason is None and candidate.package != OURS:
            others = ", ".join(sorted(rival.package for rival in rivals))
            reason = f"its name is also claimed by {others}"
            if candidate.package == USER:
                reason = f"its weights serve the domain of {others}"
            reason += f"; ask for it as {candidate.package}:{candidate.name}"
        rows.append(
            Listing(
                name=candidate.name,
                package=candidate.package,
                version=candidate.version,
                domain=domain,
                reason=reason,
            )
        )
    return rows


def find_domain(name: str) -> Domain:
    """Return the domain of that name; nothing else is imported.

    Args:
        name: "face", or "package:face" where two packages claim the name, or the path of a
            folder with a domain.toml.

    Raises:
        UsageError: there is none of that name, or there are two.
        E4TError: there is, but it did not load; the cause is chained.
    """
    domain = find_listing(name).domain
    assert domain is not None
    return domain


def find_listing(name: str) -> Listing:
    """Return the domain of that name with the package that it comes from.

    Raises:
        E4TError: as `find_domain`.
    """
    shown = printable(name)
    if "/" in name or os.sep in name:
        if not Path(name).is_dir():
            raise UsageError(f"there is no folder {shown}")
        domain = user_domain(Path(name))
        return Listing(name=domain.name, package=USER, domain=domain)
    package, _, bare = name.rpartition(":")
    found = _candidates()
    claims = [c for c in found if c.name == bare and package in ("", c.package)]
    if package and not claims:
        claims = [c for c in found if c.name == bare and _plain(c.package) == _plain(package)]
    claims = _claimants(claims)
    if not claims:
        near = difflib.get_close_matches(bare, [c.name for c in found], n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"no domain {shown!r} is installed", hint=f"{guess}e4t domains list shows them all"
        )
    if len(claims) > 1:
        packages = " and ".join(sorted(c.package for c in claims))
        raise UsageError(
            f"domain {shown!r} is claimed by {packages}",
            hint=f"say which: {claims[0].package}:{bare}",
        )
    chosen = claims[0]
    domain = _load(chosen)
    return Listing(name=bare, package=chosen.package, version=chosen.version, domain=domain)


def _claimants(claims: list[_Candidate]) -> list[_Candidate]:
    """Return those of one name that the bare name can mean.

    Ours are never shadowed. A folder of the user's is no rival of an installed domain but serves
    it with weights (`weights_folder`): it is what `e4t pretrain` made for a base of their own.
    """
    ours = [c for c in claims if c.package == OURS]
    return ours or [c for c in claims if c.package != USER] or claims


def claimed_names() -> list[str]:
    """Return the names of all domains, sound or broken; nothing is imported."""
    return sorted({candidate.name for candidate in _candidates()})


def own_names() -> list[str]:
    """Return the names of the user's own domains; nothing is read."""
    return [candidate.name for candidate in _candidates() if candidate.package == USER]


def installed_packages(name: str) -> list[str]:
    """Return the distributions that claim a name, ours first; nothing is imported."""
    return [c.package for c in _candidates() if c.name == name and c.package != USER]


def _candidates() -> list[_Candidate]:
    """Find everything that claims to be a domain, importing nothing of it."""
    found = [
        _Candidate(
            name=point.name,
            package=point.dist.name if point.dist else "unknown",
            version=point.dist.version if point.dist else "",
            load=point.load,
        )
        for point in entry_points(group=GROUP)
    ]
    with contextlib.suppress(OSError):  # no such folder yet, or no right to look into it
        found += [
            _Candidate(name=path.parent.name, package=USER, version="", load=_loader(path.parent))
            for path in user_domains_folder().glob("*/domain.toml")
        ]
    chosen = os.environ.get("E4T_DOMAINS")
    if chosen is not None:
        names = {name.strip() for name in chosen.split(",")}
        found = [c for c in found if c.name in names or f"{c.package}:{c.name}" in names]
    return sorted(found, key=lambda c: (c.package != OURS, c.name, c.package))


def _loader(folder: Path) -> Callable[[], object]:
    return lambda: user_domain(folder)


def _load(candidate: _Candidate) -> Domain:
    """Import one domain and check it.

    Raises:
        E4TError: whatever happened, in one sentence that names the package.
    """
    try:
        check_name(candidate.name)
        # What a plugin prints while it is imported must not mix with results on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            value = candidate.load()
        if not isinstance(value, Domain):
            raise TypeError(f"it is of type {type(value).__name__}, not Domain")
        if value.name != candidate.name:
            raise ValueError(f"it calls itself {value.name!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin that calls sys.exit() must not end this program
        kind = "" if isinstance(error, E4TError) else f"{type(error).__name__}: "
        raise E4TError(
            f"domain {printable(candidate.name)!r} from {printable(candidate.package)} "
            f"did not load: {kind}{printable(str(error))}",
            hint="E4T_DEBUG=1 shows the traceback",
        ) from error
    return value


def _plain(package: str) -> str:
    """Return a distribution name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()
