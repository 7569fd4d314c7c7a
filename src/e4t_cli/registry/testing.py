"""Checks that a domain keeps the contract: `check_domain("dog")` in an author's tests.

`e4t domains check` prints the same findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from e4t_cli.errors import E4TError, IntegrityError, UsageError, WeightsUnavailable
from e4t_cli.hub.bases import Base, installed_bases
from e4t_cli.images.loading import image_sha256, prepare_image
from e4t_cli.models.descriptors import Vocabulary, check_descriptor
from e4t_cli.prompts import training_prompts, training_templates
from e4t_cli.registry.discovery import find_domain, user_domain, weights_folder
from e4t_cli.registry.domain import Domain, PreparationTarget, is_remote

if TYPE_CHECKING:
    from e4t_cli.models.domain_weights import DomainWeights

SIZES = ((64, 64), (200, 100), (96, 300), (64, 512))  # of the images that a preparation is tested on


@dataclass(frozen=True, kw_only=True)
class ContractFinding:
    """The result of one check."""

    subject: str  # what was checked
    problem: str = ""  # one sentence, or "" if the check passed
    remark: str = ""  # further information


def check_domain(domain: Domain | str | Path) -> None:
    """Check a domain, its name, or a folder with a domain.toml; AssertionError about the first problem."""
    for finding in examine_domain(domain):
        if finding.problem:
            raise AssertionError(finding.problem)


def examine_domain(domain: Domain | str | Path) -> Iterator[ContractFinding]:
    """Run every check on a domain and yield the findings one by one.

    The value itself was validated when it was made. Here its prompt templates are parsed, its preparation is run on
    images of several shapes, for each of its bases and for an unknown one, and its weights on this machine are read
    completely. Nothing is fetched.
    """
    try:
        if isinstance(domain, str | Path):
            domain = find_domain(domain) if isinstance(domain, str) else user_domain(domain)
    except E4TError as error:
        yield ContractFinding(subject="domain", problem=error.message)
        return
    if not isinstance(domain, Domain):
        yield ContractFinding(subject="domain", problem=f"it is of type {type(domain).__name__}, not Domain")
        return
    yield ContractFinding(subject="domain")
    yield _finding("descriptor", partial(_check_descriptor, domain))
    yield _finding("prompt templates", partial(_check_templates, domain))
    for base in (*domain.weights, "some-other-base"):
        yield _finding(f"preparation for {base}", partial(_check_preparation, domain, base))
    for base in domain.weights:
        yield _finding(f"weights for {base}", partial(_check_weights, domain, base))
    if not domain.licence:
        yield ContractFinding(subject="licence", remark="it states none, so nobody may use its weights")


def _finding(subject: str, check: Callable[[], str | None]) -> ContractFinding:
    try:
        return ContractFinding(subject=subject, remark=check() or "")
    except (AssertionError, E4TError) as error:
        return ContractFinding(subject=subject, problem=str(error))


def _check_descriptor(domain: Domain) -> str:
    """Tokenize the descriptor for the bases that come with e4t; returns those whose pre-training would refuse it."""
    remarks = []
    for base in installed_bases():
        try:
            check_descriptor(domain.descriptor, Vocabulary.of_base(base))
        except UsageError as error:
            if base.name in domain.weights:
                raise
            remarks.append(f"{error.message}, or the domain is for other bases")
    return "; ".join(remarks)


def _check_templates(domain: Domain) -> None:
    for prompt in training_prompts(training_templates(domain)):
        if prompt.placeholders != 1:
            raise AssertionError(f"the prompt {prompt.text!r} names the concept more than once")


def _check_preparation(domain: Domain, base: str) -> None:
    for image in map(_test_image, SIZES):
        before = image_sha256(image)
        target = PreparationTarget(size=64, base=base)
        unmasked = PreparationTarget(size=64, base=base, mask=None)
        about = f"for an image of {image.width}×{image.height} and the base {base!r}"
        try:
            prepared = [prepare_image(domain, image, one).image for one in (target, target, unmasked)]
        except E4TError as error:
            raise AssertionError(f"{error} ({about})") from error
        first, again, bare = map(image_sha256, prepared)
        if image_sha256(image) != before:
            raise AssertionError(f"prepare changed the image it was given ({about})")
        if first != again:
            raise AssertionError(f"prepare gave two results for one image ({about})")
        if first != bare:
            raise AssertionError(f"prepare crops differently when no mask is asked for ({about})")


def _test_image(size: tuple[int, int]) -> Image.Image:
    """Return an image whose middle and corners differ."""
    width, height = size
    image = Image.new("RGB", size, (150, 190, 220))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=(230, 180, 150))
    draw.rectangle((0, 0, width // 8, height // 8), fill=(60, 40, 30))
    return image


def _check_weights(domain: Domain, base: str) -> str:
    """Read the weights and compare them with their base if it is installed; returns what could not be checked."""
    try:
        folder = weights_folder(domain, base)
    except WeightsUnavailable as error:
        if is_remote(domain.weights[base]):
            return "they are on the hub, and not on this machine"
        raise AssertionError(error.message) from error
    from e4t_cli.models.domain_weights import DomainWeights

    weights = DomainWeights.load(folder)
    if weights.base_name != base:
        raise IntegrityError(f"they were made for the base {weights.base_name}, not for {base}")
    installed = {one.name: one for one in installed_bases()}
    if base not in installed:
        return f"whether they fit was not checked: the base {base} does not come with e4t"
    _check_fit(weights, installed[base])
    return ""


def _check_fit(weights: DomainWeights, base: Base) -> None:
    """Compare weights with a base without loading the base's weights."""
    import torch
    from diffusers import UNet2DConditionModel

    from e4t_cli.models.fingerprints import is_recorded
    from e4t_cli.nn.weight_offsets import WeightOffsets

    known = weights.base_fingerprint  # empty in weights that another program made
    if known and not is_recorded(base, known):
        raise IntegrityError(f"they were made for another base than this {base.name}")
    config = UNet2DConditionModel.load_config(base.folder / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)  # type: ignore[no-untyped-call]
        fresh = WeightOffsets.for_unet(unet).factors()
    shapes = {path: (left.shape, right.shape) for path, (left, right) in fresh.items()}
    for path, (left, right) in weights.offsets.items():
        if shapes.pop(path, None) != (left.shape, right.shape):
            raise IntegrityError(f"the weight offset of {path} does not fit the base {base.name}")
    if shapes:
        raise IntegrityError(f"there is no weight offset for {next(iter(shapes))}")
    try:
        check_descriptor(weights.descriptor, Vocabulary.of_base(base))
    except UsageError as error:
        raise IntegrityError(error.message) from error
