"""Where the pictures of a domain come from: a folder, tar shards, a dataset, or a Python iterable.

Two kinds of source. A `Listed` one knows its pictures by number and gives any of them at any time;
a `Streamed` one (shards, a generator) can only be read from its beginning. Nothing is opened here
before it is asked for: an `Item` is a name and a way to its bytes, and `Preparation` opens it with
the code that opens the photo of `e4t personalize`.
"""

from .finding import Generated, Listed, Source, Streamed, find_source
from .held_out import hold_out
from .items import Item
from .preparation import Preparation

__all__ = [
    "Generated",
    "Item",
    "Listed",
    "Preparation",
    "Source",
    "Streamed",
    "find_source",
    "hold_out",
]
