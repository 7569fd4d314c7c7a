"""Weights of another program on the hub, which a domain names: fetched, converted once, used."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from e4t_cli.api.foreign import wish_for
from e4t_cli.domain import Domain
from e4t_cli.e4t_diffusion import convert, read_checkpoint
from e4t_cli.errors import IntegrityError, WeightsUnavailable, printable
from e4t_cli.files import sha256_of
from e4t_cli.hub.access import Access
from e4t_cli.hub.converted import converted_folder, foreign_repository, place_of_converted
from e4t_cli.hub.fetching import fetch_files
from e4t_cli.hub.inventory import known_commit, remembered, take_inventory
from e4t_cli.hub.licences import Terms, accept
from e4t_cli.manifest import read_manifest

FILES = ("config.json", "encoder.pt", "weight_offsets.pt")
UNSTATED = (
    "no licence is stated; the face weights were trained on FFHQ and CelebA-HQ, which are for "
    "non-commercial research"
)


def provide_converted(
    domain: Domain, base: str, location: str, access: Access, *, repair: bool = False
) -> Path:
    """Return a domain's pack that is made from a checkpoint of the hub; made now if need be.

    Args:
        domain: for its recipes and sentences.
        base: its name.
        location: "e4t-diffusion:owner/name", from `Domain.weights`.
        access: how the hub may be used.
        repair: read the whole pack, and make it again if it is damaged.

    Raises:
        WeightsUnavailable: not here, and it cannot be fetched, or its licence is not accepted.
        IntegrityError: what was fetched is not a checkpoint.
        ResourceError: the disk has no room.
    """
    ready = converted_folder(location)
    if ready is not None:
        if not repair or is_whole(ready):
            return ready
        access.note(f"the converted weights of {domain.name} are damaged: making them again")
        shutil.rmtree(ready)
    repository = foreign_repository(location)
    if repository is None:
        raise WeightsUnavailable(f"{printable(location)!r} is no place of weights")
    inventory = take_inventory(repository, None, access)
    licence = inventory.licence if inventory is not None else ""
    known = known_commit(repository, None)
    if inventory is None and known is None:
        raise WeightsUnavailable(
            f"the weights of domain {domain.name!r} for {base} are not on this machine, "
            "and e4t is offline",
            hint=f"with a network: e4t fetch {domain.name} --base {base}",
        )
    accept(Terms(repository=repository, licence=licence, note=UNSTATED), access)
    folder = fetch_files(
        repository,
        None,
        FILES,
        on_progress=access.on_progress,
        offline=access.offline,
        repair=repair,
        advice=f"e4t fetch {domain.name} --base {base}",
    )
    checkpoint = read_checkpoint(folder)
    declared = remembered(repository, folder.name)
    digests = {file.path: file.digest for file in declared.files} if declared else {}
    wish = replace(
        wish_for(checkpoint, domain, domain.name, base),
        licence=licence or UNSTATED,
        sha256={name: digests[name] for name in FILES if len(digests.get(name, "")) == 64},
        notes=f"From {repository} at {folder.name}.",
    )
    target = place_of_converted(repository, folder.name)
    report = convert(wish, target, access.on_progress)
    access.remark(report.sentence())
    return target


def is_whole(folder: Path) -> bool:
    """Read a pack, and compare every file with its card."""
    try:
        card = read_manifest(folder / "domain.toml")
        return all(sha256_of(folder / name) == digest for name, digest in card.files.items())
    except (IntegrityError, OSError):
        return False
