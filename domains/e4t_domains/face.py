"""The domain of faces: detected, aligned, and masked with a face segmentation network.

Photographs are rotated and cropped by the five points of a detector, as the training images were. The mask is that of
"an off-the-shelf face segmentation network" (section 3.4), applied to the aligned crop: such networks are trained on
nothing else. For the drawings of `mini` a small SegFormer of this package does both: its labels also locate eyes and
mouth. So does the public one for photographs where there is no detector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from e4t_cli import (
    SUBJECT_TEMPLATES,
    Domain,
    FoundSubject,
    Frame,
    InputError,
    PreparationTarget,
    PreparedImage,
    PretrainingConfig,
    TuningConfig,
    WeightsUnavailable,
)
from e4t_domains.face_detection import REPOSITORY, find_detector
from e4t_domains.face_parsing import PUBLIC, find_parser

if TYPE_CHECKING:
    from PIL.Image import Image

    from e4t_domains.face_detection import Detection, Detector

ELLIPSE = "face-ellipse"
OUTSIDE = "the chosen face is outside the centred square: without --no-align it is cropped around the face"
BY_PARSER = "the face was searched with the parser alone, which misses small and turned ones"
MIN_SHARED = 0.4  # part of the ellipse around a head that is in the parser's mask, or that is not the head's
WORDS = "a face"
MIN_HEAD = 0.01  # part of the prepared image; what is smaller, without clear eyes, is no face


class Located(Protocol):
    """A detection, in pixels of the photo."""

    @property
    def center(self) -> tuple[float, float]: ...
    @property
    def extent(self) -> float: ...
    @property
    def box(self) -> tuple[float, float, float, float]: ...
    @property
    def points(self) -> tuple[tuple[float, float], ...]: ...
    @property
    def score(self) -> float: ...


AnyFace = TypeVar("AnyFace", bound=Located)


def prepare(image: Image, target: PreparationTarget) -> PreparedImage:
    """Rotate and crop the photo around the face, and mask the head.

    Raises:
        InputError: a face is required and there is none, or fewer than requested.
    """
    centred = Frame.centered(image.size)
    if target.mask is None and not target.align and not target.required:
        return PreparedImage(image=centred.apply(image, target.size), frame=centred)
    try:
        detector = find_detector(target)
    except WeightsUnavailable as error:
        return _by_parser(image, target, error)
    return _by_parser(image, target) if detector is None else _by_detector(image, target, detector)


def _by_detector(image: Image, target: PreparationTarget, detector: Detector) -> PreparedImage:
    # Imported here: listing the domains detects no face.
    from e4t_domains.face_alignment import align, settle, spec_of
    from e4t_domains.face_detection import find_faces

    faces = find_faces(image, detector)
    if not faces:
        return _without_face(image, target)
    chosen, spec = choose(faces, target.which, image.size), spec_of(target.base)
    aligned = align(chosen, image.size, spec)
    square = settle(aligned, spec)
    frame = square if target.align else Frame.centered(image.size)
    notes, remarks, mask = [], [_counted(len(faces), target.which)], None
    if target.align:
        remarks.append(f"turned {abs(aligned.turn):.0f}°")
    if chosen.is_profile:
        notes.append("the face is seen from the side, as in a profile")
    if not frame.contains(chosen.center):
        notes.append(OUTSIDE)
    elif target.mask is not None:
        mask, note = _head_mask(image, target, chosen, square, frame, only_face=len(faces) == 1)
        notes += [note] if note else []
        kind = "elliptic mask" if note or target.mask == ELLIPSE else "mask"
        remarks.append(f"{kind} {_covered(mask):.0%}".replace("%", " %"))
    return PreparedImage(
        image=frame.apply(image, target.size),
        mask=mask,
        notes=tuple(notes),
        remarks=(", ".join(remarks),),
        frame=frame,
        found=_found(faces, chosen),
    )


def _head_mask(
    image: Image, target: PreparationTarget, chosen: Detection, square: Frame, frame: Frame, *, only_face: bool
) -> tuple[Image, str]:
    """Return the mask for `frame`, by the parser on the aligned square, and a note if it is an ellipse instead."""
    from e4t_domains.face_detection import GREY
    from e4t_domains.face_mask import cut_at_border, ellipse, moved, parsed_head, shares

    usual = ellipse(chosen, frame, target.size)
    if target.mask == ELLIPSE:
        return cut_at_border(usual, frame), ""
    try:
        parser = find_parser(target)
    except WeightsUnavailable as error:
        return cut_at_border(usual, frame), f"the mask is an ellipse around the head: {error.message}"
    (labels,) = parser.parse([square.apply(image, parser.side or target.size, outside=GREY)])
    parsed = parsed_head(labels, target.size, None if only_face else square.from_photo(chosen.center))
    mask = cut_at_border(moved(parsed, square, frame, target.size), frame)
    if shares(mask, usual) < MIN_SHARED:
        note = "the parser finds no head where the face is: the mask is an ellipse around it"
        return cut_at_border(usual, frame), note
    return mask, ""


def _by_parser(
    image: Image, target: PreparationTarget, no_detector: WeightsUnavailable | None = None
) -> PreparedImage:
    """Prepare without a detector, for the reason given; drawings need none."""
    from e4t_domains.face_alignment import settle, spec_of
    from e4t_domains.face_mask import cut_at_border, ellipse
    from e4t_domains.face_search import MIN_CONFIDENCE, FaceDetector

    reason = "" if no_detector is None else no_detector.message
    reason += f" ({no_detector.hint})" if no_detector is not None and no_detector.hint else ""
    centred = Frame.centered(image.size)
    try:
        parser = find_parser(target)
    except WeightsUnavailable as error:
        if target.required:
            raise no_detector or error from None
        return _by_words(image, target, f"{error.message}; {reason}" if reason else error.message)
    spec = spec_of(target.base)
    detector = FaceDetector(image, parser, spec, target.size)
    faces = detector.detect()
    if not faces:
        return _without_face(image, target, reason)
    chosen = detector.refine(choose(faces, target.which, image.size))
    reliable = detector.is_reliable(chosen)
    profile = len(chosen.face.eyes) == 1 and chosen.face.confidence >= MIN_CONFIDENCE
    frame, notes, remarks = centred, [], [_counted(len(faces), target.which)]
    if reason:
        notes.append(f"{BY_PARSER}: {reason}")
    if target.align:
        if reliable:
            frame = settle(chosen.frame, spec)
            remarks.append(f"turned {abs(chosen.frame.turn):.0f}°")
        elif profile:
            frame = settle(chosen.frame, spec)
            notes.append("one eye is visible, as in a profile: cropped around the head, not turned")
        elif len(faces) > 1 or not centred.contains(chosen.center):
            frame = settle(chosen.head_frame(spec), spec)
            notes.append("eyes and mouth are not clearly visible: cropped around the head, not turned")
        else:
            notes.append("eyes and mouth are not clearly visible: the face is not aligned")
    sure = reliable or profile
    mask = None
    if not frame.contains(chosen.center):
        notes.append(OUTSIDE)
    elif target.mask is not None or not sure:
        head = detector.head_mask(frame, chosen.center, only_face=len(faces) == 1)
        if not sure and _covered(head) < MIN_HEAD:
            # Parsers take parts of many things for skin, in one view and not in the next.
            return _without_face(image, target, reason)
        if target.mask == ELLIPSE and reliable:
            head = cut_at_border(ellipse(chosen, frame, target.size), frame)
        elif target.mask == ELLIPSE:
            notes.append("eyes and mouth are not clearly visible: the mask is the parser's, no ellipse")
        if target.mask is not None:
            mask = head
            remarks.append(f"mask {_covered(mask):.0%}".replace("%", " %"))
    return PreparedImage(
        image=frame.apply(image, target.size),
        mask=mask,
        notes=tuple(notes),
        remarks=(", ".join(remarks),),
        frame=frame,
        found=_found(faces, chosen),
    )


def choose(faces: Sequence[AnyFace], which: str, size: tuple[int, int]) -> AnyFace:
    """Return one of several faces.

    Args:
        faces: at least one, detections of either kind.
        which: "largest", "left", "right", "center", or a number from 1 on, from left to right.
        size: of the photo.

    Raises:
        InputError: the number is larger than that of the faces.
    """
    if which == "largest":
        return max(faces, key=lambda one: one.extent)
    if which == "center":
        return min(faces, key=lambda one: math.dist(one.center, (size[0] / 2, size[1] / 2)))
    ordered = sorted(faces, key=lambda one: one.center)
    number = {"left": 1, "right": len(faces)}.get(which) or int(which)
    if number > len(faces):
        count = "is 1 face" if len(faces) == 1 else f"are {len(faces)} faces"
        hint = "--face 1 is leftmost; e4t faces PHOTO shows the numbers, of drawings with --base mini"
        raise InputError(f"there {count} in the image, not {number}", hint=hint)
    return ordered[number - 1]


def _found(faces: Sequence[Located], chosen: Located) -> tuple[FoundSubject, ...]:
    """Return the faces as the library knows them, from left to right; `chosen` was refined since."""
    nearest = min(faces, key=lambda one: math.dist(one.center, chosen.center))
    ordered = [chosen if one is nearest else one for one in sorted(faces, key=lambda one: one.center)]
    return tuple(
        FoundSubject(box=one.box, points=one.points, score=one.score, chosen=one is chosen) for one in ordered
    )


def _without_face(image: Image, target: PreparationTarget, reason: str = "") -> PreparedImage:
    if target.required:
        raise InputError("there is no face in the image", hint="take another photo")
    frame = Frame.centered(image.size)
    notes = ["no face was found: the whole image counts in tuning"]
    notes += [f"{BY_PARSER}: {reason}"] if reason else []
    return PreparedImage(image=frame.apply(image, target.size), notes=tuple(notes), frame=frame)


def _by_words(image: Image, target: PreparationTarget, reason: str) -> PreparedImage:
    """Prepare without detector and parser: a mask by text if CLIPSeg is available, and no alignment."""
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
    note = f"{about}: {reason}"
    return PreparedImage(image=cropped, mask=mask, notes=(note,), frame=frame)


def _counted(count: int, which: str) -> str:
    if count == 1:
        return "1 face"
    used = {"left": "the left one", "right": "the right one", "largest": "the largest", "center": "the central one"}
    chosen = used.get(which, f"number {which} from the left")
    return f"{count} faces, {chosen} is used (--face largest, left, right, center or 1 to {count})"


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
    networks=(PUBLIC, REPOSITORY),
    prompt_templates=(
        *SUBJECT_TEMPLATES,
        "a portrait of {}",
        "a portrait photo of {}",
        "the face of {}",
        "a photo of {} looking at the camera",
    ),
    licence="Apache-2.0",  # of the weights for `mini`: drawn by this project
)
