"""Where half precision comes in, and where it has to stay out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TENSOR_CORES = (7, 0)
"""The first compute capability of CUDA with fast products in float16."""


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast inside a `with` block, on devices that know it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def half_format(device: torch.device, *, scaled: bool = False) -> torch.dtype | None:
    """Return the format in which the device multiplies fastest in training, None for float32.

    bfloat16 where there is a choice: it has float32's range.

    Args:
        scaled: float16 will do, because the loss is scaled (`tuning/loss_scale.py`). Not on
            Apple's, where nobody has measured whether that is faster.
    """
    if multiplies_bfloat16(device):
        return torch.bfloat16
    if scaled and device.type == "cuda":
        cores = torch.cuda.get_device_capability(device) >= TENSOR_CORES
        return torch.float16 if cores else None
    return None


def chosen_format(
    device: torch.device, autocast: bool | None, *, scaled: bool = False
) -> torch.dtype | None:
    """Return the format of products in training, None for float32.

    Args:
        autocast: whether in half precision; None where the hardware is faster so.
        scaled: see `half_format`.
    """
    if autocast is False:
        return None
    found = half_format(device, scaled=scaled)
    return torch.bfloat16 if autocast and found is None else found


@contextmanager
def half_precision(
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    keep_casts: bool = True,
    cast: bool = True,
) -> Iterator[None]:
    """Make matrix products in half precision inside a `with` block; weights stay as they are.

    Args:
        dtype: the format of the products, None for that of the weights.
        keep_casts: keep a weight's copy in half precision until the end of the block, for whoever
            runs over it twice; without, gradient checkpointing has them one block at a time.
            Without, attention is computed in little memory, too.
        cast: False where all weights are in that format already: CUDA's autocast would still bring
            every normalisation to float32 and back.
    """
    with ExitStack() as stack:
        if dtype is not None and cast:
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=keep_casts))
        if dtype is not None and device.type == "cpu" and keep_casts:
            # The CPU's fused attention is 6 times slower in its bfloat16 backward than the
            # plain products: a third of a whole training step of a small U-Net. Those keep
            # whole attention maps, gigabytes of them at 512 pixels, so not where memory is
            # short; nor would `backward` know of the choice when it computes them again.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether the device has bfloat16 products of its own, and not only a way around."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Measured with AVX512-BF16: a training step takes two thirds of its time in float32.
        found = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False
