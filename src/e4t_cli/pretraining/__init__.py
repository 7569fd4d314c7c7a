"""Domain pre-training (section 3.3): encoder and offsets learn a domain, the base stays frozen.

Each step shows 16 different pictures, each noised to a level of its own, and takes the gradient
of eq. 5. Latents and [CLS] features never change, so they are computed once (`encode_images`).
Every random number is a function of seed, step and position in the global batch, and a checkpoint
holds all the rest: a resumed run ends in the same bits as an uninterrupted one, and neither
micro-batches nor more processes change which samples a step sees.
"""

from .batches import Objective, Samples
from .encoding import EncodedImages, EncodedRows, TrainingData, encode_images, epoch_indices
from .loop import pretrain_domain
from .packing import PretrainingStep
from .processes import Processes, join_processes, launched

__all__ = [
    "EncodedImages",
    "EncodedRows",
    "Objective",
    "PretrainingStep",
    "Processes",
    "Samples",
    "TrainingData",
    "encode_images",
    "epoch_indices",
    "join_processes",
    "launched",
    "pretrain_domain",
]
