"""Domain pre-training (section 3.3): encoder and offsets learn a domain, the base stays frozen.

Each step shows 16 different pictures, each noised to a level of its own, and takes the gradient
of eq. 5. Latents and [CLS] features never change, so they are computed once (`encode_images`).
Every random number is a function of seed, step and position, and a checkpoint holds all the rest:
a resumed run ends in the same bits as an uninterrupted one.
"""

from .encoding import EncodedImages, encode_images
from .loop import PretrainingStep, pretrain_domain

__all__ = ["EncodedImages", "PretrainingStep", "encode_images", "pretrain_domain"]
