"""Main memory: what is free for this process, by its system's, container's and shell's limits; and that it ran out."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from e4t_cli.cgroups import cgroup_folders
from e4t_cli.errors import ResourceError

GB = 1 << 30
# Addresses for the libraries and a tuning of `mini`, measured with torch 2.15; three quarters of CUDA's are reserved.
LEAST_ADDRESSES = {"cpu": 2 * GB, "cuda": int(4.25 * GB)}
# Of the C library's loader, torch's allocators on the CPU and MPS, OpenBLAS, Rust; safetensors ends in "os error 12".
_SIGNS = (
    "out of memory", "allocate memory", "_alloc_failed", "bad_alloc", "bad allocation", "(os error 12)",
    "failed to map segment", "can't start new thread",
)  # fmt: skip
_ROOT = Path("/")


def free_ram(root: Path = _ROOT) -> int:
    """Return the bytes of main memory that this process can have without swapping.

    Args:
        root: the folder with the system's /proc and /sys.
    """
    found = [*_room_in_cgroups(root)]
    with suppress(OSError, ValueError):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    if (addresses := free_addresses(root)) is not None:
        found.append(addresses)
    if not found:
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(found, default=8 * GB))  # Windows reports it through ctypes only


def _room_in_cgroups(root: Path) -> Iterator[int]:
    """Yield what the memory limit of each control group around this process leaves, of version 1 and 2.

    Cached files count as used there, although the kernel gives their memory away before it runs out.
    """
    for version, folder in cgroup_folders("memory", root):
        limits, usage, cached = _V1 if version == 1 else _V2
        for name in limits:
            with suppress(OSError, ValueError):  # "max", or the root, which has no limit
                limit, used = (int((folder / one).read_text(encoding="ascii")) for one in (name, usage))
                with suppress(OSError, ValueError):
                    lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                    used -= next((int(line.split()[1]) for line in lines if line.startswith(f"{cached} ")), 0)
                yield limit - used


_V1 = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
_V2 = ("memory.max", "memory.high"), "memory.current", "inactive_file"  # above `high` a process is slowed down


def free_addresses(root: Path = _ROOT) -> int | None:
    """Return what `ulimit -v` leaves in bytes, None where it is unlimited or unknown."""
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
            return max(0, limit - pages * resource.getpagesize())
    return None


def check_addresses() -> None:
    """Raise ResourceError if `ulimit -v` is too small for torch, before it is imported: some libraries crash then."""
    free = free_addresses()
    if free is None or "torch" in sys.modules:
        return
    spec = find_spec("torch")
    cuda = spec is not None and spec.origin and os.path.exists(Path(spec.origin).parent / "lib" / "libtorch_cuda.so")
    least = LEAST_ADDRESSES["cuda" if cuda else "cpu"]
    if free < least:
        message = f"memory ran out: ulimit -v leaves {free / GB:.1f} GB of addresses, and {least / GB:.1f} are needed"
        raise ResourceError(message, hint="ulimit -v unlimited, or a larger number")


def memory_ran_out(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, means that memory ran out.

    Most libraries have no class for that: only their messages tell it from other errors.
    """
    seen = 0
    while error is not None and seen < 20:
        text = str(error).lower()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError | ImportError | OSError) or type(error).__name__ == "SafetensorError":
            if any(sign in text for sign in _SIGNS):
                return True
            # All that oneDNN says of it; where memory is not limited it would be something else.
            if text == "could not create a primitive" and free_addresses() is not None:
                return True
        error, seen = error.__cause__, seen + 1
    return False


def out_of_memory(hint: str = "close other programs, or use another --device or a smaller --base") -> ResourceError:
    """Return the error for it."""
    return ResourceError("memory ran out", hint=hint)
