"""A concept for other programs: a plain Stable Diffusion that knows one more word."""

from .fixed_word import FixedWord, fixed_word
from .folder import write_folder

__all__ = ["FixedWord", "fixed_word", "write_folder"]
