"""Checkpoints of mkshing/e4t-diffusion, the public implementation: read once, converted, forgotten.

They are pickles, which is the only reason for this room's shape: `python -m e4t_cli.e4t_diffusion`
is a process of its own, without a network, that reads one with torch's restricted loader
(`reading.py`, the only place in this program that touches a pickle), and writes a pack. The process
that asked for it (`converting.py`) sees a line of JSON, and files in safetensors.
"""

from .checkpoint import UNET as TUNED
from .checkpoint import Checkpoint, read_checkpoint
from .converting import convert
from .wish import MERGED, Report, Wish

__all__ = ["MERGED", "TUNED", "Checkpoint", "Report", "Wish", "convert", "read_checkpoint"]
