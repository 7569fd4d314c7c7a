"""Domains: the contract, discovery by entry points, and the store of the user's domains.

The names below are what `e4t domains add`, `rm`, `new` and `push` do, for Python. Each is imported at its first use: a
module that needs only `registry.domain` does not pay for pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .publish import PublishedDomain as PublishedDomain
    from .publish import publish_domain as publish_domain
    from .scaffold import new_domain as new_domain
    from .store import AddedDomain as AddedDomain
    from .store import add_domain as add_domain
    from .store import remove_domain as remove_domain

_MODULES = {
    "publish": ("PublishedDomain", "publish_domain"),
    "scaffold": ("new_domain",),
    "store": ("AddedDomain", "add_domain", "remove_domain"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
