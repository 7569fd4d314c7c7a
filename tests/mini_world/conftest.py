"""Shared fixtures of the mini world: some drawings, and the shipped judge."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def drawings():
    """Two hundred drawings of every kind, in pairs of one identity."""
    from mini_world.world import sample

    return [sample(index, seed=41) for index in range(200)]


@pytest.fixture
def judge(monkeypatch):
    """The judge as it is shipped; a test that needs it fails where it is missing."""
    from mini_world.stages import load_judge

    monkeypatch.chdir(ROOT)
    return load_judge()
