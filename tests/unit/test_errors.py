"""Errors: stable exit codes and messages of one sentence."""

import pickle

import pytest

from e4t_cli import errors
from e4t_cli.errors import E4TError, printable

CODES = {
    "E4TError": 1,
    "UsageError": 2,
    "InputError": 3,
    "WeightsUnavailable": 4,
    "IntegrityError": 5,
    "ResourceError": 6,
    "DivergedError": 7,
    "PartialResult": 8,
}


def test_exit_codes_are_never_renumbered():
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, E4TError)
    }
    assert found == CODES
    words = [getattr(errors, name).code for name in CODES]
    assert len(set(words)) == len(words)


def test_message_and_hint_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(errors.InputError("too small", hint="scale it")))
    assert (type(error), str(error), error.hint) == (errors.InputError, "too small", "scale it")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand tab", "two lines and tab"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("right\u202eleft", "right\\u202eleft"),
        ("é 猫", "é 猫"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable_disarms_terminals(text, shown):
    assert printable(text) == shown


def test_printable_is_bounded():
    assert len(printable("x" * 10_000)) == 400
