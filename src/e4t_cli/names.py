"""What may be a name: of a domain, of a file in a pack, of a place of weights.

Names come from plugins, cards and command lines, and become folders and addresses; here is decided
which are safe to. Every check returns what it was given.
"""

from __future__ import annotations

import re

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Device names that Windows keeps for itself, whatever the folder.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10)}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.(safetensors|json)")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Of the hub: owner/name."""
_HUB_LOCATION = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def check_name(name: object, what: str = "domain name") -> str:
    """Return `name` if it can safely be a file name and a command-line word.

    Raises:
        ValueError: it is anything but `[a-z0-9][a-z0-9_-]*`, 64 characters at most.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or name in _RESERVED:
        raise ValueError(
            f"{what} {name!r} must be 1 to 64 of a-z, 0-9, '-' and '_', "
            "start with a letter or a digit, and not be a reserved device name"
        )
    return name


def check_file_name(name: object) -> str:
    """Return `name` if a pack may have a file of that name.

    Raises:
        ValueError: it could leave the pack's folder, or is of a kind that can hold code: packs
            are safetensors and JSON, never pickles.
    """
    plain = isinstance(name, str) and _FILE_NAME.fullmatch(name)
    if not plain or str(name).partition(".")[0].lower() in _RESERVED:
        raise ValueError(
            f"file name {name!r} must be a plain name that ends in .safetensors or .json"
        )
    return str(name)


def check_which(which: object) -> str:
    """Return `which` if it says which of several subjects is meant.

    Raises:
        ValueError: it is none of "largest", "left", "right", or a whole number from 1 on.
    """
    if which in ("largest", "left", "right") or re.fullmatch(r"[1-9]\d{0,3}", str(which)):
        return str(which)
    raise ValueError(f"{which!r} must be largest, left, right, or a number: 1 is the leftmost")


def check_location(location: object) -> str:
    """Return `location` if it is a well-formed place of weights (see `Domain.weights`).

    Raises:
        ValueError: it is empty, climbs out of its package, or names no exact hub commit.
    """
    if not isinstance(location, str) or not location.strip() or "\0" in location:
        raise ValueError(f"a place of weights must be text, not {location!r}")
    kind, _, rest = location.partition(":")
    if kind == "package":
        package, *parts = rest.split("/")
        proper = all(part not in ("", ".", "..") and "\\" not in part for part in parts)
        if not all(word.isidentifier() for word in package.split(".")) or not proper:
            raise ValueError(f"{location!r} must look like 'package:my_package/folder'")
    elif kind == "hub" and not _HUB_LOCATION.fullmatch(rest):
        raise ValueError(f"{location!r} must look like 'hub:owner/repo@<40-hex commit>'")
    elif kind == "e4t-diffusion" and not REPOSITORY.fullmatch(rest):
        raise ValueError(f"{location!r} must look like 'e4t-diffusion:owner/repo'")
    return location


def is_remote(location: str) -> bool:
    """Whether a well-formed place of weights is on the hub."""
    return location.partition(":")[0] in ("hub", "e4t-diffusion")
