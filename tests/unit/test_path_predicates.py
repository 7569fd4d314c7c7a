"""Paths from outside are asked through `os.path`, whose predicates never raise, and errno has one translation."""

import ast
import errno
import os
from pathlib import Path

import pytest

from e4t_cli.errors import InputError, ResourceError, UsageError
from e4t_cli.files import file_error

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"exists", "is_file", "is_dir", "is_symlink", "is_fifo", "is_socket", "is_mount"}
# Members of an archive and entries of `os.scandir`, whose kind is known without a system call.
NOT_PATHS = {"member.is_dir", "entry.is_dir", "entry.is_file"}


def path_predicates(source: str) -> list[str]:
    """Return the calls of `Path.exists` and its kind: on Python 3.11 they raise for long names and closed folders."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = (ast.unparse(call) for call in calls if isinstance(call, ast.Attribute) and call.attr in FORBIDDEN)
    return [name for name in names if not name.startswith("os.path.") and name not in NOT_PATHS]


@pytest.mark.parametrize("folder", ["src", "domains"])
def test_no_path_predicate_that_raises(folder):
    found = {str(file.relative_to(ROOT)): path_predicates(file.read_text()) for file in (ROOT / folder).rglob("*.py")}
    assert {file: names for file, names in found.items() if names} == {}


def test_the_rule_finds_what_it_forbids():
    assert path_predicates("import os\nPath(x).exists(); p.is_file(); os.path.isdir(p); member.is_dir()") == [
        "Path(x).exists", "p.is_file",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "一" * 300])
def test_predicates_of_impossible_names_are_false(name):
    assert not os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)


@pytest.mark.parametrize(
    ("number", "reading", "kind"),
    [
        (errno.ENOSPC, False, ResourceError), (errno.EFBIG, False, ResourceError), (errno.ENOMEM, True, ResourceError),
        (errno.EACCES, False, UsageError), (errno.EROFS, False, UsageError), (errno.EACCES, True, InputError),
        (errno.EISDIR, False, UsageError), (errno.EISDIR, True, InputError), (errno.ENOENT, True, UsageError),
        (errno.ENAMETOOLONG, False, UsageError), (errno.ENOTDIR, False, UsageError), (errno.EIO, True, InputError),
    ],
)  # fmt: skip
def test_errno_becomes_a_code_and_a_sentence(number, reading, kind):
    error = file_error(OSError(number, os.strerror(number)), "out/me.png", reading=reading)
    assert type(error) is kind and "out/me.png" in error.message
    assert ("make room" in (error.hint or "")) == (number in (errno.ENOSPC, errno.EFBIG))
