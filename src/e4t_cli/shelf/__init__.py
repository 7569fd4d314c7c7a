"""The user's own shelf of domains: add, remove, begin and publish them.

What `e4t domains add`, `rm`, `new` and `push` do, for Python. Nothing here loads a model. What
comes from outside is looked at before it is believed, and appears on the shelf whole or not at all.

Every name is fetched from its module at first use, as at the front door.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adding import Added, add_domain
    from .publishing import Published, publish_domain
    from .removing import find_own_folder, remove_domain
    from .scaffold import new_domain
    from .weights import WeightsState, weights_state, weights_states

_HOME = {
    "Added": "adding",
    "Published": "publishing",
    "WeightsState": "weights",
    "add_domain": "adding",
    "find_own_folder": "removing",
    "new_domain": "scaffold",
    "publish_domain": "publishing",
    "remove_domain": "removing",
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
