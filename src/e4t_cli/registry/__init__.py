"""Domains: the contract, discovery by entry points, and the store of the user's own domains.

The names below are what `e4t domains add`, `rm`, `new` and `push` do, for Python, each imported at
its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .publish import Published, publish_domain
    from .scaffold import new_domain
    from .store import Added, add_domain, find_own_folder, remove_domain
    from .weights import WeightsState, weights_state, weights_states

_HOME = {
    "Added": "store",
    "Published": "publish",
    "WeightsState": "weights",
    "add_domain": "store",
    "find_own_folder": "store",
    "new_domain": "scaffold",
    "publish_domain": "publish",
    "remove_domain": "store",
    "weights_state": "weights",
    "weights_states": "weights",
}

__all__ = [
    "Added",
    "Published",
    "WeightsState",
    "add_domain",
    "find_own_folder",
    "new_domain",
    "publish_domain",
    "remove_domain",
    "weights_state",
    "weights_states",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
