"""Watching a pre-training run: its losses, a curve of them, and pictures that it draws on the way.

Everything goes into one folder: `losses.jsonl`, `losses.png`, and `step-N.png`, a contact sheet of
fixed held-out pictures and fixed prompts from fixed seeds, so that two sheets differ by what was
learned between them and by nothing else. Watching changes no number of the run.
"""

from .curve import draw_losses
from .watch import Watch, Watching

__all__ = ["Watch", "Watching", "draw_losses"]
