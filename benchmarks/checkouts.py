"""Checks out another commit in a temporary folder, for as long as it is measured."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class NoCheckout(Exception):
    """There is no such commit, or nothing that git knows."""


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # In a session of its own: Ctrl-C goes to this program alone, which then removes what there is.
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, start_new_session=True)


def resolve(revision: str, root: Path = ROOT) -> str:
    """Return the commit of a revision.

    Raises:
        NoCheckout: `root` is no git checkout, it has no such commit, or the commit has no package `e4t_cli`.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
    except FileNotFoundError as error:
        raise NoCheckout("--against needs git, which is not installed") from error
    if top.returncode or Path(top.stdout.strip()).resolve() != root.resolve():
        raise NoCheckout(f"{root} is no git checkout: clone the repository to compare two commits")
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise NoCheckout(f"there is no commit {revision!r}: git log --oneline lists those there are")
    commit = found.stdout.strip()
    if _git(root, "cat-file", "-e", f"{commit}:src/e4t_cli/__init__.py").returncode:
        raise NoCheckout(f"{revision} has no src/e4t_cli: take a later commit")
    return commit


@contextmanager
def checkout(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """Check a commit out in a temporary folder; it is removed at the end, also by Ctrl-C."""
    place = Path(tempfile.mkdtemp(prefix="e4t-bench-"))
    folder = place / "checkout"
    try:
        with _uninterrupted():
            made = _git(root, "worktree", "add", "--detach", str(folder), commit)
        if made.returncode:
            raise NoCheckout(f"git worktree failed: {made.stderr.strip().splitlines()[-1]}")
        yield folder
    finally:
        with _uninterrupted():
            _git(root, "worktree", "remove", "--force", str(folder))
            shutil.rmtree(place, ignore_errors=True)
            _git(root, "worktree", "prune")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let signals wait until the end of a `with` block: half a worktree is one that git neither uses nor removes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
