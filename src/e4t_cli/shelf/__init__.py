"""The user's own shelf of domains: add, remove, begin and publish them.

What `e4t domains add`, `rm`, `new` and `push` do, for Python. Nothing here loads a model. What
comes from outside is looked at before it is believed, and appears on the shelf whole or not at all.
"""

from e4t_cli.shelf.adding import Added, add_domain
from e4t_cli.shelf.publishing import Published, publish_domain
from e4t_cli.shelf.removing import find_own_folder, remove_domain
from e4t_cli.shelf.scaffold import new_domain
from e4t_cli.shelf.weights import WeightsState, weights_state, weights_states

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
