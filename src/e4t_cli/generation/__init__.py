"""Drawing pictures of a concept, or of the base's own ideas."""

from .loop import generate_latents, sample
from .sampling import SCHEDULERS, Sampling, make_scheduler

__all__ = ["SCHEDULERS", "Sampling", "generate_latents", "make_scheduler", "sample"]
