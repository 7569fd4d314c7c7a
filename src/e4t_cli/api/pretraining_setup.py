"""Prepares a pre-training: the new domain's descriptor, configs and folder, and training data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from e4t_cli.api.options import DomainTrainingOptions
from e4t_cli.api.requests import NEW_PRETRAINING, NEW_TUNING
from e4t_cli.api.resolve import refuse_addons
from e4t_cli.datasets.reader import ImageReader
from e4t_cli.datasets.sources import ImageSource, IterableSource, MapStyleSource, SinglePassSource
from e4t_cli.errors import E4TError, ResourceError, UsageError, WeightsUnavailable, printable
from e4t_cli.files import free_bytes, holds_only, sha256_of, shown_size
from e4t_cli.hub.paths import user_cache
from e4t_cli.progress import Progress, ProgressCallback
from e4t_cli.registry.config import PretrainingConfig, TuningConfig
from e4t_cli.registry.discovery import USER, installed_domains, user_domain, user_domains_folder, weights_folder
from e4t_cli.registry.domain import Domain, check_name
from e4t_cli.registry.manifest import MANIFEST_NAME, is_domain_folder
from e4t_cli.temporary import remove, sweep, temporary_path

if TYPE_CHECKING:
    from e4t_cli.models.text_to_image import TextToImageModel
    from e4t_cli.pretraining.batches import DistributedContext
    from e4t_cli.pretraining.encoded_images import TrainingData

FINISHED = "finished"  # file beside the checkpoints: the SHA-256 of the manifest that they have led to
UNFINISHED = ("encoder.safetensors", "offsets.safetensors", "tower.safetensors", "training")


@dataclass(frozen=True, kw_only=True)
class NewDomain:
    """A domain about to be pre-trained for a base."""

    domain: Domain  # its descriptor counts unless `names_itself`
    names_itself: bool  # the descriptor is to be found in the name
    config: PretrainingConfig
    tuning: TuningConfig  # of later personalization
    folder: Path  # where the domain weights go

    @property
    def work(self) -> Path:
        """The folder of checkpoints, logs and contact sheets during the training."""
        return work_folder(self.folder)


def work_folder(target: Path) -> Path:
    """Return the folder of checkpoints beside a domain's folder."""
    return target.with_name(f".{target.name}.checkpoints")


def discard_work(target: Path) -> None:
    """Remove the checkpoints of a domain's folder, in one step: the next run must not resume from half of them."""
    with contextlib.suppress(OSError):
        os.rename(work_folder(target), left := temporary_path(target))
        remove(left)


def check_new_name(name: str | Domain) -> None:
    """Raise `UsageError` if no domain can have this name."""
    if isinstance(name, str):
        try:
            check_name(name)
        except ValueError as error:
            raise UsageError(str(error)) from error


def plan_domain(
    name: str | Domain, base: str, options: DomainTrainingOptions, *, config: PretrainingConfig | None = None,
    tuning: TuningConfig | None = None, folder: str | os.PathLike[str] | None = None,
) -> NewDomain:  # fmt: skip
    """Decide everything about a new domain that does not need its base; the options replace fields of the config.

    Raises:
        UsageError: a value is out of range, or there are such weights already.
    """
    refuse_addons(options)
    called = name if isinstance(name, str) else name.name
    target = Path(folder) if folder is not None else user_domains_folder() / called
    sweep_place(target)
    domain, is_new = _find(name, base, replacing=options.force)
    config = config or domain.pretraining or NEW_PRETRAINING
    fields = ("steps", "batch_size", "base_learning_rate", "reg_weight")
    given = {field: value for field in fields if (value := getattr(options, field)) is not None}
    try:
        if options.descriptor is not None:
            domain = replace(domain, descriptor=options.descriptor)
        config = config.replace(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_place(target, force=options.force)
    names_itself = is_new and options.descriptor is None
    tuning = tuning or domain.tuning
    return NewDomain(domain=domain, names_itself=names_itself, config=config, tuning=tuning, folder=target)


def is_earlier(folder: Path) -> bool:
    """Whether a folder is that of an earlier pre-training, also of one that was killed while it wrote the weights."""
    return is_domain_folder(folder) or holds_only(folder, UNFINISHED)


def sweep_place(target: Path) -> None:
    """Remove what killed pre-trainings of a domain's folder left, but for checkpoints that lead to another."""
    sweep(target)
    with contextlib.suppress(OSError, ValueError):  # killed between the end and the removal of its checkpoints
        if (work_folder(target) / FINISHED).read_text(encoding="ascii") == sha256_of(target / MANIFEST_NAME):
            discard_work(target)


def check_place(target: Path, *, force: bool) -> None:
    """Raise UsageError unless a domain's folder is absent or empty, or with `force`, that of an earlier one."""
    sweep_place(target)
    if not os.path.lexists(target) or holds_only(target, ()) or (force and is_earlier(target)):
        return
    shown = printable(str(target))
    if force:
        message = f"{shown} holds other files than a domain's: it is not replaced"
        raise UsageError(message, hint="choose another name, or move it away")
    hint = f"replace it with --force, choose another name, or remove it: e4t domains rm {target.name}"
    raise UsageError(f"there is a domain in {shown} already", hint=hint)


def _find(name: str | Domain, base: str, *, replacing: bool) -> tuple[Domain, bool]:
    """Return the value, the installed domain of that name, or a new plain one; and which it is."""
    if isinstance(name, Domain):
        return name, False
    # A package's domain precedes the user's folder of that name, which holds weights for it.
    installed = sorted(installed_domains(), key=lambda one: one.package == USER)
    for listing in installed:
        if replacing and listing.package == USER:
            continue  # made anew, by the same rules as the first time
        if listing.name == name and listing.domain is not None:
            with contextlib.suppress(WeightsUnavailable):
                made = weights_folder(listing.domain, base)
                if made.parent == user_domains_folder() and replacing:
                    return listing.domain, False
                message = f"the domain {name!r} has weights for {base} already, in {printable(str(made))}"
                raise UsageError(message, hint="choose another name with --domain, or replace your own: --force")
            return listing.domain, False
    known = [one.domain for one in installed if one.domain is not None]
    tuning, pretraining = _known_configs(known, base)
    return Domain(name=name, descriptor=name, tuning=tuning, pretraining=pretraining), True


def _known_configs(known: list[Domain], base: str) -> tuple[TuningConfig, PretrainingConfig]:
    """Return the configs that a new domain begins with on a base.

    The paper's learning rates are for Stable Diffusion; domain weights made for this base have
    better ones. Of several, one without a mask and with the default templates is the nearest.
    """
    for domain in sorted(known, key=lambda one: bool(one.prompt_templates)):
        with contextlib.suppress(E4TError):
            made = user_domain(weights_folder(domain, base))
            if made.pretraining is not None and not made.tuning.mask:
                return made.tuning, made.pretraining.replace(mask=False)
    return NEW_TUNING, NEW_PRETRAINING


@dataclass(frozen=True, kw_only=True)
class CacheChoice:
    """Whether encoded images are kept on the disk."""

    used: bool
    images: int  # 0 if unknown
    size: int  # of the cache, in bytes
    why: str = ""  # a note for the user if "auto" could not use it


def check_cache(wanted: str) -> None:
    """Raise `UsageError` if a choice is not one of the three."""
    if wanted not in ("auto", "on", "off"):
        raise UsageError(f"there is no cache {printable(wanted)!r}", hint="one of auto, on, off")


def choose_cache(
    wanted: str, source: ImageSource, model: TextToImageModel, samples: int, *, mask: bool
) -> CacheChoice:
    """Decide whether encoded images, and masks, are kept; "auto" keeps them if `samples` repeat the images.

    Raises:
        UsageError: an iterable that can be read once only, and "off".
        ResourceError: "on", and the disk is too small.
    """
    from e4t_cli.pretraining.encoded_images import bytes_per_image

    images = 0
    if isinstance(source, MapStyleSource | IterableSource):
        images = len(source) if isinstance(source, MapStyleSource) else source.approximate_len
    size = images * bytes_per_image(model, mask=mask)
    once = isinstance(source, SinglePassSource)
    if wanted == "off" and once:
        message = "an iterable can be read once, so its images have to be cached"
        raise UsageError(message, hint="pass a list, or leave the cache on")
    if wanted == "off" or (wanted == "auto" and not once and not 0 < images < samples):
        return CacheChoice(used=False, images=images, size=size)
    free = free_bytes(user_cache())
    if size > 0.9 * free:
        needed = f"the encoded images need {shown_size(size)}, and {shown_size(free)} are free"
        if wanted == "on":
            raise ResourceError(needed, hint="E4T_CACHE_DIR moves the cache, --cache off trains without it")
        return CacheChoice(used=False, images=images, size=size, why=f"{needed}: they are not cached")
    return CacheChoice(used=True, images=images, size=size)


@contextlib.contextmanager
def training_data(
    model: TextToImageModel, source: ImageSource, reader: ImageReader, choice: CacheChoice, *,
    processes: DistributedContext, on_progress: ProgressCallback,
) -> Iterator[TrainingData]:  # fmt: skip
    """Yield a source's images as training data.

    Raises:
        InputError: no image can be used, or one cannot and the reader is strict.
    """
    from e4t_cli.pretraining.cache import EncodingCache
    from e4t_cli.pretraining.encoded_images import OnTheFlyDataset, StreamingDataset

    def report(*notes: str) -> None:
        for note in filter(None, notes):
            on_progress(Progress(stage="encode", note=note))

    report(*source.notes, choice.why)
    if choice.used:
        yield EncodingCache(model, reader).encode(
            source, total=choice.images, processes=processes, on_progress=on_progress
        )
        return
    report(*reader.notes(choice.images or None))
    if isinstance(source, MapStyleSource):
        live: OnTheFlyDataset | StreamingDataset = OnTheFlyDataset(model, source, reader)
    else:
        assert isinstance(source, IterableSource)
        live = StreamingDataset(model, source, reader, processes.rank, processes.count)
    try:
        yield live
    finally:
        live.close()
        report(*reader.notes(None))
