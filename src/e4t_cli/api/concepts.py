"""`personalize` and `generate`: a photo in, a concept and its pictures out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from e4t_cli.api.choices import choose_base, choose_seed, find_pack, parse_prompts, with_steps
from e4t_cli.bases import find_base
from e4t_cli.domain import Domain, PreparationTarget
from e4t_cli.errors import UsageError
from e4t_cli.images import prepare_image
from e4t_cli.photos import Picture, open_own_mask, open_picture, with_mask
from e4t_cli.progress import ProgressCallback
from e4t_cli.prompts import PLACEHOLDER, check_placeholder
from e4t_cli.registry import find_domain, user_domain
from e4t_cli.results import GeneratedImage, Personalization
from e4t_cli.session import Session, choose_sampling

if TYPE_CHECKING:
    from e4t_cli.base_model import TextToImageModel
    from e4t_cli.concept import Concept
    from e4t_cli.generation import Sampling

ImageCallback = Callable[[GeneratedImage], None]


def personalize(
    domain: str | Domain,
    image: Picture,
    prompts: str | Sequence[str] = (),
    *,
    images_per_prompt: int = 1,
    seed: int | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    tune_steps: int | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    mask: Picture = "auto",
    placeholder: str = PLACEHOLDER,
    keep_weights: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: ProgressCallback | None = None,
    on_image: ImageCallback | None = None,
) -> Personalization:
    """Learn one concept from one photo and draw it (section 3.4).

    Args:
        domain: "face", "cat", "art", any installed domain, a domain's folder, or a `Domain`.
        image: the photo: a path, "-" for stdin, bytes, an open binary file, or a PIL image.
        prompts: sentences with the placeholder where the concept goes; none only makes the
            concept.
        images_per_prompt: picture i of every prompt has the seed `seed + i`.
        seed: of tuning and of the first picture; None takes a random one, and reports it.
        base: a name, a folder in diffusers' layout, or a model that is loaded already.
        tune_steps: instead of the recipe's; 0 keeps the encoder's first guess.
        sampling: how pictures are drawn, as `Sampling` or as a mapping of some of its fields.
        mask: "auto" as the domain does, "none", or a picture that is white where the concept is.
        placeholder: what the prompts call the concept.
        keep_weights: keep the tuned tensors in the concept: larger, but drawn without tuning.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "fp32", "bf16", "fp16".
        on_progress: called from every stage: load, prepare, tune, generate.
        on_image: called with each picture as soon as it is there.

    Raises:
        E4TError: one of its children, each one sentence (errors.py).
    """
    parsed = parse_prompts(prompts, placeholder)
    start = choose_seed(seed, images_per_prompt)
    value = find_domain(domain) if isinstance(domain, str) else domain
    opened = open_picture(image)
    own_mask = None if mask in ("auto", "none") else open_own_mask(mask, opened.image)
    place = choose_base(base)
    pack = find_pack(value, place)
    session = Session(device, dtype, on_progress)
    with session.running():
        drawing = choose_sampling(sampling)
        session.load(place, pack)
        session.check_prompts(parsed)
        model, pretrained = session.model, session.pretrained
        recipe = pretrained.tuning
        if mask != "auto":
            recipe = recipe.replace(mask=own_mask is not None)
        if tune_steps is not None:
            recipe = with_steps(recipe, tune_steps)
        with session.stage("prepare"):
            target = PreparationTarget(
                size=model.resolution,
                base=model.base.name,
                mask="auto" if mask == "auto" else None,
            )
            prepared = prepare_image(value, opened.image, target)
            if own_mask is not None:
                prepared = with_mask(prepared, opened.image, own_mask)
            for note in (*opened.notes, *prepared.notes):
                session.note("prepare", note)
            features = model.image_features(model.pixels([prepared.image]))[0].cpu()

        from e4t_cli.concept import Concept

        concept = Concept(
            domain=value.name,
            descriptor=pretrained.descriptor,
            base_name=model.base.name,
            base_fingerprint=model.fingerprint,
            pack_digest=pretrained.digest,
            prepared=prepared,
            image_features=features,
            recipe=recipe,
            seed=start,
            image_sha256=opened.sha256,
            placeholder=check_placeholder(placeholder),
        )
        tuned = session.tune(concept)
        if keep_weights:
            concept = replace(concept, weights=Concept.kept(tuned))
        return session.draw(
            concept,
            tuned,
            parsed,
            count=images_per_prompt,
            seed=start,
            sampling=drawing,
            on_image=on_image,
        )


def generate(
    concept: Concept | str | os.PathLike[str],
    prompts: str | Sequence[str],
    *,
    images_per_prompt: int = 1,
    seed: int | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    sampling: Sampling | Mapping[str, Any] | None = None,
    placeholder: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: ProgressCallback | None = None,
    on_image: ImageCallback | None = None,
) -> Personalization:
    """Draw a concept again: tuned once more to the same bits, unless its weights were kept.

    Args:
        concept: from `personalize`, or the file it was saved to.
        placeholder: the concept's own by default.
        base: where the base is; "auto" finds the one the concept was made on by its name.

    The other arguments are those of `personalize`.

    Raises:
        IntegrityError: this machine's base or pack is not the one the concept was made with.
        E4TError: another of its children.
    """
    start = choose_seed(seed, images_per_prompt)
    if placeholder is not None:
        parse_prompts(prompts, placeholder)
    session = Session(device, dtype, on_progress)
    with session.running():
        from e4t_cli.concept import Concept

        if not isinstance(concept, Concept):
            concept = Concept.load(concept)
        parsed = parse_prompts(prompts, placeholder or concept.placeholder)
        value = _domain_of(concept)
        place = choose_base(concept.base_name if base == "auto" else base)
        drawing = choose_sampling(sampling)
        session.load(place, find_pack(value, place))
        session.check_prompts(parsed)
        concept.check(session.model, session.pretrained)
        tuned = concept.tuned(session.model, session.pretrained) or session.tune(concept)
        return session.draw(
            concept,
            tuned,
            parsed,
            count=images_per_prompt,
            seed=start,
            sampling=drawing,
            on_image=on_image,
        )


def plan(
    domain: str | Domain,
    image: Picture,
    prompts: str | Sequence[str] = (),
    *,
    images_per_prompt: int = 1,
    base: str | os.PathLike[str] = "auto",
    placeholder: str = PLACEHOLDER,
) -> dict[str, Any]:
    """Say what `personalize` would do, checking all that can be checked without torch.

    Raises:
        E4TError: as `personalize`.
    """
    parsed = parse_prompts(prompts, placeholder)
    value = find_domain(domain) if isinstance(domain, str) else domain
    photo = open_picture(image).image
    place = find_base(base)
    pack = user_domain(find_pack(value, place))
    return {
        "domain": value.name,
        "descriptor": value.descriptor,
        "base": place.name,
        "photo": f"{photo.width}×{photo.height}",
        "prompts": len(parsed),
        "pictures": len(parsed) * images_per_prompt,
        "size": f"{place.resolution}×{place.resolution}",
        "tuning": pack.tuning.as_dict(),
    }


def _domain_of(concept: Concept) -> Domain:
    try:
        return find_domain(concept.domain)
    except UsageError as error:
        message = f"this concept needs the domain {concept.domain!r}: {error.message}"
        raise UsageError(message, hint=error.hint) from error
