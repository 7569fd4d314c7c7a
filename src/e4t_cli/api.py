"""The library: names and paths in, results out. Nothing here prints, and nothing exits.

`personalize` is prepare + tune + generate; `generate` draws a saved concept again; `pretrain`
makes a domain from a folder of pictures. What can be wrong with a request is found before torch
is imported, and what can be wrong with the files before any picture is drawn.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .bases import Base, find_base
from .domain import (
    Domain,
    PreparationTarget,
    PreparedImage,
    PretrainingRecipe,
    TuningRecipe,
    check_name,
)
from .errors import E4TError, UsageError, printable
from .images import prepare_image
from .photos import (
    Picture,
    list_pictures,
    open_own_mask,
    open_picture,
    prepared_pictures,
    with_mask,
)
from .progress import ProgressCallback
from .prompts import PLACEHOLDER, Prompt, check_placeholder, parse_prompt, training_templates
from .registry import (
    find_domain,
    installed_domains,
    user_domain,
    user_domains_folder,
    weights_folder,
)
from .results import GeneratedImage, Personalization
from .session import Session, choose_sampling, memory_errors, quiet_libraries

if TYPE_CHECKING:
    from .base_model import TextToImageModel
    from .concept import Concept
    from .generation import Sampling

ImageCallback = Callable[[GeneratedImage], None]

_R = TypeVar("_R", TuningRecipe, PretrainingRecipe)

MOST_SEED = 2**32 - 1
"""The largest seed that other programs' metadata readers take."""


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
    parsed = _parse(prompts, placeholder)
    start = _choose_seed(seed, images_per_prompt)
    value = find_domain(domain) if isinstance(domain, str) else domain
    opened = open_picture(image)
    own_mask = None if mask in ("auto", "none") else open_own_mask(mask, opened.image)
    place = _find_base(base)
    session = Session(place, find_pack(value, place), device, dtype, on_progress)
    with memory_errors(), quiet_libraries():
        drawing = choose_sampling(sampling)
        session.load()
        session.check_prompts(parsed)
        model, pretrained = session.model, session.pretrained
        recipe = pretrained.tuning
        if mask != "auto":
            recipe = recipe.replace(mask=own_mask is not None)
        if tune_steps is not None:
            recipe = _with_steps(recipe, tune_steps)
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

        from .concept import Concept

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
    start = _choose_seed(seed, images_per_prompt)
    if placeholder is not None:
        _parse(prompts, placeholder)
    with memory_errors(), quiet_libraries():
        from .concept import Concept

        if not isinstance(concept, Concept):
            concept = Concept.load(concept)
        parsed = _parse(prompts, placeholder or concept.placeholder)
        value = _domain_of(concept)
        place = _find_base(concept.base_name if base == "auto" else base)
        session = Session(place, find_pack(value, place), device, dtype, on_progress)
        drawing = choose_sampling(sampling)
        session.load()
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


def pretrain(
    name: str | Domain,
    data: str | os.PathLike[str] | Iterable[Picture | PreparedImage],
    *,
    descriptor: str | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    recipe: PretrainingRecipe | None = None,
    tuning: TuningRecipe | None = None,
    steps: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Pre-train a domain on pictures (section 3.3), so that `personalize` can use it.

    Args:
        name: of the domain: a new one, or an installed one that lacks weights for this base; or a
            `Domain` with a preparation and sentences of its own.
        data: a folder of pictures (sub-folders count), or any iterable of pictures.
        descriptor: the everyday word for such things; the installed domain's, or the name.
        base: as in `personalize`.
        recipe, tuning: the numbers of training and those that the pack will carry; by default
            those of a pack that was made for this base, then the installed domain's.
        steps: instead of the recipe's.
        seed: of the first weights and of every draw.
        folder: where the pack goes; by default among the user's own domains.

    An interrupted run goes on from its last checkpoint when it is called again alike.

    Returns:
        The folder, which `e4t domains list` shows and `personalize` accepts.

    Raises:
        UsageError: the name or the word cannot be used, or there is such a pack already.
        InputError: there is no usable picture.
        E4TError: another of its children.
    """
    domain = _domain_to_pretrain(name, descriptor)
    target = Path(folder) if folder is not None else user_domains_folder() / domain.name
    if (target / "domain.toml").exists():
        raise UsageError(
            f"there is a domain in {printable(str(target))} already",
            hint="choose another name, or move that folder away",
        )
    pictures = list_pictures(data)
    place = _find_base(base)
    base_name = place.name if isinstance(place, Base) else place.base.name
    recipe, tuning = _recipes(domain, base_name, recipe, tuning)
    if steps is not None:
        recipe = _with_steps(recipe, steps)
    session = Session(place, None, device, dtype, on_progress)
    with memory_errors(), quiet_libraries():
        session.load()
        from .pretraining import encode_images, pretrain_domain

        model = session.model
        model.descriptor_id(domain.descriptor)  # a word it does not know stops us here
        encoded = encode_images(
            model,
            prepared_pictures(
                domain,
                pictures,
                PreparationTarget(size=model.resolution, base=model.base.name),
                session.report,
            ),
            total=len(pictures) if isinstance(pictures, Sequence) else 0,
            on_progress=session.report,
        )
        pack = pretrain_domain(
            model,
            encoded,
            name=domain.name,
            descriptor=domain.descriptor,
            recipe=recipe,
            tuning=tuning,
            templates=training_templates(domain),
            seed=seed,
            licence=domain.licence,
            autocast=model.device.type == "cuda",
            checkpoints=target.with_name(f".{target.name}.checkpoints"),
            on_progress=session.report,
        )
        pack.save(target)
    return target


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
    parsed = _parse(prompts, placeholder)
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


def find_pack(domain: Domain, base: Base | TextToImageModel) -> Path:
    """Return the folder with the domain's weights for a base.

    Raises:
        WeightsUnavailable: there are none; the hint is the command that makes them.
    """
    return weights_folder(domain, base.name if isinstance(base, Base) else base.base.name)


def _find_base(base: str | os.PathLike[str] | TextToImageModel) -> Base | TextToImageModel:
    return find_base(base) if isinstance(base, str | os.PathLike) else base


def _parse(prompts: str | Sequence[str], placeholder: str) -> list[Prompt]:
    wanted = [prompts] if isinstance(prompts, str) else prompts
    return [parse_prompt(prompt, placeholder) for prompt in wanted]


def _choose_seed(seed: int | None, count: int) -> int:
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"the number of pictures per prompt must be 1 or more, not {count!r}")
    if seed is None:
        return secrets.randbelow(2**31)  # short enough to type, far from the end
    if not 0 <= seed <= MOST_SEED + 1 - count:
        raise UsageError(f"seeds must be 0 to {MOST_SEED}, not {seed} to {seed + count - 1}")
    return seed


def _with_steps(recipe: _R, steps: int) -> _R:
    try:
        return recipe.replace(steps=steps)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _domain_of(concept: Concept) -> Domain:
    try:
        return find_domain(concept.domain)
    except UsageError as error:
        message = f"this concept needs the domain {concept.domain!r}: {error.message}"
        raise UsageError(message, hint=error.hint) from error


def _domain_to_pretrain(name: str | Domain, descriptor: str | None) -> Domain:
    """Return the value, the installed domain of that name, or a new plain one."""
    if isinstance(name, Domain):
        found: Domain | None = name
    else:
        found = {listing.name: listing.domain for listing in installed_domains()}.get(name)
    if found is not None:
        return replace(found, descriptor=descriptor) if descriptor else found
    try:
        return Domain(
            name=check_name(name),
            descriptor=descriptor or str(name),
            # The paper's numbers for its two unmasked domains, cats and art (section 3.5).
            tuning=TuningRecipe(steps=5, base_learning_rate=3e-6, embedding_penalty=1e-4),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _recipes(
    domain: Domain, base: str, recipe: PretrainingRecipe | None, tuning: TuningRecipe | None
) -> tuple[PretrainingRecipe, TuningRecipe]:
    """Return the numbers to use: those given, else those that served this base, else the domain's.

    Departure: the paper's rates belong to Stable Diffusion; on another base the packs that were
    made for it know better ones, so a new domain borrows from a pack without a mask.
    """
    for listing in installed_domains():
        if listing.domain is None or base not in listing.domain.weights:
            continue
        try:
            pack = user_domain(weights_folder(listing.domain, base))
        except E4TError:
            continue
        if not pack.tuning.mask and pack.pretraining is not None:
            recipe = recipe or pack.pretraining.replace(mask=False)
            tuning = tuning or pack.tuning
            break
    # Section 3.5 gives 30,000 to 100,000 steps; the middle one, of cats, for what is new.
    recipe = recipe or domain.pretraining or PretrainingRecipe(steps=60_000)
    return recipe, tuning or domain.tuning


