"""`--base auto`: Stable Diffusion where there is an accelerator for it, the drawn world elsewhere.

The looks are ordered by what they cost. Without an accelerator, which is seen from the machine's
devices, nothing else is asked: no library is imported, no socket opened.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from e4t_cli.bases import ACCELERATED, EMBEDDED, PUBLISHED

from .access import Access
from .licences import Terms, is_accepted
from .places import endpoint
from .presence import is_here

_PATIENCE = 2.0  # seconds that the hub has to answer the door


def choose_automatically(
    access: Access,
    *,
    device: str = "auto",
    has_weights: Callable[[str], bool] = lambda base: True,
    confirm: Callable[[], bool] = lambda: True,
    what: str = "the domain",
) -> tuple[str, str]:
    """Return the base that "auto" means here and now, and a sentence that says why.

    Args:
        access: whether the network and the licence question are allowed.
        device: as the user wrote it.
        has_weights: whether the domain has weights, here or on the hub, for a base.
        confirm: asked last whether the accelerator really works; it may import torch.
        what: the domain, for the sentence.
    """
    mini, large = EMBEDDED[0], ACCELERATED
    drawings = f"base {mini}, which draws in 64 pixels"
    if not likely_accelerator(device):
        return mini, f"{drawings}: no accelerator here; --base {large} makes photographs, slowly"
    if not has_weights(large):
        return mini, f"{drawings}: {what} has no weights for {large} yet (e4t pretrain makes them)"
    row = PUBLISHED[large]
    if not is_here(large):
        if access.cut_off:
            return mini, f"{drawings}: offline, and {large} is not on this machine"
        terms = Terms(repository=row.repository, licence=row.licence)
        if terms.asks and not access.accept_license and not is_accepted(terms):
            return mini, f"{drawings}: e4t fetch {large} asks about the licence of {large} first"
        if not _answers():
            return mini, f"{drawings}: {large} is not on this machine and the hub does not answer"
    if not confirm():
        return mini, f"{drawings}: the accelerator of this machine does not work with this torch"
    return large, f"base {large}: this machine has an accelerator; --base {mini} needs none"


def likely_accelerator(device: str = "auto") -> bool:
    """Whether there is an accelerator by the look of the machine; torch is not asked."""
    if device != "auto":
        return device != "cpu"
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if platform.system() == "Windows":
        return Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll").exists()
    places = [*Path("/dev").glob("nvidia[0-9]*"), Path("/dev/dxg"), Path("/dev/kfd")]
    return any(place.exists() for place in places)


def _answers() -> bool:
    """Whether the hub can be reached."""
    address = urlsplit(endpoint())
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # the proxy will say
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
