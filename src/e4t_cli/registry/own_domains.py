"""The user's own domains: folders that `e4t pretrain` and `e4t domains add` put on the shelf."""

from __future__ import annotations

from pathlib import Path

from e4t_cli.domain import Domain
from e4t_cli.errors import UsageError, printable

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
    from e4t_cli.manifest import read_manifest  # pydantic takes a tenth of a second to import

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
