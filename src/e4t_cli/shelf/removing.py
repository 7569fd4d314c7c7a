"""Removing one of the user's own domains; what a package brought, its package manager removes."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from e4t_cli.errors import UsageError, printable
from e4t_cli.names import check_name
from e4t_cli.registry import USER, installed_packages, user_domains_folder

REMOVING = ".removing-"
"""Begins the names of folders that are on their way out."""


def find_own_folder(name: str) -> Path:
    """Return the folder of one of the user's own domains, sound or broken.

    Args:
        name: "my_dogs" or "user:my_dogs".

    Raises:
        UsageError: there is none of that name; the hint says who does have it.
    """
    shown, bare = printable(name), name.removeprefix(f"{USER}:")
    try:
        folder = user_domains_folder() / check_name(bare)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if os.path.lexists(folder):
        return folder
    packages = installed_packages(bare)
    if packages:
        raise UsageError(
            f"the domain {shown!r} is not your own: it comes with {' and '.join(packages)}",
            hint=f"pip uninstall {packages[0]}",
        )
    raise UsageError(
        f"there is no domain {shown!r} among your own", hint="e4t domains list shows them all"
    )


def remove_domain(name: str) -> Path:
    """Remove one of the user's own domains.

    Returns:
        The folder that is gone.

    Raises:
        UsageError: there is none of that name, or it may not be removed.
    """
    folder = find_own_folder(name)
    try:
        if folder.is_symlink():
            folder.unlink()  # the folder it leads to is somebody's, but not the shelf's
            return folder
        # First the name goes, in one step: an interrupt leaves no half domain in the list.
        leaving = folder.with_name(f"{REMOVING}{secrets.token_hex(6)}")
        leaving.mkdir()
        folder.rename(leaving / "pack")
        shutil.rmtree(leaving)
    except OSError as error:
        raise UsageError(f"{printable(str(folder))} cannot be removed: {error.strerror}") from error
    return folder
