"""The base text-to-image model (section 3.5) behind one interface: `mini` or Stable Diffusion."""

from .model import Posterior, TextToImageModel, Tokens

__all__ = ["Posterior", "TextToImageModel", "Tokens"]
