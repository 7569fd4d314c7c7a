"""A concept for other programs: a plain Stable Diffusion that knows one more word."""

from .fixed_word import FixedWord, fixed_word
from .folder import check_token, write_folder
from .lora import check_rank, write_lora
from .pair import check_pair, word_path
from .single_file import check_single_file, write_single_file

__all__ = [
    "FixedWord",
    "check_pair",
    "check_rank",
    "check_single_file",
    "check_token",
    "fixed_word",
    "word_path",
    "write_folder",
    "write_lora",
    "write_single_file",
]
