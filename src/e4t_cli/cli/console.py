"""Prints: products on stdout, everything else on stderr.

stdout has only what was asked for (one path a line, or one JSON object a line), so that a command can stand in a pipe.
Progress, notes, warnings and errors go to stderr: rich's live bars on a terminal, a few plain lines elsewhere, nothing
with ``-q``. Text from outside (prompts, file names, manifests) is printed with its control characters escaped, and
never read as markup.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e4t_cli.cli.terminal import Lines, Rows, is_terminal, live_display, plain_text, rich_console, stderr_is_terminal
from e4t_cli.errors import E4TError, ResourceError, UsageError, printable
from e4t_cli.progress import Progress, StopRequest

if TYPE_CHECKING:
    import typer
    from rich.progress import Progress as RichProgress

SHORT_LIST = 8  # entries of a list that is printed whole, not counted


class ReaderEnded(Exception):  # not an OSError, which Typer would turn into an exit with code 1
    """Nobody reads stdout any more."""


class Console:
    """The output of one command; `verbose` 1 adds details, 2 also the traceback of an unexpected error."""

    def __init__(self, *, quiet: bool = False, json: bool = False, verbose: int = 0) -> None:
        self.quiet, self.json, self.verbose = quiet, json, verbose
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
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            write_stdout("  ".join(map(str.ljust, row, widths)).rstrip())

    def details(self, title: str, about: Mapping[str, Any]) -> None:
        """Print a mapping: a line for each entry, or one JSON object; its keys are in snake case."""
        if self.json:
            write_stdout(json.dumps({"schema": 1, **about}))
        else:
            rows = [(name.replace("_", " "), _as_text(value)) for name, value in about.items()]
            self.table((title, ""), [row for row in rows if row[1]])

    # ── stderr ──

    def ask(self, question: str) -> bool:
        """Ask a yes-or-no question; without a terminal the answer is no."""
        if not _can_ask():
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
        """Ask before something is removed or uploaded, unless ``-y`` was given; `UsageError` if the answer is no."""
        if not yes and not self.ask(question):
            raise UsageError(f"nothing was {verb.removesuffix('e')}ed", hint=f"-y {verb}s without asking")

    def consent(self, given: bool) -> bool | Callable[[str], bool]:
        """Return `accept_license` for the library: whether it was given, or a way to ask."""
        return given or (self.ask if _can_ask() else False)

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
        if self.json and not self.quiet:
            self._write_stderr(json.dumps({"warning": {"message": text}}))
        elif not self.quiet:
            self._print("warning: ", text, style="yellow")

    def error(self, error: E4TError) -> None:
        """Print an error and its hint, also with ``-q``."""
        if self.json:
            body = {"code": error.code, "message": str(error), "hint": error.hint, "exit": error.exit_code}
            return self._write_stderr(json.dumps({"error": body}))
        self._print("error: ", str(error), style="bold red")
        return self._print("", error.hint) if error.hint else None

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
        size = [f"{value['width']}×{value['height']}"] if {"width", "height"} <= value.keys() else []
        others = {name: one for name, one in value.items() if not size or name not in ("width", "height")}
        return ", ".join(size + [f"{name} {_as_text(one)}" for name, one in others.items()])
    if isinstance(value, list):
        short = len(value) <= SHORT_LIST and not any(isinstance(one, Mapping | list) for one in value)
        return ", ".join(map(str, value)) if short else f"{len(value)}"
    return {"True": "yes", "False": "no", "None": ""}.get(str(value), str(value))


def write_stdout(line: str) -> None:
    """Write one line to stdout, and flush it.

    File names need not be text: where the stream cannot encode one, its raw bytes are written. A stdout that was
    closed by the caller (``>&-``) takes nothing.

    Raises:
        ReaderEnded: as in ``| head -1``; handled in app.py.
        ResourceError: the file or device that it goes to takes no more; nothing is written from then on.
    """
    if sys.stdout is None:
        return
    try:
        try:
            sys.stdout.write(line + "\n")
        except UnicodeEncodeError:
            sys.stdout.flush()
            sys.stdout.buffer.write(_raw(line) + b"\n")
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        raise ReaderEnded from None
    except OSError as error:
        raise stdout_failed(error) from error


def show_help(context: typer.Context) -> None:
    """Print the help of a group of commands that was called without one."""
    if context.invoked_subcommand is None:
        write_stdout(context.get_help())


def _raw(line: str) -> bytes:
    try:
        return os.fsencode(line)
    except UnicodeEncodeError:  # file names are ASCII, where PYTHONUTF8=0 and LC_ALL=C are set
        return line.encode("ascii", "backslashreplace")


def discard_stdout() -> None:
    """Send what is buffered, and all that follows, nowhere: Python flushes stdout once more at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stdout_failed(error: OSError) -> E4TError:
    """Return the error for a stdout that takes no more; what follows is discarded."""
    discard_stdout()
    hint = "make room, or send it elsewhere" if error.errno == errno.ENOSPC else "send it elsewhere"
    return ResourceError(f"stdout cannot be written: {error.strerror or error}", hint=f"{hint}; files stay")


def _can_ask() -> bool:
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


# ── the running command's ──

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
