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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from e4t_cli.errors import E4TError, ResourceError, UsageError, printable
from e4t_cli.progress import Progress, StopRequest

if TYPE_CHECKING:
    import typer
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.text import Text

# Between two plain lines of a stage PLAIN_SECONDS pass and PLAIN_SHARE of it is done, or PLAIN_MAX_SECONDS pass.
PLAIN_SECONDS, PLAIN_SHARE, PLAIN_MAX_SECONDS = 10.0, 0.1, 60.0
SHORT_LIST = 8  # entries of a list that is printed whole, not counted
LONG_STAGE = 10.0  # seconds after which a stage also shows its remaining time


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
        rich = self._live.console if self._live is not None else _rich_console()
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


# ── terminals, and the progress of stages ──


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream, which may be closed, is a terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # None or closed
        return False


def stderr_is_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"


def _can_ask() -> bool:
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def show_cursor() -> None:
    """Show the terminal's cursor again, in a signal handler that ends the process."""
    if stderr_is_terminal():
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h")


def plain_text(line: str, label: str = "", style: str = "") -> Text:
    """Return text that rich prints unchanged: no markup, no emoji codes."""
    from rich.text import Text

    return Text.assemble((label, style), line)


def _rich_console() -> RichConsole:
    """Return rich's console on stderr."""
    from rich.console import Console as RichConsole

    # rich still emits bold under NO_COLOR with FORCE_COLOR set, so colour is decided here.
    no_color = bool(os.environ.get("NO_COLOR"))
    return RichConsole(stderr=True, no_color=no_color, highlight=False, markup=False, emoji=False)


def live_display() -> RichProgress:
    """Return a display with a row for each stage: bar, count, time, and values such as the loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Remaining(TimeRemainingColumn):
        """The remaining time, of long stages only."""

        def render(self, task: Task) -> Text:
            if task.finished or (task.elapsed or 0) < LONG_STAGE or task.time_remaining is None:
                return Text("")
            return Text.assemble(super().render(task), " left")

    return RichProgress(
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
        TextColumn("{task.fields[values]}", markup=False),
        console=_rich_console(),
        redirect_stdout=False,  # rich would move stdout to stderr
        redirect_stderr=False,
        speed_estimate_period=300,  # seconds: some stages report once a minute
    )


class Rows:
    """A row of rich's display for each stage; `parts` also shows each part of a loss, and each step's own."""

    def __init__(self, display: RichProgress, *, parts: bool) -> None:
        self.display, self.parts = display, parts
        self.stages: dict[str, TaskID] = {}

    def show(self, event: Progress) -> None:
        """Update the row of the event's stage."""
        if event.stage not in self.stages:
            self.stages[event.stage] = self.display.add_task(printable(event.stage), values="")
        scale, unit = (1e-6, "MB  ") if event.unit == "bytes" else (1, "")
        if event.total and event.done < event.total and self.display.tasks[self.stages[event.stage]].finished:
            self.display.reset(self.stages[event.stage])  # the stage of the next photo
        self.display.update(
            self.stages[event.stage],
            completed=int(event.done * scale),
            total=int(event.total * scale) or None,
            values=unit + _shown_values(event, parts=self.parts),
        )


class Lines:
    """A few plain lines for each stage, where stderr is no terminal; `write` writes one to stderr."""

    def __init__(self, write: Callable[[str], None], *, parts: bool) -> None:
        self.write, self.parts = write, parts
        self.stage = ""
        self.finished: set[str] = set()
        self.shown_at = self.shown_share = 0.0

    def show(self, event: Progress) -> None:
        """Write a line, if one is due."""
        if not self._is_due(event):
            return
        counted = f" {event.done}/{event.total}" if event.total > 1 else ""
        if event.unit == "bytes":
            counted = f" {event.done / 1e6:.1f}/{event.total / 1e6:.1f} MB"
        values = _shown_values(event, parts=self.parts)
        self.write(printable(f"{event.stage}{counted} {values}".rstrip()))

    def _is_due(self, event: Progress) -> bool:
        now, share = time.monotonic(), event.done / max(event.total, 1)
        if event.stage != self.stage:
            self.stage = event.stage
        elif share < 1:
            waited, advanced = now - self.shown_at, share - self.shown_share
            if waited < PLAIN_SECONDS or (advanced < PLAIN_SHARE and waited < PLAIN_MAX_SECONDS):
                return False
        elif event.stage in self.finished:
            return False
        if share >= 1:
            self.finished.add(event.stage)
        self.shown_at, self.shown_share = now, share
        return share > 0 or event.total > 1  # a stage of one unit gets one line, its last


def _shown_values(event: Progress, *, parts: bool) -> str:
    shown = event.values
    if "loss" in shown and not parts:
        # The smoothed loss, which jumps less from step to step.
        speed = {"it/s": shown["it/s"]} if "it/s" in shown else {}
        shown = {"loss": shown.get("smoothed", shown["loss"]), **speed}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


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
