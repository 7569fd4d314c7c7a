"""What a base is and knows, for `e4t info mini`. No weights are loaded, and no network is used."""

from __future__ import annotations

import os
from typing import Any

from e4t_cli.files import shown_size
from e4t_cli.hub.bases import EMBEDDED, PUBLISHED, find_base
from e4t_cli.hub.resolve import look_up_base
from e4t_cli.hub.vocabulary import OTHER, read_vocabulary


def as_text(about: dict[str, Any]) -> dict[str, Any]:
    """Return the details for display, with the size in decimal units."""
    shown = {**about, "size": shown_size(about["bytes"])} if "bytes" in about else about
    return {
        key.replace("_", " "): ", ".join(value) if isinstance(value, list) else value
        for key, value in shown.items()
        if key != "bytes"
    }


def base_details(name: str) -> dict[str, Any] | None:
    """Return what is known about an embedded or published base; None for a name of something else.

    Raises:
        E4TError: the base is damaged.
    """
    if name in PUBLISHED:
        row = PUBLISHED[name]
        _, resolution, here = look_up_base(name)
        return {
            "type": "base", "name": name, "resolution": resolution, "repository": row.repository,
            "revision": row.revision, "licence": row.licence, "knows": "photographs, art and drawings",
            "on_this_machine": here, "fetched_by": row.fetch_command,
        }  # fmt: skip
    if name not in EMBEDDED:
        return None
    base = find_base(name)
    size = sum(os.path.getsize(path) for path in base.folder.rglob("*.*"))
    groups = read_vocabulary(base.folder) or {}
    return {
        "type": "base", "name": name, "resolution": base.resolution, "licence": base.licence,
        "revision": base.revision, "guidance": base.guidance, "bytes": size,
        "knows": "photographs and drawings" if base.drawing_limits is None else "drawings only",
        **{group.replace(" ", "_"): phrases for group, phrases in groups.items() if group != OTHER},
    }  # fmt: skip
