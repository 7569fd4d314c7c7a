"""The domain of faces: aligned and masked with a face segmentation network.

The mask is that of "an off-the-shelf face segmentation network" (section 3.4): a small SegFormer of
this package for the base `mini`, the public one for photographs. Its labels also locate eyes and
mouth, by which the photo is rotated and cropped as the training images were.
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
    """Rotate and crop the photo around the face, and mask the head.

    Raises:
        InputError: a face is required and there is none, or fewer than requested.
    """
    # Imported here: listing the domains detects no face.
    from e4t_domains.face_alignment import settle, spec_of
    from e4t_domains.face_detection import MIN_CONFIDENCE, FaceDetector, choose

    centred = Frame.centered(image.size)
    if target.mask is None and not target.align and not target.required:
        return PreparedImage(image=centred.apply(image, target.size), frame=centred)
    try:
        parser = find_parser(target)
    except WeightsUnavailable as error:
        if target.required:
            raise
        return _by_words(image, target, error)
    spec = spec_of(target.base)
    detector = FaceDetector(image, parser, spec, target.size)
    faces = detector.detect()
    if not faces:
        if target.required:
            raise InputError("there is no face in the image", hint="take another photo")
        note = "no face was found: the whole image counts in tuning"
        cropped = centred.apply(image, target.size)
        return PreparedImage(image=cropped, notes=(note,), frame=centred)
    chosen = detector.refine(choose(faces, target.which))
    frame, notes, remarks = centred, [], [_counted(len(faces), target.which)]
    if target.align:
        if detector.is_reliable(chosen):
            frame = settle(chosen.frame, spec)
            remarks.append(f"turned {abs(chosen.frame.turn):.0f}°")
        elif len(chosen.face.eyes) == 1 and chosen.face.confidence >= MIN_CONFIDENCE:
            frame = settle(chosen.frame, spec)
            notes.append("one eye is visible, as in a profile: cropped around the head, not turned")
        elif len(faces) > 1 or not centred.contains(chosen.center):
            frame = settle(chosen.head_frame(spec), spec)
            notes.append("eyes and mouth are not clearly visible: cropped around the head, not turned")
        else:
            notes.append("eyes and mouth are not clearly visible: the face is not aligned")
    mask = None
    if not frame.contains(chosen.center):
        notes.append("the chosen face is outside the centred square: without --no-align it is cropped around the face")
    elif target.mask is not None:
        mask = detector.head_mask(frame, chosen.center, only_face=len(faces) == 1)
        remarks.append(f"mask {_covered(mask):.0%}".replace("%", " %"))
    return PreparedImage(
        image=frame.apply(image, target.size),
        mask=mask,
        notes=tuple(notes),
        remarks=(", ".join(remarks),),
        frame=frame,
    )


def _by_words(image: Image, target: PreparationTarget, reason: WeightsUnavailable) -> PreparedImage:
    """Prepare without a face parser: a mask by text if CLIPSeg is available, and no alignment."""
    from e4t_cli import mask_by_words

    frame = Frame.centered(image.size)
    cropped = frame.apply(image, target.size)
    about, mask = "the face is not aligned", None
    if target.mask is not None:
        try:
            mask = mask_by_words(cropped, WORDS, target)
            about += f", and its mask is what {WORDS!r} finds"
        except WeightsUnavailable:
            about += " and the whole image counts in tuning"
    note = f"{about}: {reason.message}"
    return PreparedImage(image=cropped, mask=mask, notes=(note,), frame=frame)


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
        # The only public weights of the method, of another program: converted when first used.
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
