"""A command line in a forked process: an end for those that have none, and what is wrong with how one ended."""

import os
import re
import signal
import sys
import time

from e4t_cli.cli import app

PROMISED = {0, 2, 3, 4, 5, 6, 7, 8}
SECONDS, MEGABYTES = 20, 700  # of one run; the memory that it takes beyond its parent's


def run_in_child(log, arguments, begin=None, seconds=SECONDS):
    """Run a command after `begin()`; returns its exit code or "no end", its stderr, and the MB its memory grew by."""
    process = os.fork()
    if not process:
        code = 99
        try:
            handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            os.dup2(handle, 2)
            use_own_streams()
            if begin is not None:
                begin()
            code = app.run(arguments)
        except BaseException as error:
            os.write(2, f"Traceback {error!r}".encode())
        os._exit(code)
    end = time.monotonic() + seconds
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.wait4(process, 0)
            return "no end", "", 0
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), usage.ru_maxrss / 1024 - resident()


def use_own_streams():
    """Replace pytest's streams by those of this process."""
    sys.stdin = os.fdopen(os.dup(0))
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", errors="surrogateescape") for number in (1, 2))


def resident():
    """Return the memory of this process in MB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def complaint(code, err, grown, new=()):
    """Return what is wrong with how a run ended, "" if nothing; `new` are files that should not be there."""
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    wrong = {
        f"code {code}": code not in PROMISED,
        f"{len(errors)} errors": len(errors) != (code != 0),
        "an empty error": errors == ["error: "],
        "a long error": any(len(line) > 1500 for line in errors),
        "a traceback": "Traceback" in err or "bug of e4t" in err,
        "control characters": re.search(r"[\x00-\x08\x0b-\x1f\x7f]", err) is not None,
        f"{grown:.0f} MB": grown > MEGABYTES,
        f"new: {sorted(new)[:3]}": bool(new),
    }
    return "; ".join(what for what, found in wrong.items() if found)
