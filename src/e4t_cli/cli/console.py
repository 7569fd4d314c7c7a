"""Prints: products on stdout, everything else on stderr.

stdout has only what was asked for (one path a line, or one JSON object a line), so that a command
can stand in a pipe. Progress, notes, warnings and errors go to stderr: one live display on a
terminal, a few plain lines elsewhere, nothing with ``-q``. Text from outside (prompts, file names,
manifests) is printed with its control characters escaped, and never read as markup.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e4t_cli.cli.progress import Lines, Rows, is_terminal, live_display, plain_text, rich_console, stderr_is_terminal
from e4t_cli.errors import E4TError, UsageError, printable
from e4t_cli.progress import Progress, StopRequest

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Console:
    """The output of one command.

    Args:
        quiet: stderr keeps errors only.
        json: products and errors are JSON, one object a line.
        verbose: 1 adds details, 2 also the traceback of an unexpected error.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False, verbose: int = 0) -> None:
        self.quiet = quiet
        self.json = json
        self.verbose = verbose
        self.saved = 0
        self.resume_hint = ""  # what to type after an interrupt
        self.stop: StopRequest | None = None  # of work that saves a checkpoint before it ends
        self._live: RichProgress | None = None

    # ── stdout ──

    def product(self, line: str, record: Mapping[str, Any]) -> None:
        """Print one thing that was asked for: the line, or with ``--json`` the record."""
        self.saved += 1
        text = json.dumps({"schema": 1, **record}) if self.json else line
        if self._live is not None and is_terminal(sys.stdout):
            # Both streams are one screen: rich prints above its display.
            self._live.console.print(plain_text(text), soft_wrap=True)
        else:
            write_stdout(text)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print aligned columns; the last one is never padded."""
        cells = [[printable(cell) for cell in row] for row in [headings, *rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
        for row in cells:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            write_stdout("  ".join(padded).rstrip())

    def details(self, title: str, about: Mapping[str, Any]) -> None:
        """Print a mapping: a line for each entry, or one JSON object."""
        if self.json:
            write_stdout(json.dumps({"schema": 1, **about}))
        else:
            rows = [(name, _as_text(value)) for name, value in about.items()]
            self.table((title, ""), [row for row in rows if row[1]])

    # ── stderr ──

    def ask(self, question: str) -> bool:
        """Ask a yes-or-no question; without a terminal the answer is no."""
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            return False
        if self._live is not None:
            self._live.stop()  # a live display would overwrite the answer
        try:
            self._write_stderr(printable(question, limit=2000) + " [y/N]")
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        finally:
            if self._live is not None:
                self._live.start()

    def confirm(self, yes: bool, question: str, *, verb: str = "remove") -> None:
        """Ask before something is removed or uploaded, unless ``-y`` was given.

        Raises:
            UsageError: the answer is no.
        """
        if not yes and not self.ask(question):
            done = f"{verb}d" if verb.endswith("e") else f"{verb}ed"
            raise UsageError(f"nothing was {done}", hint=f"-y {verb}s without asking")

    def consent(self, given: bool) -> bool | Callable[[str], bool]:
        """Return `accept_license` for the library: whether it was given, or a way to ask."""
        return given or (self.ask if is_terminal(sys.stdin) and is_terminal(sys.stderr) else False)

    def note(self, text: str) -> None:
        """Print something that is good to know."""
        if not self.quiet and not self.json:
            self._print("", text)

    def detail(self, text: str) -> None:
        """Print something for ``-v``."""
        if self.verbose:
            self.note(text)

    def warning(self, text: str) -> None:
        """Print something that may not be what the user meant."""
        if self.quiet:
            return
        if self.json:
            self._write_stderr(json.dumps({"warning": {"message": text}}))
        else:
            self._print("warning: ", text, style="yellow")

    def error(self, error: E4TError) -> None:
        """Print an error and its hint, also with ``-q``."""
        message, hint = str(error), error.hint
        if self.json:
            body = {"code": error.code, "message": message, "hint": hint, "exit": error.exit_code}
            self._write_stderr(json.dumps({"error": body}))
            return
        self._print("error: ", message, style="bold red")
        if hint:
            self._print("", hint)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None]]:
        """Yield the `on_progress` callback; the display is shown inside the context."""
        if self.quiet or (self.json and not stderr_is_terminal()):
            yield self._shown(None)
        elif stderr_is_terminal():
            with live_display() as display:
                self._live = display
                try:
                    yield self._shown(Rows(display, parts=bool(self.verbose)))
                finally:
                    self._live = None
        else:
            yield self._shown(Lines(self._write_stderr, parts=bool(self.verbose)))

    def _shown(self, view: Rows | Lines | None) -> Callable[[Progress], None]:
        """Return the callback, which prints texts and shows counts and values in the view."""

        def show(event: Progress) -> None:
            if event.note:
                self.warning(event.note)
            if event.remark:
                self.note(event.remark)
            if event.detail:
                self.detail(event.detail)
            text = event.note or event.remark or event.detail
            if view is not None and (event.total or not text):
                view.show(event)

        return show

    def _print(self, label: str, text: str, *, style: str = "") -> None:
        line = printable(text, limit=2000)
        if self._live is None and not stderr_is_terminal():
            self._write_stderr(label + line)
            return
        rich = self._live.console if self._live is not None else rich_console()
        rich.print(plain_text(line, label, style), soft_wrap=True)

    def _write_stderr(self, line: str) -> None:
        if sys.stderr is not None:  # `2>&-`; print(file=None) would fall back to stdout
            with contextlib.suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_as_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return f"{len(value)}"
    return {"True": "yes", "False": "no", "None": ""}.get(str(value), str(value))


def write_stdout(line: str) -> None:
    """Write one line to stdout, and flush it.

    File names need not be text: where the stream cannot encode one, its raw bytes are written.

    Raises:
        BrokenPipeError: the reader has ended (``| head -1``); handled in app.py.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(line + "\n")
    except UnicodeEncodeError:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(line) + b"\n")
    sys.stdout.flush()


_current = Console()


def current() -> Console:
    """Return the console of the running command."""
    return _current


def start(*, quiet: bool = False, json: bool = False, verbose: int = 0) -> Console:
    """Set and return the console of this command; -vv also enables the libraries' logs."""
    global _current
    _current = Console(quiet=quiet, json=json, verbose=verbose)
    if verbose >= 2:
        logging.basicConfig(level=logging.DEBUG, force=True)
        warnings.simplefilter("default")
    return _current
