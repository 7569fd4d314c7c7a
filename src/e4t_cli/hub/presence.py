"""What there is of a base on this machine: only names of files and settings are looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from e4t_cli.bases import EMBEDDED, PUBLISHED, Base, find_base, read_base

from .addresses import Address, address_of
from .inventory import known_commit
from .layout import is_complete
from .places import snapshot_folder
from .towers import has_tower, missing_bytes


def is_here(wanted: str, *, half: bool = True, tower: bool = True) -> bool:
    """Whether a base could be used without a network; only names of files are looked at."""
    address = address_of(wanted)
    if address is None:
        return wanted in EMBEDDED or Path(wanted).is_dir()
    commit = known_commit(address.repository, address.revision)
    if commit is None:
        return False
    folder = snapshot_folder(address.repository, commit)
    own = (folder / "image_tower" / "model.safetensors").is_file()
    eye = not tower or own or has_tower() or not missing_bytes()
    return eye and is_complete(folder, half=half, safety=False)


def look_up_base(wanted: str, *, half: bool = True) -> tuple[str, int, bool]:
    """Return name, resolution (0: unknown) and whether it is here; nothing is fetched or asked.

    Raises:
        E4TError: as `find_base`, for what is not of the hub.
    """
    address = address_of(wanted)
    if address is None:
        base = find_base(wanted)
        return base.name, base.resolution, True
    row = PUBLISHED.get(address.name)
    resolution = row.resolution if row is not None else 0
    if not is_here(wanted, half=half):
        return address.name, resolution, False
    commit = known_commit(address.repository, address.revision)
    base = base_in(snapshot_folder(address.repository, commit or ""), address, half=half)
    return base.name, base.resolution, True


def base_in(folder: Path, address: Address, *, half: bool) -> Base:
    """Return the base in a snapshot folder, under the name that it has here."""
    base = read_base(folder)
    row = PUBLISHED.get(address.name)
    # A repository may name itself, but not take a name that means something here already.
    named = row is None and (folder / "base.toml").is_file()
    taken = base.name in EMBEDDED or base.name in PUBLISHED
    return replace(
        base,
        name=base.name if named and not taken else address.name,
        licence=address.licence or base.licence,
        revision=folder.name,
        identity=f"{address.repository}@{folder.name}",
        half=half,
        resolution=row.resolution if row is not None else base.resolution,
    )
