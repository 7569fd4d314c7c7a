"""Prepares a photo: the square crop that the domain makes, with the mask of the concept.

The mask comes from, in this order: the user's file, the user's text prompt, the photo's alpha channel, the domain's
preparation, the domain's text prompt. Text prompts are segmented by CLIPSeg (Lüddecke and Ecker, 2022).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from e4t_cli.devices import quiet_libraries
from e4t_cli.errors import E4TError, InputError, IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.hub.download import fetch_files
from e4t_cli.hub.paths import HubAccess, Terms, accept
from e4t_cli.hub.repo_info import get_repo_info
from e4t_cli.images.decoding import OpenedImage
from e4t_cli.images.loading import MIN_COVERAGE, center_square, mask_coverage, prepare_image
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

if TYPE_CHECKING:
    import numpy as np
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

CLIPSEG = "CIDAS/clipseg-rd64-refined"
FILES = ("*.json", "*.safetensors")
FILES_OF = {
    CLIPSEG: (*FILES, "merges.txt"),
    # Of several precisions; ONNX is protobuf, which holds no code. The domain compares the file's SHA-256.
    "opencv/face_detection_yunet": ("face_detection_yunet_2023mar.onnx",),
}
# Terms of a repository beside the licence it states.
KNOWN_TERMS = {"jonathandinu/face-parsing": "made from SegFormer weights and CelebAMask-HQ: for research"}
MIN_PROBABILITY = 0.4  # a pixel above it belongs to the mask; CLIPSeg's probabilities are rarely above 0.8


@dataclass(frozen=True, kw_only=True)
class MaskSource:
    """The part of the photo that is the concept, as requested."""

    # "auto": the photo and the domain decide, "none": all of it
    kind: Literal["auto", "none", "words", "image", "face-ellipse"]
    words: str = ""  # a text prompt for it, "" for the domain's
    image: Image.Image | None = None  # a mask, white on it: mode L, of the photo's proportions


def prepare_photo(
    domain: Domain, photo: OpenedImage, mask: MaskSource, target: PreparationTarget, *, masked: bool
) -> PreparedImage:
    """Run the domain's preparation on a photo, with the requested mask.

    Args:
        domain: its preparation crops and turns.
        photo: its notes come first in the result.
        mask: the user's request.
        target: what the base needs; its `mask` is ignored.
        masked: whether the domain's tuning uses a mask.

    Raises:
        UsageError: a mask by text is requested, and there is no text prompt; or an ellipse around no face.
        InputError: nearly nothing in the photo's square is opaque.
        WeightsUnavailable: the network for it is not on this machine.
        E4TError: the domain's function failed.
    """
    alpha = photo.alpha if mask.kind == "auto" else None
    automatic = mask.kind == "auto" and alpha is None
    if mask.kind == "face-ellipse" and domain.prepare is None:
        raise UsageError(f"the domain {domain.name!r} looks for no face", hint="leave --mask face-ellipse out")
    kind = mask.kind if mask.kind == "face-ellipse" else "auto" if automatic else None
    prepared = prepare_image(domain, photo.image, replace(target, mask=kind))
    if mask.image is not None and mask.kind == "image":
        prepared = with_mask(prepared, photo.image, mask.image)
    elif mask.kind == "words":
        words = mask.words or domain.mask_words
        if not words:
            hint = '--mask "words:a cat" finds a cat'
            raise UsageError(f"the domain {domain.name!r} has no words for its mask", hint=hint)
        prepared = _with_text_mask(prepared, words, target)
    elif alpha is not None:
        prepared = with_mask(prepared, photo.image, alpha)
        if prepared.mask is None:  # white, which nothing is to be learned from
            message = "less than 1 % of the photo's square is opaque"
            raise InputError(message, hint="crop the photo around what is opaque, or give it a background")
        remark = "the photo is transparent in places: what is opaque is the concept"
        prepared = replace(prepared, remarks=(*prepared.remarks, remark))
    elif automatic and masked and prepared.mask is None and domain.mask_words:
        try:
            prepared = _with_text_mask(prepared, domain.mask_words, target)
        except WeightsUnavailable as error:
            note = f"there is no mask, the whole image counts in tuning: {error.message}"
            prepared = replace(prepared, notes=(*prepared.notes, note))
    return replace(prepared, notes=(*photo.notes, *prepared.notes))


def with_mask(prepared: PreparedImage, photo: Image.Image, mask: Image.Image) -> PreparedImage:
    """Return the preparation of `photo` with a mask (mode L, of the photo's proportions), cropped and turned alike."""
    size, notes, image = prepared.image.width, prepared.notes, prepared.image
    if prepared.frame is not None:
        cropped = prepared.frame.apply_to_mask(mask, size)
    else:
        cropped, square = center_square(mask, size), center_square(photo, size)
        if square.tobytes() != image.tobytes():
            # The domain does not return its frame, and a mask must lie on the right pixels.
            notes = (*notes, "with a mask of your own the centred square is used")
            image = square
    return _checked(replace(prepared, image=image, mask=cropped, notes=notes), "the mask covers")


def _with_text_mask(prepared: PreparedImage, words: str, target: PreparationTarget) -> PreparedImage:
    mask = mask_by_words(prepared.image, words, target)
    found = _checked(replace(prepared, mask=mask), f"the words {words!r} were found in")
    remark = f"{words!r}: mask {mask_coverage(mask):.0%}"
    return found if found.mask is None else replace(found, remarks=(*found.remarks, remark))


def _checked(prepared: PreparedImage, found: str) -> PreparedImage:
    """Leave out a mask over nearly nothing: the loss divides by its area."""
    if prepared.mask is None or mask_coverage(prepared.mask) >= MIN_COVERAGE:
        return prepared
    note = f"{found} less than 1 % of the image: the whole image counts in tuning"
    return replace(prepared, mask=None, notes=(*prepared.notes, note))


def snapshot_downloader(access: HubAccess) -> Callable[[str], Path]:
    """Return a function for `PreparationTarget.fetch`: repository in, snapshot folder out.

    A failure is cached, so that ten thousand images do not each wait for an unreachable network.
    """
    failures: dict[str, E4TError] = {}

    def fetch(repository: str) -> Path:
        if repository in failures:
            raise failures[repository]
        try:
            return _fetch_snapshot(repository, access)
        except E4TError as error:
            failures[repository] = error
            raise

    return fetch


def _fetch_snapshot(repository: str, access: HubAccess) -> Path:
    """Return the folder of a network; it is fetched, its licence accepted, if it is not here."""
    files, again = FILES_OF.get(repository, FILES), "the same command without --offline"
    try:
        return fetch_files(repository, None, files, replace(access, offline=True), command=again)
    except (WeightsUnavailable, IntegrityError):
        if access.cut_off:
            raise
    # No commit is pinned: the hub's "main" is resolved once, and that commit remembered.
    info = get_repo_info(repository, None, access)
    licence, note = info.licence if info else "", KNOWN_TERMS.get(repository, "")
    accept(Terms(repository=repository, licence=licence, note=note), access)
    return fetch_files(repository, None, files, access, repair=True, command=again)


def mask_by_words(image: Image.Image, words: str, target: PreparationTarget) -> Image.Image:
    """Return a mask of mode L, 255 where the image (RGB, any size) shows what the words describe, such as "a cat".

    Raises:
        WeightsUnavailable: the network is not on this machine and cannot be fetched.
        IntegrityError: its files do not fit.
    """
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    if target.fetch is None:
        raise WeightsUnavailable(f"masks by words need {CLIPSEG}, which cannot be fetched here")
    model, tokenizer, side, mean, deviation = _load_clipseg(target.fetch(CLIPSEG), target.device)
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(small, dtype=np.float32) / (255 * deviation)
    pixels = (pixels - mean / deviation).astype(np.float32)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, side, side)
    tokens = tokenizer([words], return_tensors="pt", truncation=True).to(target.device)
    with torch.inference_mode():
        logits = model(pixel_values=batch.to(target.device), **tokens).logits
        probability = logits.reshape(1, 1, *logits.shape[-2:]).float().sigmoid()
        probability = interpolate(probability, size=(image.height, image.width), mode="bilinear", align_corners=False)
    inside = (probability[0, 0] >= MIN_PROBABILITY).cpu().numpy()
    return Image.fromarray((inside * 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _load_clipseg(
    folder: Path, device: str
) -> tuple[CLIPSegForImageSegmentation, CLIPTokenizer, int, np.ndarray, np.ndarray]:
    """Return the model, its tokenizer, the side of its images, and the mean and deviation they are normalized by."""
    import numpy as np
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

    model = load_segmenter(CLIPSegForImageSegmentation, folder, CLIPSEG)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = config["size"]
        side = int(size["height"] if isinstance(size, dict) else size)
        mean, deviation = (np.array(config[key], np.float32) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{CLIPSEG} cannot be used: {error}") from error
    return model.to(device), tokenizer, side, mean, deviation


def load_segmenter(kind: Any, folder: Path, what: str) -> Any:
    """Load a segmentation network of transformers, completely or not at all.

    Args:
        kind: its class.
        folder: as `save_pretrained` writes it; safetensors only.
        what: its name in error messages.

    Raises:
        IntegrityError: it cannot be read, or weights are missing or of other shapes.
    """
    import torch

    try:
        with quiet_libraries:
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{what} cannot be used: {error}") from error
    # transformers initializes missing weights at random; superfluous ones are harmless.
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise IntegrityError(f"{what} does not fit: {wrong[0]}")
    return model.eval()
