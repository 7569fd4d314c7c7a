"""Inference-time personalization (section 3.4): a few steps on one picture.

- `loop`: the steps, and what is told about them.
- `step`: the gradient of one, in micro-batches, and the retreat when memory runs out.
- `parts`: what is trained, exactly (the paper) or through adapters.
- `optimizers`: AdamW on the device, in 8 bits, or in the host's memory.
"""

from .loop import tune

__all__ = ["tune"]
