"""Assembles the commands, and maps every way of ending to an error message and an exit code.

0 done · 1 unexpected · 2 to 8 the errors in errors.py · 130 interrupted · 141 the reader of stdout ended ·
143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, NoReturn, get_origin, get_type_hints

import typer

from e4t_cli import __version__
from e4t_cli.cli import (
    batch,
    cache,
    console,
    doctor,
    domains,
    export,
    faces,
    info,
    lazy_packages,
    personalize,
    pretrain,
)
from e4t_cli.cli.photo_arguments import PhotoCommand
from e4t_cli.cli.terminal import show_cursor
from e4t_cli.errors import E4TError, ResourceError, UsageError
from e4t_cli.files import file_error
from e4t_cli.system_memory import memory_ran_out, out_of_memory
from e4t_cli.threads import set_waiting

READER_ENDED = 141  # 128 + SIGPIPE: the signal would end other tools there, as in `e4t … | head -1`
SURROUNDINGS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="e4t",
    help="From one photo, a text-to-image model learns a face, a cat or a style.",
    epilog="Documents of the project: docs/commands.md, docs/python.md, domains/README.md.",
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
app.command("personalize", cls=PhotoCommand, epilog=personalize.EXAMPLES)(personalize.personalize)
app.command("generate", epilog=personalize.GENERATE_EXAMPLES)(personalize.generate)
app.command("batch", epilog=batch.EXAMPLES)(batch.batch)
app.command("faces", epilog=faces.EXAMPLES)(faces.faces)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("pretrain", epilog=pretrain.EXAMPLES)(pretrain.pretrain)
app.add_typer(domains.app, name="domains")
app.add_typer(export.app, name="import")
app.command("info", epilog=info.EXAMPLES)(info.info)
app.command("fetch", epilog=cache.FETCH_EXAMPLES)(cache.fetch)
app.add_typer(cache.app, name="cache")
app.command("doctor")(doctor.doctor)


def _reflow(group: typer.Typer) -> None:
    """Leave room for texts: no line breaks of docstrings, and no `<bool>` beside flags, which Typer would print."""
    for command in group.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        for hint in get_type_hints(command.callback, include_extras=True).values():
            if get_origin(hint) is Annotated and hint.__origin__ is bool:
                hint.__metadata__[0].metavar = ""
    for registered in group.registered_groups:
        if registered.typer_instance is not None:
            _reflow(registered.typer_instance)


_reflow(app)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """From one photo, a text-to-image model learns a face, a cat or a style."""
    if version:
        console.write_stdout(f"e4t {__version__}")
        raise typer.Exit
    console.show_help(context)


def main() -> NoReturn:
    """Entry point of ``e4t`` and of ``python -m e4t_cli``."""
    _open_closed_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised."""
    console.start(json="--json" in arguments)  # until the command has parsed its options
    _silence_libraries()
    lazy_packages.install()
    set_waiting()
    with _stop_signals() as stopped_by:
        try:
            code = app(args=list(arguments), prog_name="e4t", standalone_mode=False)
            # Typer answers an interrupt with the exit code 130, and reports it as a return value.
            return _stopped(stopped_by) if stopped_by or code == 130 else int(code or 0)
        except KeyboardInterrupt:
            return _stopped(stopped_by)
        except E4TError as error:
            return _report(error)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            hint = f"see: {context.command_path if context is not None else 'e4t'} --help"
            return _report(UsageError(error.format_message(), hint=hint))
        except console.ReaderEnded:
            return READER_ENDED
        except SystemExit as error:
            # Typer's answer to a broken pipe, while it prints a help.
            if isinstance(error.__context__, BrokenPipeError):
                console.discard_stdout()
                return READER_ENDED
            return error.code if isinstance(error.code, int) else 1
        except OSError as error:
            return _os_error(error)
        except typer.Abort as error:  # Typer's answer to an EOFError, of whatever library
            return _unexpected(error.__cause__ or error)
        except Exception as error:
            return _unexpected(error)


def _report(error: E4TError) -> int:
    if not isinstance(error, ResourceError) and memory_ran_out(error):
        error = out_of_memory()  # and no damaged file, nor a fault of e4t
    console.current().error(error)
    if _debugging():
        traceback.print_exc()
    return error.exit_code


def _os_error(error: OSError) -> int:
    """Report a full disk or a missing permission that no command expected; anything else is a bug."""
    if error.errno not in SURROUNDINGS:
        return _unexpected(error)
    if error.filename is None:
        console.discard_stdout()  # perhaps a help, which Typer prints
    return _report(file_error(error, error.filename or "stdout or a file"))


def _unexpected(error: BaseException) -> int:
    if memory_ran_out(error):
        return _report(out_of_memory())
    text = " ".join(str(error).split())
    message = f"unexpected {type(error).__name__}{': ' if text else ''}{text}"
    return _report(
        E4TError(message, hint=None if _debugging() else "this is a bug of e4t; rerun with -vv for the traceback")
    )


def _stopped(stopped_by: list[int]) -> int:
    """Report an interrupt. Saved files stay; every file is written whole or not at all."""
    number = stopped_by[0] if stopped_by else signal.SIGINT
    current = console.current()
    code = "terminated" if number == signal.SIGTERM else "interrupted"
    kept = f"; {current.saved} saved before" if current.saved else ""
    stopped = E4TError(f"{code}{kept}", hint=current.resume_hint or None)
    stopped.code, stopped.exit_code = code, 128 + number
    if not current.quiet:
        current.error(stopped)
    return stopped.exit_code


def _debugging() -> bool:
    return console.current().verbose >= 2 or os.environ.get("E4T_DEBUG") == "1"


def _open_closed_streams() -> None:
    """Open the null device in place of closed streams (``<&-``), else the next file opened gets the number of one.

    What a library prints, or a process that is started, would go to that file. Python's own streams stay None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _silence_libraries() -> None:
    """Disable the progress bars and warnings of libraries, before they are imported."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Whatever PYTHONWARNINGS says, which is meant for programs under test: "error" would end torch's import.
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"  # of processes that this one starts
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())  # else Python prints warnings to stderr


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Turn SIGINT and SIGTERM into one KeyboardInterrupt; the second one ends the process at once.

    Work that checks the console's `stop` finishes its step, saves, and raises KeyboardInterrupt. Yields the signals
    that have arrived.
    """
    arrived: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            show_cursor()
            os._exit(128 + number)  # files are renamed into place: nothing can be torn
        request = console.current().stop
        if request is not None and request.ask():
            return  # the work saves a checkpoint, and raises KeyboardInterrupt
        raise KeyboardInterrupt

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread
            # A shell's `command &` ignores SIGINT on purpose.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
    try:
        yield arrived
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
