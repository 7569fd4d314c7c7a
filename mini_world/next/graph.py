"""The stages of `make mini` and what each needs, without importing torch.

Results of other stages that a stage reads are its needs. Those of "draw", "portraits" and "encode" are large
and quickly made again, and are not shipped.
"""

from __future__ import annotations

from mini_world.next.runner import Node

# In the order in which one process runs them.
STAGES: dict[str, Node] = {
    "draw": Node(shipped=False),
    "portraits": Node(shipped=False),
    "text": Node(),  # from captions alone
    "perceptual": Node(("draw",)),
    "vae": Node(("draw", "perceptual")),
    "tower": Node(("draw", "portraits", "text")),
    "parser": Node(("draw", "portraits")),
    "encode": Node(("draw", "vae"), shipped=False),
    "decoder": Node(("draw", "perceptual", "vae", "encode")),
    "judge": Node(("draw",)),
    "unet": Node(("draw", "encode", "text"), shared=True),
    "base": Node(("unet", "text", "decoder", "tower")),
    "words": Node(("base", "judge")),
    "face": Node(("portraits", "base")),
    "cat": Node(("portraits", "base")),
    "art": Node(("portraits", "base")),
    "evaluate": Node(("base", "judge", "face", "cat", "art")),
    "report": Node(("base", "parser", "judge", "face", "cat", "art", "words", "evaluate")),
}
