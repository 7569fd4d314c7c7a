"""Faces: fifteen steps, and only the person's head counts in the loss.

The mask is "an off-the-shelf face segmentation network" (section 3.4). On the base `mini` that is
a small SegFormer which came with this package; its labels are read by name.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_cli import (
    SUBJECT_TEMPLATES,
    Domain,
    IntegrityError,
    PreparationTarget,
    PreparedImage,
    PretrainingRecipe,
    TuningRecipe,
)

if TYPE_CHECKING:
    from PIL.Image import Image

HEAD = {"skin", "hair", "eyes", "glasses", "brows", "nose", "mouth", "beard", "ears"}
"""The parser's labels that are the person rather than clothes or place."""

PARSERS = {"mini": Path(__file__).parent / "packs" / "face" / "parser-mini"}
"""Base name → a folder as `SegformerForSemanticSegmentation.save_pretrained` writes it."""


def prepare(image: Image, target: PreparationTarget) -> PreparedImage:
    """Crop the centred square and, where there is a parser, mask the head."""
    from e4t_cli import center_square  # brings Pillow, which a list of domains can do without

    square = center_square(image, target.size)
    if target.mask is None:
        return PreparedImage(image=square)
    parser = PARSERS.get(target.base)
    if parser is None or not (parser / "config.json").is_file():
        note = f"there is no face parser for {target.base}: the whole picture counts in tuning"
        return PreparedImage(image=square, notes=(note,))
    mask = head_mask(square, parser)
    covered = mask.histogram()[255] / (mask.width * mask.height)
    if covered < 0.01:
        note = "no face was found: the whole picture counts in tuning"
        return PreparedImage(image=square, notes=(note,))
    return PreparedImage(image=square, mask=mask)


def head_mask(image: Image, parser: Path) -> Image:
    """Return a mask of mode L, 255 where the parser sees any part of a head."""
    import numpy as np
    import torch
    from PIL import Image as PILImage

    model = _load_parser(parser)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1  # mean and deviation 0.5
    with torch.inference_mode():
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, height, width)
        logits = model(pixel_values=batch).logits  # (1, labels, height / 4, width / 4)
        logits = torch.nn.functional.interpolate(
            logits, size=batch.shape[-2:], mode="bilinear", align_corners=False
        )
        labels = logits[0].argmax(dim=0)  # (height, width)
    head = [index for index, name in model.config.id2label.items() if name in HEAD]
    inside = torch.isin(labels, torch.tensor(head))
    return PILImage.fromarray((inside.numpy() * 255).astype(np.uint8))


@lru_cache(maxsize=2)
def _load_parser(folder: Path) -> Any:
    import torch
    from transformers import SegformerForSemanticSegmentation

    model, report = SegformerForSemanticSegmentation.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:  # transformers would go on with random numbers
        raise IntegrityError(f"the face parser in {folder.name} does not fit: {wrong[0]}")
    if not HEAD.intersection(model.config.id2label.values()):
        raise IntegrityError(f"the face parser in {folder.name} names no part of a head")
    return model.eval()


face = Domain(
    name="face",
    descriptor="face",  # section 3.1
    summary="one person, from one photo",
    tuning=TuningRecipe(
        steps=15,  # section 3.5
        # Paper silent: the learning rate of tuning faces; this is pre-training's (section 3.5).
        base_learning_rate=1e-6,
        embedding_penalty=0.1,  # section 3.5
        mask=True,  # section 3.4
    ),
    pretraining=PretrainingRecipe(
        steps=30_000,  # section 3.5
        base_learning_rate=1e-6,  # section 3.5
        embedding_penalty=0.01,  # section 3.3
    ),
    weights={"mini": "package:e4t_domains/packs/face/mini"},
    prepare=prepare,
    prompt_templates=(
        *SUBJECT_TEMPLATES,
        "a portrait of {}",
        "a portrait photo of {}",
        "the face of {}",
        "a photo of {} looking at the camera",
    ),
    licence="Apache-2.0",  # of the weights for `mini`: drawn by this project
)
