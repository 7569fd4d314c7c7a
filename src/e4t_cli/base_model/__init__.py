"""The base text-to-image model (section 3.5) behind one interface: `mini` or Stable Diffusion."""

from .model import TextToImageModel
from .pictures import Posterior
from .words import Tokens

__all__ = ["Posterior", "TextToImageModel", "Tokens"]
