"""Optimizers by name: AdamW, and Muon for the kernels of convolutions with AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def adamw(
    parameters: dict[str, nn.Parameter], learning_rate: float, *, weight_decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on all parameters."""
    options = {"lr": learning_rate, "betas": (0.9, 0.98), "weight_decay": weight_decay, "fused": True}
    return [torch.optim.AdamW(parameters.values(), **options)]


class KernelMuon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices only, on kernels (out, in, h, w) seen as matrices (out, in · h · w).

    The matrices share their memory with the kernels. Their columns may be in any order, on which Muon's steps do not depend.
    """

    def __init__(self, kernels: list[nn.Parameter], lr: float) -> None:
        self._kernels = kernels
        matrices = [nn.Parameter(self._matrix(kernel.detach())) for kernel in kernels]
        super().__init__(matrices, lr=lr, weight_decay=0.01)

    @staticmethod
    def _matrix(kernel: Tensor) -> Tensor:
        if not kernel.is_contiguous():  # then it is channels_last, the only other format that the loop uses
            kernel = kernel.permute(0, 2, 3, 1)
        return kernel.view(len(kernel), -1)

    @torch.no_grad()
    def step(self, closure=None):
        matrices = [p for group in self.param_groups for p in group["params"]]
        for matrix, kernel in zip(matrices, self._kernels, strict=True):
            if kernel.grad is not None:
                gradient = kernel.grad if kernel.is_contiguous() else kernel.grad.permute(0, 2, 3, 1)
                matrix.grad = gradient.reshape(matrix.shape)
        loss = super().step(closure)
        for matrix in matrices:
            matrix.grad = None
        return loss

    def state_dict(self) -> dict:
        """The state with columns in the order (in, h, w), whatever the memory format, so that it fits every device."""
        stored = super().state_dict()
        state = {index: {name: self._reordered(index, value, True) for name, value in values.items()}
                 for index, values in stored["state"].items()}  # fmt: skip
        return stored | {"state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        state = {index: {name: self._reordered(index, value, False) for name, value in values.items()}
                 for index, values in state_dict["state"].items()}  # fmt: skip
        super().load_state_dict(state_dict | {"state": state})

    def _reordered(self, index: int, value: Tensor, outwards: bool) -> Tensor:
        kernel = self._kernels[index]
        if kernel.is_contiguous() or value.dim() != 2:
            return value
        out, into, height, width = kernel.shape
        if outwards:
            return value.view(out, height, width, into).permute(0, 3, 1, 2).flatten(1)
        return value.reshape(out, into, height, width).permute(0, 2, 3, 1).flatten(1)


def muon(parameters: dict[str, nn.Parameter], learning_rate: float, adamw_rate: float = 2e-3) -> list[torch.optim.Optimizer]:
    """Muon for 3x3 kernels between feature maps, AdamW for the rest (first and last layers, 1x1, norms, biases)."""
    kernels = {n: p for n, p in parameters.items() if p.dim() == 4 and p.shape[-1] > 1 and min(p.shape[:2]) >= 16}
    rest = {n: p for n, p in parameters.items() if n not in kernels}
    return [KernelMuon(list(kernels.values()), learning_rate), *adamw(rest, adamw_rate)]
