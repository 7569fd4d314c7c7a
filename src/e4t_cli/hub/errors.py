"""Maps errors of huggingface_hub, its HTTP library and the disk to E4TError.

These libraries nest causes: a full disk arrives as an OSError, a captive portal as invalid JSON, a refused connection
as a missing file. The whole chain is examined. Error messages never repeat request addresses or tokens.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from e4t_cli.errors import E4TError, IntegrityError, ResourceError, WeightsUnavailable, printable
from e4t_cli.hub.paths import endpoint

_BROKEN = ("ReadError", "WriteError", "XetDownloadError")
AGAIN = "the same command goes on: files that are finished are kept"


@dataclass(frozen=True)
class _Request:
    """What was being fetched, fit for a terminal."""

    repository: str
    revision: str
    file: str


def as_e4t_error(error: BaseException, repository: str, revision: str = "", file: str = "") -> E4TError:
    """Return the E4TError for an error of huggingface_hub, its HTTP library, or the disk, raised while fetching."""
    chain = list(_causes(error))
    for one in chain:
        if isinstance(one, E4TError):
            return one
    what = _Request(printable(repository), printable(revision), printable(file))
    for test in (_disk_error, _response_error, _content_error, _connection_error):
        for one in chain:
            if found := test(one, what):
                return found
    return WeightsUnavailable(f"{repository} could not be fetched ({type(chain[-1]).__name__})", hint=AGAIN)


def is_refused_token(error: BaseException) -> bool:
    """Whether the hub answered 401: an unknown token bars even public repositories."""
    return any(_status(one) == 401 for one in _causes(error))


def retry_after(error: BaseException) -> float | None:
    """Return the seconds to wait before the next attempt, as the hub asks for them."""
    for one in _causes(error):
        headers = getattr(getattr(one, "response", None), "headers", None) or {}
        if (value := str(headers.get("Retry-After", ""))).isdigit():
            return float(value)
    return None


def is_broken_connection(error: BaseException) -> bool:
    """Whether the connection was cut in the middle, which huggingface_hub 2.4.0 does not retry."""
    return any(type(one).__name__ in _BROKEN for one in _causes(error))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    for one in _causes(error):
        status = _status(one)
        if status is not None:
            return status == 429 or status >= 500
        if _is_http(one):
            return True
    return False


def _disk_error(one: BaseException, what: _Request) -> E4TError | None:
    if not isinstance(one, OSError):
        return None
    if one.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = f"the disk is full: {what.file or what.repository} could not be written"
        return ResourceError(message, hint=f"make room, or set HF_HOME to a larger disk; {AGAIN}")
    if one.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        cause = printable(str(one.filename or one.strerror))
        message = f"{what.repository} is not on this machine, and the cache cannot be written to ({cause})"
        return WeightsUnavailable(message, hint="set HF_HOME and E4T_CACHE_DIR to folders of yours")
    return None


def _response_error(one: BaseException, what: _Request) -> E4TError | None:
    status, repository = _status(one), what.repository
    page = f"{endpoint()}/{repository}"
    wait = retry_after(one)
    when = f"wait {wait:.0f} seconds" if wait else "wait a few minutes"
    terms = f"{repository} is only for those who have accepted its terms on the hub"
    absent = f"there is no repository {repository} on the hub, or it is private"
    busy = "the hub has had too many requests from here (429)"
    explained = {
        "GatedRepoError": (terms, f"accept them at {page}, then: hf auth login"),
        "RevisionNotFoundError": (f"{repository} has no revision {what.revision!r}", None),
        "RemoteEntryNotFoundError": (f"{repository} has no file {what.file!r}", None),
        "RepositoryNotFoundError": (absent, "check its name; for a private one: hf auth login"),
        "HFValidationError": (f"{repository!r} is not a name of the hub", None),
        401: (f"the hub refused the token for {repository} (401)", "hf auth login again, or unset HF_TOKEN"),
        403: (f"the hub does not give {repository} to you (403)", f"look at {page} with your account"),
        429: (busy, f"{when}, or: hf auth login, which is allowed more; {AGAIN}"),
    }
    found = explained.get(type(one).__name__) or explained.get(status or 0)
    if found is None and status is not None and status >= 400:
        state = "is in trouble" if status >= 500 else "did not answer as expected"
        found = (f"the hub {state} ({status}) at {repository}", AGAIN)
    return WeightsUnavailable(found[0], hint=found[1]) if found else None


def _content_error(one: BaseException, what: _Request) -> E4TError | None:
    if isinstance(one, OSError) and "Consistency check failed" in str(one):
        sizes = [word for word in str(one).replace(")", " ").split() if word.isdigit()][:2]
        length = f" (expected {sizes[0]} bytes, got {sizes[1]})" if len(sizes) == 2 else ""
        message = f"what arrived as {what.repository}/{what.file} is not that file{length}"
        return IntegrityError(message, hint=f"does this network ask for a sign-in page? if not, {AGAIN}")
    if type(one).__name__ in ("JSONDecodeError", "FileMetadataError", "UnicodeDecodeError"):
        message = f"what answers at {printable(endpoint())} is not the hub"
        return WeightsUnavailable(message, hint="does this network ask for a sign-in page, or is HF_ENDPOINT wrong?")
    return None


def _connection_error(one: BaseException, what: _Request) -> E4TError | None:
    kind, repository = type(one).__name__, what.repository
    if kind == "OfflineModeIsEnabled":
        return WeightsUnavailable(f"{repository} is not on this machine, and e4t is offline")
    if kind in ("RemoteProtocolError", *_BROKEN):
        file = f"{repository}/{what.file}" if what.file else repository
        return WeightsUnavailable(f"the connection broke while fetching {file}", hint=AGAIN)
    if "Timeout" in kind:
        return WeightsUnavailable(f"the hub did not answer in time for {repository}", hint=AGAIN)
    if _is_http(one) or isinstance(one, ConnectionError):
        message = f"the hub cannot be reached for {repository}"
        return WeightsUnavailable(message, hint="check the network; --base mini needs none, but knows drawings only")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _status(one: BaseException) -> int | None:
    status = getattr(getattr(one, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_http(one: BaseException) -> bool:
    # httpx in version 1 of huggingface_hub, httpx2 in version 2: the names of the classes agree.
    return any(kind.__module__.partition(".")[0] in ("httpx", "httpx2") for kind in type(one).__mro__)
