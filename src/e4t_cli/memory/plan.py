"""How a tuning is to be run, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from e4t_cli.devices import GB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a tuning is to be run; every plan gives the same gradient.

    Args:
        micro_batch: samples per backward pass.
        checkpointing: compute activations again instead of keeping them, a third more work.
        optimizer: "fused" on the device, "8bit" there, or "host" in the host's memory.
        park: send the VAE to the host while tuning.
        peak: bytes that this is predicted to take; 0 for a plan that nobody counted.
        budget: bytes there are.
    """

    micro_batch: int
    checkpointing: bool = False
    optimizer: str = "fused"
    park: bool = False
    peak: int = 0
    budget: int = 0

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some entries changed."""
        return replace(self, **changes)

    def sentence(self) -> str:
        """Say the plan in one line."""
        parts = [f"{self.micro_batch} at a time"]
        if self.checkpointing:
            parts.append("gradient checkpointing")
        if self.optimizer == "8bit":
            parts.append("8-bit optimiser")
        if self.optimizer == "host":
            parts.append("optimiser in the host's memory")
        if self.park:
            parts.append("VAE in the host's memory meanwhile")
        return (
            f"memory: {self.peak / GB:.1f} GB predicted of {self.budget / GB:.1f} GB; "
            f"{', '.join(parts)}"
        )
