"""Masks by words: which pixels of a picture show "a cat".

CLIPSeg (Lüddecke and Ecker, 2022) through transformers. Any domain may ask for it, and so may a
user: `--mask "words:a cat"`. Its files come from the hub once; the network stays in memory.

A photo, a domain and a wish about the mask in; the prepared square and its mask out.

Where the mask comes from, in this order: the user's file, the user's words, the photo's own
transparency, the domain's preparation, the domain's words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from e4t_cli.errors import E4TError, IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.hub.download import fetch_files, get_repo_info
from e4t_cli.hub.paths import HubAccess, Terms, accept
from e4t_cli.images.loading import (
    MIN_COVERAGE,
    OpenedImage,
    center_square,
    mask_coverage,
    prepare_image,
)
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage

if TYPE_CHECKING:
    from PIL.Image import Image

WORDS_MODEL = "CIDAS/clipseg-rd64-refined"
FILES = ("*.json", "*.safetensors")
KNOWN_TERMS = {
    "jonathandinu/face-parsing": "made from SegFormer weights and CelebAMask-HQ: for research",
}
"""What should be known about a repository beside the licence it states."""
MIN_PROBABILITY = 0.4
"""A pixel above it belongs to what the words say. CLIPSeg is rarely surer than 0.8."""


def fetcher(access: HubAccess) -> Callable[[str], Path]:
    """Return what `PreparationTarget.fetch` promises: a hub repository's name in, a folder out.

    A failure is remembered, so that ten thousand pictures do not wait for a dead network each.

    Args:
        access: how the hub may be used, and who is told and asked.
    """
    failures: dict[str, E4TError] = {}

    def fetch(repository: str) -> Path:
        if repository in failures:
            raise failures[repository]
        try:
            return _provide(repository, access)
        except E4TError as error:
            failures[repository] = error
            raise

    return fetch


def _provide(repository: str, access: HubAccess) -> Path:
    """Return the folder of a network that is here; fetch it, its licence accepted, if it is not."""
    files = (*FILES, "merges.txt") if repository == WORDS_MODEL else FILES
    try:
        return fetch_files(repository, None, files, replace(access, offline=True))
    except (WeightsUnavailable, IntegrityError):
        if access.cut_off:
            raise
    # No commit is pinned: the hub's "main" is resolved once, and that commit remembered.
    info = get_repo_info(repository, None, access)
    licence, note = info.licence if info else "", KNOWN_TERMS.get(repository, "")
    accept(Terms(repository=repository, licence=licence, note=note), access)
    return fetch_files(repository, None, files, access, repair=True)


def mask_by_words(image: Image, words: str, target: PreparationTarget) -> Image:
    """Return a mask of mode L, 255 where the picture shows what the words say.

    Args:
        image: mode RGB, any size.
        words: such as "a cat".
        target: says where the network may come from and run.

    Raises:
        WeightsUnavailable: the network is not on this machine and cannot be fetched.
        IntegrityError: its files do not fit.
    """
    import numpy as np
    import torch
    from PIL import Image as PILImage

    if target.fetch is None:
        raise WeightsUnavailable(f"masks by words need {WORDS_MODEL}, which is not at hand")
    model, tokenizer, side, mean, deviation = _load(target.fetch(WORDS_MODEL), target.device)
    small = image.resize((side, side), PILImage.Resampling.BICUBIC)
    pixels = np.asarray(small, dtype=np.float32) / (255 * deviation) - mean / deviation
    batch = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).permute(2, 0, 1)[None]
    tokens = tokenizer([words], return_tensors="pt", truncation=True)
    with torch.inference_mode():
        logits = model(
            pixel_values=batch.to(target.device),  # (1, 3, side, side)
            input_ids=tokens["input_ids"].to(target.device),
            attention_mask=tokens["attention_mask"].to(target.device),
        ).logits
        probability = logits.reshape(1, 1, *logits.shape[-2:]).float().sigmoid()
        probability = torch.nn.functional.interpolate(
            probability, size=(image.height, image.width), mode="bilinear", align_corners=False
        )
    inside = (probability[0, 0] >= MIN_PROBABILITY).cpu().numpy()
    return PILImage.fromarray((inside * 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> tuple[Any, Any, int, Any, Any]:
    """Return the model, its tokenizer, and how pictures are brought before it."""
    import numpy as np
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

    model = load_segmenter(CLIPSegForImageSegmentation, folder, WORDS_MODEL)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        plan = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = plan["size"]
        side = int(size["height"] if isinstance(size, dict) else size)
        mean, deviation = (np.array(plan[key], np.float32) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{WORDS_MODEL} cannot be used: {error}") from error
    return model.to(device), tokenizer, side, mean, deviation


def load_segmenter(kind: Any, folder: Path, what: str) -> Any:
    """Load a segmentation network of transformers, whole or not at all.

    Args:
        kind: its class.
        folder: as `save_pretrained` writes it; safetensors only.
        what: what to call it if it does not load.

    Raises:
        IntegrityError: it cannot be read, or weights are missing or of other shapes.
    """
    import torch
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{what} cannot be used: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # transformers would go on with random numbers; more than it needs does not hurt.
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise IntegrityError(f"{what} does not fit: {wrong[0]}")
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class MaskSource:
    """Which part of the photo the user says is the concept.

    Args:
        kind: "auto" leaves it to the photo and the domain, "none" is all of it, "words" what the
            words say, "own" what is white in a picture.
        words: of kind "words".
        picture: of kind "own": mode L, of the photo's proportions.
    """

    kind: Literal["auto", "none", "words", "own"]
    words: str = ""
    picture: Image.Image | None = None


def prepare_photo(
    domain: Domain,
    photo: OpenedImage,
    mask: MaskSource,
    target: PreparationTarget,
    *,
    masked: bool,
) -> PreparedImage:
    """Prepare a photo as its domain does, with the mask that was asked for.

    Args:
        domain: whose preparation crops and turns.
        photo: opened.
        mask: what the user wants.
        target: what the base needs; its own `mask` is not looked at.
        masked: whether the domain's recipe uses a mask.

    Returns:
        The prepared picture, with the photo's own notes before its own.

    Raises:
        UsageError: words are wanted, and there are none.
        WeightsUnavailable: the network that finds by words is not here.
        E4TError: the domain's function failed.
    """
    opaque = photo.alpha is None or mask.kind != "auto"
    automatic = mask.kind == "auto" and opaque
    wanted = replace(target, mask="auto" if automatic else None)
    prepared = prepare_image(domain, photo.image, wanted)
    if mask.kind == "own":
        assert mask.picture is not None
        prepared = with_mask(prepared, photo.image, mask.picture)
    elif mask.kind == "words":
        words = mask.words or domain.mask_words
        if not words:
            raise UsageError(
                f"the domain {domain.name!r} has no words for its mask",
                hint='--mask "words:a cat" says what to look for',
            )
        prepared = _with_words(prepared, words, target)
    elif not opaque:
        assert photo.alpha is not None
        prepared = with_mask(prepared, photo.image, photo.alpha)
        remark = "the photo is transparent in places: what is opaque is the concept"
        prepared = replace(prepared, remarks=(*prepared.remarks, remark))
    elif automatic and masked and prepared.mask is None and domain.mask_words:
        try:
            prepared = _with_words(prepared, domain.mask_words, target)
        except WeightsUnavailable as error:
            note = f"there is no mask, the whole picture counts in tuning: {error.message}"
            prepared = replace(prepared, notes=(*prepared.notes, note))
    return replace(prepared, notes=(*photo.notes, *prepared.notes))


def with_mask(prepared: PreparedImage, photo: Image.Image, mask: Image.Image) -> PreparedImage:
    """Put a mask that lies on the photo onto the prepared picture, cropped and turned alike.

    Args:
        prepared: of `photo`.
        photo: before its preparation.
        mask: mode L, of the photo's proportions.
    """
    size, notes, image = prepared.image.width, prepared.notes, prepared.image
    if prepared.frame is not None:
        cut = prepared.frame.apply_to_mask(mask, size)
    else:
        cut = center_square(mask, size)
        square = center_square(photo, size)
        if square.tobytes() != image.tobytes():
            # Where the domain looked, only the domain knows; a mask must lie on the right pixels.
            notes = (*notes, "with a mask of your own the centred square is used")
            image = square
    return _checked(replace(prepared, image=image, mask=cut, notes=notes), "the mask covers")


def _with_words(prepared: PreparedImage, words: str, target: PreparationTarget) -> PreparedImage:
    mask = mask_by_words(prepared.image, words, target)
    found = _checked(replace(prepared, mask=mask), f"the words {words!r} were found in")
    if found.mask is None:
        return found
    remark = f"{words!r}: mask {mask_coverage(mask):.0%}"
    return replace(found, remarks=(*found.remarks, remark))


def _checked(prepared: PreparedImage, found: str) -> PreparedImage:
    """Leave out a mask over nearly nothing: the loss divides by its area."""
    if prepared.mask is None or mask_coverage(prepared.mask) >= MIN_COVERAGE:
        return prepared
    note = f"{found} less than 1 % of the picture: the whole picture counts in tuning"
    return replace(prepared, mask=None, notes=(*prepared.notes, note))
