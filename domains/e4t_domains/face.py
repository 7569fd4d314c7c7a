"""Faces: fifteen steps, and only the person's head counts in the loss.

The mask is "an off-the-shelf face segmentation network" (section 3.4): a small SegFormer that came
with this package for the base `mini`, the public one for photographs. The same labels say where
eyes and mouth are, and so how to turn and crop the photo as the training pictures were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from e4t_cli import (
    SUBJECT_TEMPLATES,
    Domain,
    Frame,
    InputError,
    PreparationTarget,
    PreparedImage,
    PretrainingConfig,
    TuningConfig,
    WeightsUnavailable,
)
from e4t_domains.face_parsing import PUBLIC, find_parser

if TYPE_CHECKING:
    from PIL.Image import Image

WORDS = "a face"


def prepare(image: Image, target: PreparationTarget) -> PreparedImage:
    """Turn and crop the photo around the face, and mask the head.

    Raises:
        InputError: a face is required and there is none, or not the one that was asked for.
    """
    # Only here: whoever lists the domains looks for no face.
    from e4t_domains.face_alignment import settle, style_of
    from e4t_domains.face_search import MIN_SURE, FaceDetector, choose

    centred = Frame.centered(image.size)
    if target.mask is None and not target.align and not target.required:
        return PreparedImage(image=centred.apply(image, target.size), frame=centred)
    try:
        parser = find_parser(target)
    except WeightsUnavailable as error:
        if target.required:
            raise
        return _by_words(image, target, error)
    style = style_of(target.base)
    search = FaceDetector(image, parser, style, target.size)
    faces = search.faces()
    if not faces:
        if target.required:
            raise InputError("there is no face in the picture", hint="take another photo")
        note = "no face was found: the whole picture counts in tuning"
        picture = centred.apply(image, target.size)
        return PreparedImage(image=picture, notes=(note,), frame=centred)
    chosen = search.nearer(choose(faces, target.which))
    frame, notes, said = centred, [], [_counted(len(faces), target.which)]
    if target.align:
        if search.is_clear(chosen):
            frame = settle(chosen.frame, style)
            said.append(f"turned {abs(chosen.frame.turn):.0f}°")
        elif len(chosen.face.eyes) == 1 and chosen.face.sure >= MIN_SURE:
            frame = settle(chosen.frame, style)
            notes.append("one eye is seen, as in a profile: cropped around the head, not turned")
        else:
            notes.append("eyes and mouth are not seen clearly: the face is not aligned")
    mask = None
    if target.mask is not None:
        mask = search.head(frame, chosen.middle, alone=len(faces) == 1)
        said.append(f"mask {_covered(mask):.0%}".replace("%", " %"))
    return PreparedImage(
        image=frame.apply(image, target.size),
        mask=mask,
        notes=tuple(notes),
        remarks=(", ".join(said),),
        frame=frame,
    )


def _by_words(image: Image, target: PreparationTarget, reason: WeightsUnavailable) -> PreparedImage:
    """Prepare without a face parser: a mask by words if that can be had, and no alignment."""
    from e4t_cli import mask_by_words

    frame = Frame.centered(image.size)
    picture = frame.apply(image, target.size)
    said, mask = "the face is not aligned", None
    if target.mask is not None:
        try:
            mask = mask_by_words(picture, WORDS, target)
            said += f", and its mask is what {WORDS!r} finds"
        except WeightsUnavailable:
            said += " and the whole picture counts in tuning"
    note = f"{said}: {reason.message}"
    return PreparedImage(image=picture, mask=mask, notes=(note,), frame=frame)


def _counted(count: int, which: str) -> str:
    if count == 1:
        return "1 face"
    used = {"left": "the left one", "right": "the right one", "largest": "the largest"}
    chosen = used.get(which, f"number {which} from the left")
    return f"{count} faces, {chosen} is used (--face largest, left, right or 1 to {count})"


def _covered(mask: Image) -> float:
    histogram = mask.histogram()
    return sum(value * count for value, count in enumerate(histogram)) / (255 * sum(histogram))


face = Domain(
    name="face",
    descriptor="face",  # section 3.1
    summary="one person, from one photo",
    tuning=TuningConfig(
        steps=15,  # section 3.5
        # Paper silent: the learning rate of tuning faces; this is pre-training's (section 3.5).
        base_learning_rate=1e-6,
        reg_weight=0.1,  # section 3.5
        mask=True,  # section 3.4
    ),
    pretraining=PretrainingConfig(
        steps=30_000,  # section 3.5
        base_learning_rate=1e-6,  # section 3.5
        reg_weight=0.01,  # section 3.3
    ),
    weights={
        "mini": "package:e4t_domains/packs/face/mini",
        # The only public weights of the method: of another program, converted when first used.
        "sd14": "e4t-diffusion:mkshing/e4t-diffusion-ffhq-celebahq-v1",
    },
    prepare=prepare,
    networks=(PUBLIC,),
    prompt_templates=(
        *SUBJECT_TEMPLATES,
        "a portrait of {}",
        "a portrait photo of {}",
        "the face of {}",
        "a photo of {} looking at the camera",
    ),
    licence="Apache-2.0",  # of the weights for `mini`: drawn by this project
)
