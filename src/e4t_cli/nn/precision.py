"""The dtypes of a run, resolved once, and the context managers that apply them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from e4t_cli.nn.composed_attention import composed_attention

TENSOR_CORES = (7, 0)  # the first CUDA compute capability with fast float16 matrix multiplications


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """The dtypes of one run."""

    device: torch.device
    base: torch.dtype  # of the frozen parts: U-Net, text encoder, image encoder
    matmul: torch.dtype  # in training; autocast applies it where the weights have another dtype
    vae: torch.dtype
    sampled: torch.dtype  # of a tuned U-Net that is sampled with
    trained: torch.dtype = torch.float32  # weights in training, their gradients and the optimizer's state

    @classmethod
    def resolve(
        cls, device: torch.device, base: torch.dtype = torch.float32, autocast: bool | None = None,
        *, loss_scaling: bool = True,
    ) -> Self:  # fmt: skip
        """Return the policy of a run.

        Args:
            base: the dtype that the base was loaded in.
            autocast: False multiplies in float32, True in half precision even where it is emulated; None takes half
                precision where the hardware is faster with it. `--dtype fp32` is False (`requested_autocast`).
            loss_scaling: whether the training loop can scale its loss, without which float16 gradients underflow.
        """
        matmul = torch.float32
        if autocast is not False:
            matmul = _fast_dtype(device, loss_scaling) or (torch.bfloat16 if autocast else torch.float32)
        # Fifteen steps at the paper's rate move a weight by one or two spacings of bfloat16, and a third of that is
        # lost in the rounding; float16, as fast, loses 4 % (a test measures it), but is slow on a CPU.
        coarse = base == torch.bfloat16 and device.type != "cpu"
        return cls(device=device, base=base, matmul=matmul, vae=base, sampled=torch.float16 if coarse else base)

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of matrix multiplications if it is a half precision, None for float32."""
        return None if self.matmul == torch.float32 else self.matmul

    @property
    def scales_loss(self) -> bool:
        return self.matmul == torch.float16

    def without_half(self) -> Self:
        """Return the policy that multiplies in float32."""
        return replace(self, matmul=torch.float32)


def requested_autocast(dtype: str) -> bool | None:
    """Return `autocast` for a `--dtype`: an explicit fp32 means float32 everywhere."""
    return False if dtype == "fp32" else None


def _fast_dtype(device: torch.device, loss_scaling: bool) -> torch.dtype | None:
    if multiplies_bfloat16(device):  # first: it has float32's range
        return torch.bfloat16
    return torch.float16 if loss_scaling and multiplies_float16(device) else None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively, without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Measured with AVX512-BF16: a training step takes two thirds of its time in float32.
        found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def multiplies_float16(device: torch.device) -> bool:
    """Return whether the device multiplies float16 faster than float32; False on MPS, where it was never measured."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast inside a `with` block, where it is enabled."""
    # Only there: the end of a thread's outermost block empties the cache of all threads.
    if _autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _autocasts(device: torch.device) -> bool:
    available = torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


_CAST_CACHE = threading.RLock()
"""Held by the thread that uses autocast's cache of converted weights.

torch (2.14) has one cache for the process and empties it at the end of any thread's block. Another
thread would convert its weights again and round their gradients differently.
"""


@contextmanager
def half_precision(
    device: torch.device, dtype: torch.dtype | None, *, keep_casts: bool = True, cast: bool = True
) -> Iterator[None]:
    """Multiply matrices in half precision inside a `with` block; weights keep their dtype.

    Args:
        dtype: of the matrix multiplications, None for that of the weights.
        keep_casts: cache the half-precision copy of each weight until the end of the block, for code that uses it
            twice; without, gradient checkpointing holds one block's copies at a time, attention takes little memory.
        cast: False where all weights have that dtype already: CUDA's autocast would still convert every normalisation
            to float32 and back.
    """
    with ExitStack() as stack:
        if dtype is not None and cast:
            if keep_casts:
                stack.enter_context(_CAST_CACHE)
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=keep_casts))
        if dtype is not None and device.type == "cpu" and keep_casts:
            # The CPU's fused attention is 6 times slower in its bfloat16 backward than the composed one: a third of a
            # whole training step of a small U-Net. That one keeps whole attention matrices, gigabytes of them at 512
            # pixels, so not where memory is short; nor would `backward` know of the choice when it recomputes them.
            stack.enter_context(training_attention())
        yield


class math_attention(TorchFunctionMode):
    """Compute attention from its definition, inside a `with` block of the calling thread.

    The bits are those of `sdpa_kernel(SDPBackend.MATH)`, whose flags belong to the process: two
    runs that overlap would switch each other's attention. A TorchFunctionMode belongs to a thread.
    It sees each call of torch, 1,565 in a tuning step of `mini`: 1.5 % of the step's CPU time.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        return _math_attention(*args, **kwargs)


class training_attention(math_attention):
    """As `math_attention` in a third of the operations where a gradient is needed; equal up to rounding."""

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        causal = kwargs.get("is_causal", False)
        if not (torch.is_grad_enabled() and len(args) == 3 and _is_plain(*args, **kwargs)):
            return _math_attention(*args, **kwargs)
        device = args[0].device
        if _autocasts(device):
            dtype = torch.get_autocast_dtype(device.type)
            args = tuple(_autocast(one, dtype) for one in args)
        with full_precision(device):
            return composed_attention(*args, causal=causal)


def _is_plain(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    scale: float | None = None, is_causal: bool = False, enable_gqa: bool = False,
) -> bool:  # fmt: skip
    """Return whether attention has no option but a causal mask of a square matrix."""
    usual = attn_mask is None and not dropout_p and scale in (None, query.shape[-1] ** -0.5)
    square = not is_causal or query.shape == key.shape
    same = query.shape[:2] == key.shape[:2] == value.shape[:2] and query.shape[-1] == value.shape[-1]
    return usual and square and same and query.ndim == 4 and query.dtype == key.dtype == value.dtype


def _math_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Call the MATH backend as `scaled_dot_product_attention` does, also under autocast."""
    device = query.device
    if _autocasts(device):
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = (_autocast(one, dtype) for one in (query, key, value))
        attn_mask = None if attn_mask is None else _autocast(attn_mask, dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed, attn_mask = attn_mask, torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask.masked_fill_(allowed.logical_not(), -torch.inf)
    with full_precision(device):
        output: Tensor = torch._scaled_dot_product_attention_math(query, key, value, attn_mask, *args, **kwargs)[0]
    return output


def _autocast(value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if cast else value
