"""For authors of domains: `check_domain("dog")` in a test says whether the contract is kept.

`e4t domains check` shows the same findings on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from e4t_cli.errors import E4TError, IntegrityError, WeightsUnavailable
from e4t_cli.hub.bases import Base, installed_bases
from e4t_cli.images.loading import image_sha256, prepare_image
from e4t_cli.prompts import training_prompts, training_templates
from e4t_cli.registry.discovery import find_domain, user_domain
from e4t_cli.registry.domain import Domain, PreparationTarget, is_remote
from e4t_cli.registry.weights import weights_folder

if TYPE_CHECKING:
    from e4t_cli.models.domain_weights import DomainWeights

SIZES = ((64, 64), (200, 100), (96, 300), (64, 512))
"""Width and height of the pictures that a preparation is tried on."""


@dataclass(frozen=True, kw_only=True)
class ContractFinding:
    """What one check found.

    Args:
        subject: what was looked at.
        problem: one sentence, or "" if all is well.
        remark: what is good to know though nothing is wrong.
    """

    subject: str
    problem: str = ""
    remark: str = ""


def check_domain(domain: Domain | str | Path) -> None:
    """Check a domain as the program will use it.

    Args:
        domain: the value, its name, or a folder with a domain.toml.

    Raises:
        AssertionError: one sentence about the first thing that is wrong.
    """
    for finding in examine_domain(domain):
        if finding.problem:
            raise AssertionError(finding.problem)


def examine_domain(domain: Domain | str | Path) -> Iterator[ContractFinding]:
    """Check a domain and report on everything, as it is looked at.

    The value itself was validated when it was made. Here its training sentences are parsed, its
    preparation is run on drawn pictures of several shapes, for each of its bases and for one it
    does not know, and its weights on this machine are read whole. Nothing is fetched.
    """
    try:
        domain = _value_of(domain)
    except E4TError as error:
        yield ContractFinding(subject="domain", problem=error.message)
        return
    if not isinstance(domain, Domain):
        problem = f"it is of type {type(domain).__name__}, not Domain"
        yield ContractFinding(subject="domain", problem=problem)
        return
    yield ContractFinding(subject="domain")
    yield _examine("training sentences", partial(_check_sentences, domain))
    for base in (*domain.weights, "some-other-base"):
        yield _examine(f"preparation for {base}", partial(_check_preparations, domain, base))
    for base in domain.weights:
        yield _examine(f"weights for {base}", partial(_check_weights, domain, base))
    if not domain.licence:
        yield ContractFinding(
            subject="licence", remark="it states none, so nobody may use its weights"
        )


def _value_of(domain: Domain | str | Path) -> Domain:
    if isinstance(domain, Path):
        return user_domain(domain)
    return find_domain(domain) if isinstance(domain, str) else domain


def _examine(subject: str, check: Callable[[], str | None]) -> ContractFinding:
    try:
        return ContractFinding(subject=subject, remark=check() or "")
    except AssertionError as error:
        return ContractFinding(subject=subject, problem=str(error))
    except E4TError as error:
        return ContractFinding(subject=subject, problem=error.message)


def _check_sentences(domain: Domain) -> None:
    for prompt in training_prompts(training_templates(domain)):
        if prompt.placeholders != 1:
            raise AssertionError(f"the sentence {prompt.text!r} names the concept more than once")


# ── preparation ──


def _check_preparations(domain: Domain, base: str) -> None:
    for size in SIZES:
        _check_preparation(domain, _drawing(size), base)


def _check_preparation(domain: Domain, picture: Image.Image, base: str) -> None:
    before = image_sha256(picture)
    target = PreparationTarget(size=64, base=base)
    about = f"for a picture of {picture.width}×{picture.height} and the base {base!r}"
    try:
        first = prepare_image(domain, picture, target)
        again = prepare_image(domain, picture, target)
        bare = prepare_image(domain, picture, PreparationTarget(size=64, base=base, mask=None))
    except E4TError as error:
        raise AssertionError(f"{error} ({about})") from error
    if image_sha256(picture) != before:
        raise AssertionError(f"prepare changed the picture it was given ({about})")
    if image_sha256(first.image) != image_sha256(again.image):
        raise AssertionError(f"prepare gave two results for one picture ({about})")
    if image_sha256(first.image) != image_sha256(bare.image):
        raise AssertionError(f"prepare crops differently when no mask is asked for ({about})")


def _drawing(size: tuple[int, int]) -> Image.Image:
    """Draw something with a middle and corners that differ."""
    width, height = size
    picture = Image.new("RGB", size, (150, 190, 220))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=(230, 180, 150))
    draw.rectangle((0, 0, width // 8, height // 8), fill=(60, 40, 30))
    return picture


# ── weights ──


def _check_weights(domain: Domain, base: str) -> str:
    """Read a pack whole, and compare it with its base if that is here.

    Returns:
        A remark where something could not be looked at.
    """
    try:
        folder = weights_folder(domain, base)
    except WeightsUnavailable as error:
        if is_remote(domain.weights[base]):
            return "they are on the hub, and not on this machine"
        raise AssertionError(error.message) from error
    from e4t_cli.models.domain_weights import DomainWeights

    pack = DomainWeights.load(folder)
    if pack.base_name != base:
        raise IntegrityError(f"the pack was made for the base {pack.base_name}, not for {base}")
    here = next((one for one in installed_bases() if one.name == base), None)
    if here is None:
        return f"whether they fit was not looked at: the base {base} does not come with e4t"
    _check_fit(pack, here)
    return ""


def _check_fit(pack: DomainWeights, base: Base) -> None:
    """Compare a pack with a base without loading the base's weights."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTokenizer

    from e4t_cli.models.loading import folder_fingerprint, load_settings
    from e4t_cli.nn.weight_offsets import WeightOffsets

    known = pack.base_fingerprint  # none in packs made from checkpoints of other programs
    if known and folder_fingerprint(base.folder) != known:
        raise IntegrityError(f"the pack was made for another base than this {base.name}")
    config = UNet2DConditionModel.load_config(base.folder / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        fresh = WeightOffsets.for_unet(unet).factors()
    shapes = {path: (left.shape, right.shape) for path, (left, right) in fresh.items()}
    for path, (left, right) in pack.offsets.items():
        if shapes.pop(path, None) != (left.shape, right.shape):
            raise IntegrityError(f"the pack's offset of {path} does not fit the base {base.name}")
    if shapes:
        raise IntegrityError(f"the pack has no offset for {next(iter(shapes))}")
    words = load_settings(CLIPTokenizer, base.folder / "tokenizer")
    count = len(words(pack.descriptor, add_special_tokens=False).input_ids)
    if count != 1:
        raise IntegrityError(
            f"the descriptor {pack.descriptor!r} is {count} tokens to the base {base.name}, not one"
        )
