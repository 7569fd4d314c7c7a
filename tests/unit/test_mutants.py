"""The faults of the mutation check still apply to the code: `make mutants` runs them."""

import ast
import shutil

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_it_applies(mutant, tmp_path):
    source = ROOT / "src" / "e4t_cli" / mutant.module
    copy = tmp_path / "src" / "e4t_cli" / mutant.module
    copy.parent.mkdir(parents=True)
    shutil.copy(source, copy)
    mutant.apply(tmp_path)
    ast.parse(copy.read_text(encoding="utf-8"))
    assert copy.read_text(encoding="utf-8") != source.read_text(encoding="utf-8")
    for word in mutant.tests.split():
        assert not word.endswith(".py") or (ROOT / "tests" / word).is_file()


def test_there_are_enough_of_them():
    assert len({(one.module, one.old, one.new) for one in MUTANTS}) == len(MUTANTS) >= 25
