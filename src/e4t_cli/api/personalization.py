"""`plan`: what `personalize` would do, found out without torch and without a network.

`personalize` and `generate`: a photo in, a concept and its pictures out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from e4t_cli.api.preprocessing import PreparedCallback, preparation_target, resolve_mask, tell
from e4t_cli.api.resolve import (
    load_concept,
    load_concept_models,
    parse_prompts,
    prefers_half,
    resolve_base,
    resolve_base_name,
    resolve_domain,
    resolve_domain_weights,
    resolve_seed,
    with_steps,
    with_tuning_method,
)
from e4t_cli.api.session import Session, resolve_sampling
from e4t_cli.errors import WeightsUnavailable
from e4t_cli.hub.bases import e4t_diffusion_repository
from e4t_cli.hub.paths import AskLicence, HubAccess
from e4t_cli.hub.resolve import look_up_base
from e4t_cli.images.loading import ImageInput, open_image
from e4t_cli.images.preparation import prepare_photo
from e4t_cli.images.results import GeneratedImage, Personalization
from e4t_cli.progress import ProgressCallback
from e4t_cli.prompts import PLACEHOLDER, check_placeholder
from e4t_cli.registry.discovery import user_domain
from e4t_cli.registry.domain import Domain
from e4t_cli.registry.weights import weights_folder

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.sampling import SamplingConfig


def plan(
    domain: str | os.PathLike[str] | Domain,
    image: ImageInput,
    prompts: str | Sequence[str] = (),
    *,
    num_images_per_prompt: int = 1,
    base: str | os.PathLike[str] = "auto",
    placeholder: str = PLACEHOLDER,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
) -> dict[str, Any]:
    """Say what `personalize` would do, checking what can be checked without torch and a network.

    Raises:
        E4TError: as `personalize`.
    """
    parsed = parse_prompts(prompts, placeholder)
    value, _ = resolve_domain(domain)
    photo = open_image(image).image
    wanted = resolve_base_name(
        base, HubAccess(offline=offline), domain=value, device=device, confirm=False
    )
    name, resolution, here = look_up_base(wanted, half=prefers_half(device, dtype))
    tuning, fetched = value.tuning, [] if here else [f"the base {name}"]
    try:
        tuning = user_domain(weights_folder(value, name)).tuning
    except WeightsUnavailable:
        location = value.weights.get(name, "")
        if not location.startswith("hub:") and not e4t_diffusion_repository(location):
            raise
        fetched.append(f"the weights of {value.name}")
    return {
        "domain": value.name,
        "descriptor": value.descriptor,
        "base": name,
        "photo": f"{photo.width}×{photo.height}",
        "prompts": len(parsed),
        "pictures": len(parsed) * num_images_per_prompt,
        "size": f"{resolution}×{resolution}" if resolution else "",
        "to fetch": " and ".join(fetched),
        "tuning": tuning.as_dict(),
    }


ImageCallback = Callable[[GeneratedImage], None]


def personalize(
    domain: str | os.PathLike[str] | Domain,
    image: ImageInput,
    prompts: str | Sequence[str] = (),
    *,
    num_images_per_prompt: int = 1,
    seed: int | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    tuning: str | None = None,
    tune_steps: int | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    mask: ImageInput = "auto",
    align: bool = True,
    face: str | int = "largest",
    require_face: bool = False,
    placeholder: str = PLACEHOLDER,
    keep_weights: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    vram: str = "auto",
    safety_checker: bool = True,
    offline: bool = False,
    accept_license: bool | AskLicence = False,
    on_progress: ProgressCallback | None = None,
    on_prepared: PreparedCallback | None = None,
    on_image: ImageCallback | None = None,
) -> Personalization:
    """Learn one concept from one photo and draw it (section 3.4).

    Args:
        domain: "face", "cat", "art", any installed domain, a domain's folder, or a `Domain`.
        image: the photo: a path, "-" for stdin, bytes, an open binary file, or a PIL image.
        prompts: sentences with the placeholder where the concept goes; none only makes the
            concept.
        num_images_per_prompt: picture i of every prompt has the seed `seed + i`.
        seed: of tuning and of the first picture; None takes a random one, and reports it.
        base: a name, "owner/name[@revision]" of the hub, a folder in diffusers' layout, or a model
            that is loaded already; "auto" is Stable Diffusion where there is an accelerator.
        tuning: "full" as the paper does, or "lora": less memory and a small concept, and a
            departure from the paper; None as the pack's recipe says.
        tune_steps: instead of the recipe's; 0 keeps the encoder's first guess.
        sampling: how pictures are drawn, as `SamplingConfig` or as a mapping of some of its fields.
        mask: "auto" as the domain does, "none", "words:a cat" for what a network finds by words
            ("words" alone: the domain's own), or a picture that is white where the concept is.
        align: let the domain turn and crop the photo; False takes its centred square.
        face: of several, "largest", "left", "right", or a number from the left.
        require_face: refuse a photo without a face instead of going on without mask.
        placeholder: what the prompts call the concept.
        keep_weights: keep the tuned tensors in the concept: larger, but drawn without tuning.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "fp32", "bf16", "fp16".
        vram: gigabytes that may be used, as "8", or "auto" for what is free.
        safety_checker: withhold what the base's safety checker flags, if the base has one.
        offline: use only what is on this machine, and open no socket.
        accept_license: True accepts the licence of what has to be fetched; a function is asked.
        on_progress: called from every stage: load, prepare, tune, generate.
        on_prepared: called with the prepared picture and its mask, before any tuning.
        on_image: called with each picture as soon as it is there.

    Raises:
        E4TError: one of its children, each one sentence (errors.py).
    """
    parsed = parse_prompts(prompts, placeholder)
    start = resolve_seed(seed, num_images_per_prompt)
    value, package = resolve_domain(domain)
    opened = open_image(image)
    choice = resolve_mask(mask, opened)
    session = Session(device, dtype, on_progress, vram=vram, safety=safety_checker)
    access = HubAccess(offline=offline, accept_license=accept_license, on_progress=session.report)
    place = resolve_base(
        base, access, domain=value, device=device, dtype=dtype, safety=safety_checker
    )
    pack = resolve_domain_weights(value, place, access)
    with session.running(place):
        drawing = resolve_sampling(sampling)
        session.load(place, pack)
        session.check_prompts(parsed)
        model, pretrained = session.model, session.pretrained
        config = pretrained.tuning
        if choice.kind != "auto":
            config = config.replace(mask=choice.kind != "none")
        elif opened.alpha is not None:
            config = config.replace(mask=True)
        if tune_steps is not None:
            config = with_steps(config, tune_steps)
        if tuning is not None:
            config = with_tuning_method(config, tuning)
        with session.stage("prepare"):
            target = preparation_target(
                value,
                access,
                size=model.resolution,
                base=model.base.name,
                align=align,
                face=face,
                require_face=require_face,
                device=str(model.device),
            )
            prepared = prepare_photo(value, opened, choice, target, masked=config.mask)
            tell(prepared, session.report)
            if on_prepared is not None:
                on_prepared(prepared)
            pixels = model.pixels([prepared.image])
            features = pretrained.image_features(model, pixels)[0].cpu()

        from e4t_cli.formats.concept import Concept

        concept = Concept(
            domain=value.name,
            descriptor=pretrained.descriptor,
            base_name=model.base.name,
            base_fingerprint=model.fingerprint,
            weights_digest=pretrained.digest,
            prepared=prepared,
            image_features=features,
            config=config,
            seed=start,
            image_sha256=opened.sha256,
            placeholder=check_placeholder(placeholder),
            photo="; ".join(prepared.remarks),
            package=package,
        )
        tuned = session.tune(concept, keep_base=drawing.concept_scale != 1)
        if keep_weights:
            concept = replace(concept, weights=Concept.weights_of(tuned))
        return session.draw(
            concept,
            tuned,
            parsed,
            count=num_images_per_prompt,
            seed=start,
            sampling=drawing,
            on_image=on_image,
        )


def generate(
    concept: Concept | str | os.PathLike[str],
    prompts: str | Sequence[str],
    *,
    num_images_per_prompt: int = 1,
    seed: int | None = None,
    base: str | os.PathLike[str] | TextToImageModel = "auto",
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    placeholder: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    vram: str = "auto",
    safety_checker: bool = True,
    offline: bool = False,
    accept_license: bool | AskLicence = False,
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
    start = resolve_seed(seed, num_images_per_prompt)
    if placeholder is not None:
        parse_prompts(prompts, placeholder)
    session = Session(device, dtype, on_progress, vram=vram, safety=safety_checker)
    access = HubAccess(offline=offline, accept_license=accept_license, on_progress=session.report)
    with session.running():
        concept = load_concept(concept)
        parsed = parse_prompts(prompts, placeholder or concept.placeholder)
        drawing = resolve_sampling(sampling)
        load_concept_models(
            concept, session, access, base=base, device=device, dtype=dtype, safety=safety_checker
        )
        session.check_prompts(parsed)
        tuned = concept.tuned(session.model, session.pretrained)
        tuned = tuned or session.tune(concept, keep_base=drawing.concept_scale != 1)
        return session.draw(
            concept,
            tuned,
            parsed,
            count=num_images_per_prompt,
            seed=start,
            sampling=drawing,
            on_image=on_image,
        )
