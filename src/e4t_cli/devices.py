"""Process-wide state of a run: device, default dtype, memory, and the progress bars of the libraries.

"auto" takes the fastest device there is. Frozen parts are kept in half precision where the hardware multiplies it,
unless the base is too small to gain. What is trained is float32 everywhere.

torch is imported in the functions that use it: a command line is checked before that.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from e4t_cli.errors import UsageError, printable
from e4t_cli.system_memory import GB, free_ram

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# torch has more: "meta" computes nothing, and no other was tried.
_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d{1,3})?", re.ASCII)

# Weights of a U-Net under which half precision gains nothing, and whose images a CPU samples faster together.
SMALL = 100_000_000


def check_device(wanted: str) -> None:
    """Raise UsageError for a name that means no device, whatever this machine has; without torch."""
    if _DEVICE.fullmatch(wanted) is None:
        raise _no_device(wanted)


def _no_device(wanted: str) -> UsageError:
    reason = f"the device {printable(wanted)!r} cannot be used on this machine"
    return UsageError(reason, hint="--device auto picks one that can")


def choose_device(wanted: str) -> torch.device:
    """Return the device of that name; "auto" is the fastest that is here.

    Raises:
        UsageError: the name means nothing, or this machine has no such device.
    """
    check_device(wanted)
    import torch

    if wanted == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except Exception as error:  # AssertionError, RuntimeError, AcceleratorError: by backend
        raise _no_device(wanted) from error
    return device


def likely_accelerator(device: str = "auto") -> bool:
    """Whether there seems to be an accelerator, by files of its driver; without torch."""
    if device != "auto":
        return device != "cpu"
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if platform.system() == "Windows":
        return os.path.exists(Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll"))
    drivers = [*Path("/dev").glob("nvidia[0-9]*"), Path("/dev/dxg"), Path("/dev/kfd")]
    return any(os.path.exists(path) for path in drivers)


def captures_graphs(device: torch.device) -> bool:
    """Whether steps are captured as CUDA graphs on this device; see `training.cuda_graphs`."""
    return device.type == "cuda" and os.environ.get("E4T_CUDA_GRAPHS") == "1"


def peak_memory(device: torch.device | None = None) -> int:
    """Return the peak memory in bytes: of a GPU, or of this process; 0 if it is not known."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose_dtype(wanted: str, device: torch.device, folder: Path | None = None) -> torch.dtype:
    """Return the dtype of the frozen base; tuned weights are float32 in any case.

    Args:
        wanted: a key of `DTYPES`, or "auto".
        device: where it will be.
        folder: of the base; "auto" depends on the size of its U-Net.
    """
    import torch

    if wanted != "auto":
        return cast("torch.dtype", getattr(torch, DTYPES[wanted]))
    if device.type == "cpu" or (folder is not None and _weights(folder / "unet") < SMALL):
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def _weights(folder: Path) -> int:
    """Estimate the weights of a part from the bytes of its files, in float16 at least."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return min(sizes, default=0) // 2 if len(sizes) <= 2 else sum(sizes) // 4


def budget_of(vram: str) -> int:
    """Return the bytes that an option like "8" allows.

    Raises:
        UsageError: it is no number of gigabytes.
    """
    with suppress(ValueError):
        if 0.5 <= float(vram) <= 1024:
            return int(float(vram) * GB)
    reason = f"--vram must be auto or a number of gigabytes, not {printable(vram)!r}"
    raise UsageError(reason, hint="for example --vram 8")


def free_memory_bytes(device: torch.device) -> int:
    """Return what is free on a device: in a GPU's memory, or in the machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        used = torch.mps.driver_allocated_memory()
        return max(0, torch.mps.recommended_max_memory() - used)
    return free_ram()


def read_ahead(folder: Path) -> None:
    """Have the system read a base's weights into its cache during imports, if it can and they fit into memory."""
    files = list(folder.glob("*/*.safetensors"))
    if not hasattr(os, "posix_fadvise") or sum(path.stat().st_size for path in files) > free_ram() // 2:
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def free_memory(device: torch.device) -> None:
    """Release what the allocator holds unused."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Release freed memory that the C library keeps: glibc's blocks of less than 32 MB, as many activations are.

    It has a cost: the system zeroes what is allocated next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


_limits_lock = threading.Lock()
_limits: dict[torch.device, list[float]] = {}  # the fractions of a GPU's memory that running limits allow each
_unlimited: dict[torch.device, float] = {}  # the fraction of the process before the first of them


@contextmanager
def limited_memory(device: torch.device, vram: str) -> Iterator[None]:
    """Limit this process to `--vram` gigabytes of a GPU inside a `with` block; CPU and MPS have no such limit.

    torch has one limit for a process: blocks that overlap have the sum of theirs, and after the last one the process
    has the limit it had before the first.
    """
    import torch

    if device.type != "cuda" or vram == "auto":
        yield
        return
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    fraction = budget_of(vram) / torch.cuda.mem_get_info(device)[1]

    def apply() -> None:
        allowed = min(1.0, sum(_limits[device])) if _limits[device] else _unlimited.pop(device)
        torch.cuda.set_per_process_memory_fraction(allowed, device)

    with _limits_lock:
        if not _limits.setdefault(device, []):
            _unlimited[device] = torch.cuda.get_per_process_memory_fraction(device)
        _limits[device].append(fraction)
        apply()
    try:
        yield
    finally:
        with _limits_lock:
            _limits[device].remove(fraction)
            apply()


class _QuietLibraries:
    """Disables the progress bars of transformers and diffusers while any thread is inside.

    Their switch belongs to the process, so threads are counted: the first one disables, the last one restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._disabled: list[Any] = []

    def __enter__(self) -> None:
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                both = (transformers_logging, diffusers_logging)
                self._disabled = [one for one in both if one.is_progress_bar_enabled()]
                for library in self._disabled:
                    library.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for library in self._disabled:
                    library.enable_progress_bar()


quiet_libraries = _QuietLibraries()
