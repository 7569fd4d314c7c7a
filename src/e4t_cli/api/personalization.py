"""`personalize` and `generate`: photos in, a concept and its images out (section 3.4).

`prepare` does the first part of `personalize` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from e4t_cli.api.options import (
    GenerateKeywords,
    GenerateOptions,
    PersonalizeKeywords,
    PersonalizeOptions,
    PhotoOptions,
    PrepareKeywords,
    PrepareOptions,
    RunOptions,
)
from e4t_cli.api.photographs import doubts_about_photo
from e4t_cli.api.photos import PhotoSet, open_photos, stem
from e4t_cli.api.repetition import other_circumstances, repeated
from e4t_cli.api.requests import (
    Prompts,
    parse_prompts,
    resolve_images,
    resolve_sampling,
    resolve_seeds,
    resolve_tuning,
    scales_concept,
)
from e4t_cli.api.resolve import (
    check_addons,
    load_concept,
    load_concept_models,
    prefers_half,
    resolve_base,
    resolve_base_name,
    resolve_domain,
    resolve_domain_base,
    resolve_domain_weights,
)
from e4t_cli.api.session import ImageRequest, Session
from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.paths import HubAccess
from e4t_cli.hub.resolve import look_up_base
from e4t_cli.images.loading import ImageInput, ImageInputs, read_bytes
from e4t_cli.images.png_metadata import read_records
from e4t_cli.images.preparation import snapshot_downloader
from e4t_cli.images.results import Personalization
from e4t_cli.progress import Progress
from e4t_cli.prompts import PLACEHOLDER, check_placeholder
from e4t_cli.registry.domain import Domain, PreparationTarget, PreparedImage, check_which

if TYPE_CHECKING:
    from e4t_cli.formats.concept import Concept
    from e4t_cli.schedulers import SamplingConfig


def personalize(
    domain: str | os.PathLike[str] | Domain,
    image: ImageInputs,
    prompts: Prompts = (),
    *,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    placeholder: str = PLACEHOLDER,
    **options: Unpack[PersonalizeKeywords],
) -> Personalization:
    """Learn one concept from one photo, or several of it, and generate images of it (section 3.4).

    Args:
        domain: "face", "cat", "art", any installed domain, a domain folder, or a `Domain`.
        image: the photo: a path, "-" for stdin, bytes, an open binary file, or a PIL image; or a sequence of photos of
            the same subject, of which each step of tuning draws.
        prompts: with the placeholder where the concept goes; none only makes the concept. A `PromptRequest` has
            settings of its own.
        num_images_per_prompt: image i of every prompt has the seed `seed + i`.
        seed: of tuning and of the first image; None takes a random one, and reports it. Of several seeds each makes
            one image of every prompt, and the first is that of tuning.
        sampling: `SamplingConfig`, or a mapping of some of its fields.
        placeholder: what the prompts call the concept.
        options: keywords, see `e4t_cli.api.options`: base, device, dtype, vram, offline, accept_license,
            safety_checker (`GenerateOptions`); mask, align, face, require_face, strict (`PhotoOptions`); tuning,
            tune_steps, keep_weights, domain_base (`PersonalizeOptions`); on_progress, on_prepared, on_concept,
            on_image.

    Raises:
        E4TError: one of its children (errors.py).
    """
    asked = PersonalizeOptions(**options)
    parsed = parse_prompts(prompts, placeholder)
    seeds = resolve_seeds(seed, num_images_per_prompt)
    wanted = resolve_images(prompts, parsed, resolve_sampling(sampling), count=num_images_per_prompt, seeds=seeds)
    value, package = resolve_domain(domain)
    photos = open_photos(image, asked.mask)
    session = Session(asked, vram=asked.vram, safety=asked.safety_checker)
    session.find_addons()
    other = resolve_domain_base(asked.domain_base)
    base = resolve_base(asked, session.access, domain=value, safety=asked.safety_checker, domain_base=other)
    weights = resolve_domain_weights(value, base, session.access, domain_base=other)
    with session.running(base):
        session.load(base, weights, domain_base=other)
        return personalize_loaded(
            session, asked, photos, wanted,
            domain=value, package=package, seed=seeds[0], placeholder=placeholder, domain_base=other,
        )  # fmt: skip


def personalize_loaded(
    session: Session,
    asked: PersonalizeOptions,
    photos: PhotoSet,
    wanted: Sequence[ImageRequest],
    *,
    domain: Domain,
    package: str,
    seed: int,
    placeholder: str,
    domain_base: str,
) -> Personalization:
    """Do the work of `personalize` in a session that has the base and the domain weights; `seed` is that of tuning."""
    session.check_sampling(wanted)
    session.check_prompts(wanted)
    model, pretrained = session.model, session.pretrained
    tuning = resolve_tuning(pretrained.tuning, asked.tuning, asked.tune_steps)
    tuning = photos.tuning(tuning)
    for note in photos.notes:
        session.note("prepare", note)
    if 0 < (samples := tuning.steps * tuning.batch_size) < len(photos):
        session.note("prepare", f"tuning draws {samples} samples: not all of the {len(photos)} photos are used")
    with session.stage("prepare"):
        from e4t_cli.models.photos import mean_image_features

        target = preparation_target(
            domain, asked, session.access, size=model.resolution, base=model.base.name, device=str(model.device)
        )
        prepared = []
        for photo in photos:
            one = photo.prepare(domain, target, masked=tuning.mask)
            doubts = doubts_about_photo(model, domain, one, half=prefers_half(asked.device, asked.dtype))
            photo.report(one, session.report, doubts, strict=asked.strict)
            if asked.on_prepared is not None:
                asked.on_prepared(one)
            prepared.append(one)
        features = mean_image_features(model, pretrained, prepared)[0].cpu()

    from e4t_cli.formats.concept import Concept

    concept = Concept(
        domain=domain.name, package=package, descriptor=pretrained.descriptor,
        base_name=model.base.name, base_fingerprint=model.weights_fingerprint, weights_digest=pretrained.digest,
        prepared=prepared[0], others=prepared[1:], image_features=features, config=tuning, seed=seed,
        image_sha256=photos.sha256[0], others_sha256=photos.sha256[1:], photo=photos.remarks(prepared),
        placeholder=check_placeholder(placeholder), domain_base=domain_base,
        addons=tuple(one for one in model.addons if one.kind != "embedding"),
    )  # fmt: skip
    tuned = session.tune(concept, keep_base=scales_concept(wanted))
    if asked.keep_weights:
        concept = replace(concept, weights=Concept.weights_of(tuned))
    if asked.on_concept is not None:
        asked.on_concept(concept)
    return session.generate(concept, tuned, wanted, seed=seed, name=photos.name, on_image=asked.on_image)


def generate(
    concept: Concept | str | os.PathLike[str],
    prompts: Prompts = (),
    *,
    like: ImageInput | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    placeholder: str | None = None,
    **options: Unpack[GenerateKeywords],
) -> Personalization:
    """Generate images of a concept: tuned again to the same bits, unless its weights were kept.

    Args:
        concept: from `personalize`, or the file it was saved to.
        like: a PNG, or contact sheet, of e4t, whose prompts, seeds, placeholder and sampling options stand in for
            those that are not given.
        placeholder: the concept's own by default.
        options: keywords, the fields of `GenerateOptions`.

    The other arguments are those of `personalize`.

    Raises:
        IntegrityError: this machine's base or domain weights are not those of the concept.
        InputError: `like` has no record of how it was made.
        E4TError: another of its children.
    """
    asked = GenerateOptions(**options)
    records = [] if like is None else read_records(read_bytes(like))
    if records:
        placeholder = placeholder or records[0].placeholder
        prompts, seed, sampling = repeated(records, prompts, seed, num_images_per_prompt, sampling)
    seeds = resolve_seeds(seed, num_images_per_prompt)
    config = resolve_sampling(sampling)
    if placeholder is not None:
        parse_prompts(prompts, placeholder)
    name = stem(concept) if isinstance(concept, str | os.PathLike) else ""
    session = Session(asked, vram=asked.vram, safety=asked.safety_checker)
    with session.running():
        concept = load_concept(concept)
        parsed = parse_prompts(prompts, placeholder or concept.placeholder)
        session.find_addons(concept.addons)
        check_addons(concept, session.options, records)
        if records and (note := other_circumstances(records[0], concept)):
            session.note("load", note)
        wanted = resolve_images(prompts, parsed, config, count=num_images_per_prompt, seeds=seeds)
        load_concept_models(concept, session)
        session.check_sampling(wanted)
        session.check_prompts(wanted)
        tuned = concept.tuned(session.model, session.pretrained)
        tuned = tuned or session.tune(concept, keep_base=scales_concept(wanted))
        return session.generate(concept, tuned, wanted, seed=seeds[0], name=name, on_image=asked.on_image)


def prepare(
    domain: str | os.PathLike[str] | Domain, image: ImageInput, **options: Unpack[PrepareKeywords]
) -> PreparedImage:
    """Crop, rotate and mask a photo as `personalize` does. No base is loaded or fetched.

    Args:
        domain, image: those of `personalize`.
        options: keywords, the fields of `PrepareOptions`.

    Raises:
        E4TError: as `personalize`.
    """
    return prepare_all(domain, [image], **options)[0]


def prepare_all(
    domain: str | os.PathLike[str] | Domain, images: ImageInputs, **options: Unpack[PrepareKeywords]
) -> list[PreparedImage]:
    """Do what `prepare` does with each photo of one subject; one that is there twice is prepared once."""
    asked = PrepareOptions(**options)
    value, _ = resolve_domain(domain)
    return prepare_opened(value, open_photos(images, asked.mask), asked)


def prepare_opened(value: Domain, photos: PhotoSet, asked: PrepareOptions) -> list[PreparedImage]:
    """Do what `prepare_all` does with photos that were opened, which a stream can be once only."""
    access = HubAccess(offline=asked.offline, accept_license=asked.accept_license, on_progress=asked.on_progress)
    name, size, _ = _look_up_base(value, asked, access)
    if not size:
        raise UsageError(
            f"the image size of {printable(name)} is not known before it is fetched",
            hint=f"e4t fetch {printable(str(asked.base))}",
        )
    target = preparation_target(value, asked, access, size=size, base=name)
    if asked.on_progress is not None:
        for note in photos.notes:
            asked.on_progress(Progress(stage="prepare", note=note))
    prepared = []
    for photo in photos:
        prepared.append(photo.prepare(value, target, masked=value.tuning.mask))
        photo.report(prepared[-1], asked.on_progress, strict=asked.strict)
    return prepared


def _look_up_base(domain: Domain, options: RunOptions, access: HubAccess) -> tuple[str, int, bool]:
    """Return the base's name, its resolution (0: unknown), and whether it is on this machine."""
    base = options.base
    if not isinstance(base, str | os.PathLike):
        return base.base.name, base.resolution, True
    wanted = resolve_base_name(base, access, domain=domain, device=options.device, confirm=False)
    return look_up_base(wanted, half=prefers_half(options.device, options.dtype))


def preparation_target(
    domain: Domain, options: PhotoOptions, access: HubAccess, *, size: int, base: str, device: str = "cpu"
) -> PreparationTarget:
    """Return what the preparation is to do.

    Raises:
        UsageError: `face` cannot be read, or the domain detects none and one is required.
    """
    try:
        which = check_which(options.face)
    except ValueError as error:
        raise UsageError(f"--face: {printable(str(error))}") from error
    if domain.prepare is None and (options.require_face or which != "largest"):
        flag = "--require-face" if options.require_face else "--face"
        raise UsageError(f"the domain {domain.name!r} looks for no face", hint=f"leave {flag} out")
    return PreparationTarget(
        size=size, base=base, align=options.align, which=which, required=options.require_face, device=device,
        fetch=snapshot_downloader(access),
    )  # fmt: skip
