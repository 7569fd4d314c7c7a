"""One run of the library: a loaded base and pack, the clock, and what the user should know."""

from .records import choose_sampling
from .work import Session

__all__ = ["Session", "choose_sampling"]
